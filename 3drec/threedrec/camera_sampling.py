"""The random part of random cameras: their configuration, and draws of angles and lights.

Distributions follow threestudio's random camera data: elevations are uniform in angle for half of the batches and
uniform on the sphere for the other half; lights follow DreamFusion (Poole et al. 2022, section 3.1) or Magic3D (Lin et
al. 2022, appendix). Everything is drawn from an explicit ``torch.Generator``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from threedrec.config_schema import limited
from threedrec.draws import host_generator
from threedrec.errors import InputError

LIGHT_STRATEGIES = ("dreamfusion", "magic3d", "headlight")


@dataclass
class RandomCameraConfig:
    """Cameras for random and evaluation views (``data.random_camera``). Angles in degrees, lengths in world units."""

    height: int | list[int] = 64
    """Pixels; a list gives one value per stage between ``resolution_milestones``. So do ``width``, ``batch_size``."""
    width: int | list[int] = 64
    batch_size: int | list[int] = 1
    resolution_milestones: list[int] = field(default_factory=list)
    """Steps at which the next height, width and batch size come into force."""
    eval_height: int = limited(512, ge=16)
    eval_width: int = limited(512, ge=16)
    eval_batch_size: int = limited(1, ge=1)
    n_val_views: int = limited(1, ge=1)
    n_test_views: int = limited(120, ge=1)
    elevation_range: tuple[float, float] = (-10.0, 90.0)
    azimuth_range: tuple[float, float] = (-180.0, 180.0)
    camera_distance_range: tuple[float, float] = (1.0, 1.5)
    fovy_range: tuple[float, float] = (40.0, 70.0)
    camera_perturb: float = 0.1
    """Half width of a uniform offset of the camera centre, per axis."""
    center_perturb: float = 0.2
    """Standard deviation of the point looked at, per axis."""
    up_perturb: float = 0.02
    """Standard deviation of the up vector, per axis."""
    light_position_perturb: float = 1.0
    """Strategy "dreamfusion": standard deviation, per axis, of the light direction about the camera."""
    light_distance_range: tuple[float, float] = (0.8, 1.5)
    eval_elevation_deg: float = 15.0
    eval_camera_distance: float = 1.5
    eval_fovy_deg: float = limited(70.0, gt=0, lt=180)
    light_sample_strategy: str = "dreamfusion"
    """"dreamfusion" (near the camera), "magic3d" (within 60 degrees of it) or "headlight" (its direction exactly)."""
    batch_uniform_azimuth: bool = True
    """Spread each batch over the azimuth range (stratified) instead of drawing independently."""
    progressive_until: int = 0
    """Step at which the elevation and azimuth ranges have grown from the evaluation view to their full extent."""

    def __post_init__(self) -> None:
        heights, widths, batch_sizes = self.sizes()
        counts = {len(heights), len(widths), len(batch_sizes)}
        if len(counts) > 1:
            raise InputError(
                "random_camera: height, width and batch_size must have one length, "
                f"got {len(heights)}, {len(widths)} and {len(batch_sizes)}; give each as many values as the others"
            )
        if len(heights) > 1 and len(heights) != len(self.resolution_milestones) + 1:
            raise InputError(
                f"random_camera.resolution_milestones: {len(heights)} stages need {len(heights) - 1} milestones, "
                f"got {len(self.resolution_milestones)}"
            )
        if list(self.resolution_milestones) != sorted(self.resolution_milestones):
            raise InputError("random_camera.resolution_milestones: steps must not decrease; sort them")
        if min(heights + widths + batch_sizes) < 1:
            raise InputError("random_camera: heights, widths and batch sizes must be at least 1")
        if self.light_sample_strategy not in LIGHT_STRATEGIES:
            raise InputError(
                f"random_camera.light_sample_strategy: unknown {self.light_sample_strategy!r}; "
                f"use one of {', '.join(LIGHT_STRATEGIES)}"
            )
        self._check_ranges()

    def sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Return heights, widths and batch sizes per stage, as lists; a single number stands for all stages."""
        sizes = [_as_list(value) for value in (self.height, self.width, self.batch_size)]
        stages = max(len(size) for size in sizes)
        heights, widths, batch_sizes = (size * stages if len(size) == 1 else size for size in sizes)
        return heights, widths, batch_sizes

    def _check_ranges(self) -> None:
        limits = {
            "elevation_range": (-90.0, 90.0),
            "azimuth_range": (-720.0, 720.0),
            "camera_distance_range": (1e-3, 1e6),
            "fovy_range": (1e-3, 179.0),
            "light_distance_range": (0.0, 1e6),
        }
        for name, (low, high) in limits.items():
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                raise InputError(
                    f"random_camera.{name}: needs {low:g} <= first <= second <= {high:g}, got [{first:g}, {last:g}]"
                )


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def sample_uniform(
    shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator | None
) -> Float[Tensor, "..."]:
    """Draw uniformly from [low, high) on the generator's device."""
    device = "cpu" if generator is None else generator.device
    low, high = bounds
    return torch.rand(shape, generator=generator, device=device) * (high - low) + low


def sample_normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Float[Tensor, "..."]:
    """Draw standard normal values on the generator's device."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device)


def progressive_ranges(config: RandomCameraConfig, step: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (elevation range, azimuth range) at ``step``.

    Both grow linearly from the evaluation view (``eval_elevation_deg``, azimuth 0) and are full from step
    ``progressive_until + 1`` on, so that even without progression step 0 looks from the evaluation view.
    """
    ratio = min(1.0, step / (config.progressive_until + 1))

    def blend(start: float, bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = bounds
        return (1 - ratio) * start + ratio * low, (1 - ratio) * start + ratio * high

    return blend(config.eval_elevation_deg, config.elevation_range), blend(0.0, config.azimuth_range)


def sample_elevations(n: int, bounds: tuple[float, float], generator: torch.Generator) -> Float[Tensor, " n"]:
    """Draw ``n`` elevations in degrees; one coin per batch picks between two laws.

    Half of the batches are uniform in angle (more views near the poles). The other half draw the sine of the
    elevation, between the values that (el + 90) / 180 gives the bounds: exactly uniform on the sphere for the full
    range, and the released behaviour for partial ones.
    """
    coin = torch.rand((), generator=host_generator(generator))
    if coin.item() < 0.5:
        return sample_uniform((n,), bounds, generator)
    low, high = ((bound + 90.0) / 180.0 for bound in bounds)
    sine = 2.0 * sample_uniform((n,), (low, high), generator) - 1.0
    return torch.rad2deg(torch.asin(sine.clamp(-1.0, 1.0)))


def sample_azimuths(
    n: int, bounds: tuple[float, float], stratified: bool, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """Draw ``n`` azimuths in degrees; ``stratified`` puts one into each of ``n`` equal parts of the range."""
    fraction = sample_uniform((n,), (0.0, 1.0), generator)
    if stratified:
        fraction = (fraction + torch.arange(n, device=fraction.device)) / n
    low, high = bounds
    return fraction * (high - low) + low


def sample_lights(
    positions: Float[Tensor, "B 3"], config: RandomCameraConfig, generator: torch.Generator
) -> Float[Tensor, "B 3"]:
    """Draw one point light per camera, at ``light_distance_range`` from the origin, by ``light_sample_strategy``."""
    n = len(positions)
    distance = sample_uniform((n, 1), config.light_distance_range, generator)
    if config.light_sample_strategy == "headlight":
        return functional.normalize(positions, dim=-1) * distance
    if config.light_sample_strategy == "dreamfusion":
        noise = sample_normal((n, 3), generator) * config.light_position_perturb
        return functional.normalize(positions + noise, dim=-1) * distance

    # Magic3D: a cap of 60 degrees about the camera direction, in a frame whose z axis is that direction.
    z_axis = functional.normalize(positions, dim=-1)
    x_axis = functional.normalize(
        torch.stack([z_axis[:, 1], -z_axis[:, 0], torch.zeros_like(z_axis[:, 0])], -1), dim=-1
    )
    y_axis = torch.linalg.cross(z_axis, x_axis)
    azimuth = sample_uniform((n,), (-torch.pi, torch.pi), generator)
    elevation = sample_uniform((n,), (torch.pi / 6, torch.pi / 2), generator)
    local = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1)
    return torch.einsum("bij,bj->bi", torch.stack([x_axis, y_axis, z_axis], dim=-1), local) * distance
