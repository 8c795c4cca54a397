"""Where we look from: pinhole cameras on a sphere around the object, their rays, and how random ones are drawn.

World: right-handed, z up, object at the origin. Camera frame: OpenGL (x right, y up, looking along -z). A camera at
(elevation, azimuth, distance r) stands at r (cos el cos az, cos el sin az, sin el); azimuth 0 looks along -x and sees
+y on its right. Angles are degrees, pixel centres lie at +0.5.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from threedrec.camera_sampling import (
    RandomCameraConfig,
    progressive_ranges,
    sample_azimuths,
    sample_elevations,
    sample_lights,
    sample_normal,
    sample_uniform,
)

__all__ = ["Cameras", "RandomCameraConfig", "RandomCameraSampler", "look_at", "orbit_cameras", "turntable"]

Angle = float | Sequence[float] | Float[Tensor, " B"]


@dataclass(frozen=True)
class Cameras:
    """A batch of B pinhole cameras that share one image size."""

    c2w: Float[Tensor, "B 4 4"]
    """Camera to world, OpenGL camera frame."""
    fovy: Float[Tensor, " B"]
    """Full vertical field of view in degrees; pixels are square."""
    elevation: Float[Tensor, " B"]
    """Degrees above the xy plane."""
    azimuth: Float[Tensor, " B"]
    """Degrees, counter-clockwise seen from above, 0 at +x."""
    distance: Float[Tensor, " B"]
    """World units from the origin."""
    height: int
    width: int
    light_positions: Float[Tensor, "B 3"] | None = None
    """World positions of one point light per camera."""

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "Cameras":
        """Return the chosen cameras as a batch; an integer gives a batch of one."""
        if isinstance(index, int):
            index = torch.tensor([index], device=self.c2w.device)
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.c2w.device

    @property
    def positions(self) -> Float[Tensor, "B 3"]:
        """Camera centres in world coordinates."""
        return self.c2w[:, :3, 3]

    def to(self, device: str | torch.device) -> "Cameras":
        """Return the same cameras with every tensor on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def resized(self, height: int, width: int) -> "Cameras":
        """Return the same views on another pixel grid; the vertical field of view stays."""
        return replace(self, height=height, width=width)

    def focal(self) -> Float[Tensor, " B"]:
        """Return focal lengths in pixels, ``h / (2 tan(fovy / 2))``, the same along both axes."""
        return 0.5 * self.height / torch.tan(torch.deg2rad(self.fovy) * 0.5)

    def rays(
        self, noise_scale: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W 3"]]:
        """Return ray origins and unit directions in world coordinates, through the pixel centres.

        Args:
            noise_scale: standard deviation of one offset for all origins and one for all directions (before they are
                normalised), drawn anew per call. It breaks the grid-like artefacts of a fixed reference view.
            generator: source of that noise.
        """
        device, dtype = self.c2w.device, self.c2w.dtype
        x = torch.arange(self.width, device=device, dtype=dtype) + 0.5 - 0.5 * self.width
        y = torch.arange(self.height, device=device, dtype=dtype) + 0.5 - 0.5 * self.height
        rows, columns = torch.meshgrid(-y, x, indexing="ij")
        focal = self.focal()[:, None, None]
        local = torch.stack(
            [columns / focal, rows / focal, -torch.ones_like(columns).expand(len(self), -1, -1)], dim=-1
        )
        directions = torch.einsum("bij,bhwj->bhwi", self.c2w[:, :3, :3], local)
        origins = self.c2w[:, None, None, :3, 3].expand_as(directions)
        if noise_scale > 0:
            origins = origins + noise_scale * sample_normal((3,), generator).to(origins)
            directions = directions + noise_scale * sample_normal((3,), generator).to(directions)
        return origins, functional.normalize(directions, dim=-1)

    @staticmethod
    def cat(parts: Sequence["Cameras"]) -> "Cameras":
        """Join batches that share the image size; lights are kept when all parts have them."""
        first = parts[0]
        names = set.intersection(*(set(part._tensors()) for part in parts))
        joined: dict = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(first, **{"light_positions": None, **joined})

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def look_at(
    positions: Float[Tensor, "B 3"], centers: Float[Tensor, "B 3"], up: Float[Tensor, "B 3"]
) -> Float[Tensor, "B 4 4"]:
    """Return c2w matrices (OpenGL camera frame) of cameras at ``positions`` that look at ``centers``.

    A view along ``up`` (elevation 90 degrees) has no right of its own; it takes the +y axis there, as azimuth 0 does.
    """
    forward = functional.normalize(centers - positions, dim=-1)
    right = torch.linalg.cross(forward, up)
    vertical = right.norm(dim=-1, keepdim=True) < 1e-6
    right = functional.normalize(torch.where(vertical, _axis(1, right), right), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(right, forward), -forward], dim=-1)
    c2w = torch.eye(4, device=positions.device, dtype=positions.dtype).repeat(len(positions), 1, 1)
    c2w[:, :3, :3] = rotation
    c2w[:, :3, 3] = positions
    return c2w


def orbit_cameras(
    elevation: Angle,
    azimuth: Angle,
    distance: Angle,
    fovy: Angle,
    height: int,
    width: int,
    light_positions: Float[Tensor, "B 3"] | None = None,
) -> Cameras:
    """Return cameras on the sphere that look at the origin.

    Args:
        elevation, azimuth, fovy: degrees; floats, sequences or tensors of one length (floats broadcast).
        distance: world units.
        height, width: pixels.
        light_positions: point lights; the camera centres when absent (a headlight).
    """
    angles = [torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in (elevation, azimuth, distance, fovy)]
    device = next((angle.device for angle in angles if angle.device.type != "cpu"), angles[0].device)
    elevations, azimuths, distances, fovys = torch.broadcast_tensors(*(angle.to(device) for angle in angles))
    positions = spherical_positions(elevations, azimuths, distances)
    c2w = look_at(positions, torch.zeros_like(positions), _world_up(positions))
    lights = positions if light_positions is None else light_positions
    return Cameras(c2w, fovys, elevations, azimuths, distances, height, width, lights)


def spherical_positions(
    elevation: Float[Tensor, " B"], azimuth: Float[Tensor, " B"], distance: Float[Tensor, " B"]
) -> Float[Tensor, "B 3"]:
    """Return r (cos el cos az, cos el sin az, sin el) for angles in degrees."""
    el, az = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    unit = torch.stack([torch.cos(el) * torch.cos(az), torch.cos(el) * torch.sin(az), torch.sin(el)], dim=-1)
    return distance[:, None] * unit


def turntable(config: RandomCameraConfig, n: int, height: int, width: int) -> Cameras:
    """Return ``n`` evaluation cameras evenly around the object, starting at azimuth 0; the last is not the first again.

    Elevation, distance and field of view are the ``eval_*`` values of ``config``; the light sits at the camera.
    """
    azimuth = torch.arange(n, dtype=torch.float32) * (360.0 / n)
    return orbit_cameras(
        config.eval_elevation_deg, azimuth, config.eval_camera_distance, config.eval_fovy_deg, height, width
    )


class RandomCameraSampler:
    """Draws batches of cameras; size, count and ranges depend on the optimisation step alone."""

    def __init__(self, config: RandomCameraConfig) -> None:
        self.config = config

    def size_at(self, step: int) -> tuple[int, int, int]:
        """Return (height, width, batch_size) in force at ``step``."""
        heights, widths, batch_sizes = self.config.sizes()
        milestones = self.config.resolution_milestones if len(heights) > 1 else []
        stage = bisect.bisect_right(milestones, step)
        return heights[stage], widths[stage], batch_sizes[stage]

    def __call__(self, step: int, generator: torch.Generator) -> Cameras:
        """Draw the cameras of one step, on the device of ``generator``."""
        config = self.config
        height, width, n = self.size_at(step)
        elevation_range, azimuth_range = progressive_ranges(config, step)
        elevation = sample_elevations(n, elevation_range, generator)
        azimuth = sample_azimuths(n, azimuth_range, config.batch_uniform_azimuth, generator)
        distance = sample_uniform((n,), config.camera_distance_range, generator)
        fovy = sample_uniform((n,), config.fovy_range, generator)

        perturb = config.camera_perturb
        positions = spherical_positions(elevation, azimuth, distance)
        positions = positions + sample_uniform((n, 3), (-perturb, perturb), generator)
        centers = sample_normal((n, 3), generator) * config.center_perturb
        up = _world_up(positions) + sample_normal((n, 3), generator) * config.up_perturb
        lights = sample_lights(positions, config, generator)
        return Cameras(
            look_at(positions, centers, up), fovy, elevation, azimuth, distance, height, width, light_positions=lights
        )


def _world_up(positions: Float[Tensor, "B 3"]) -> Float[Tensor, "B 3"]:
    return _axis(2, positions).expand_as(positions)


def _axis(number: int, like: Tensor) -> Float[Tensor, " 3"]:
    """Return a unit vector; no number is copied to the device, for which the host would wait."""
    return (torch.arange(3, device=like.device) == number).to(like.dtype)
