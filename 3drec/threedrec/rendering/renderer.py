"""From rays to images: march, drop what cannot be seen, ask the field, shade, composite."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from threedrec.cameras import Cameras
from threedrec.config_schema import ignored, limited
from threedrec.draws import host_generator
from threedrec.errors import InputError
from threedrec.field.backend import check_backend, use_triton
from threedrec.field.background import NeuralEnvironmentMap, SolidBackground
from threedrec.field.encoding import CHANNELS, HashGrid
from threedrec.field.volume import FieldOutput, ImplicitVolume
from threedrec.rendering.compositing import composite, visible
from threedrec.rendering.marching import Intervals, march
from threedrec.rendering.occupancy import OccupancyGrid, step_length
from threedrec.rendering.recompute import PointFunction, in_parts
from threedrec.rendering.shading import DiffusePointLight, NoMaterial

PERTURBATION = 1e-2
"""Standard deviation, world units, of the neighbours whose normals 3D smoothness compares."""
CUDA_CHUNK = 2**17
"""Points whose graph a GPU holds at a time in plain PyTorch: about 2 GB in their backward pass, with the released hash
grid."""
TRITON_CHUNK = {True: 3 * 2**20, False: 3 * 2**19}
"""The same where the lookup has Triton kernels, on a GPU with memory to spare: about 4 GB in their backward pass, with
normals; if the networks have kernels too, and if they are plain PyTorch."""
TRITON_BYTES = {True: 1400, False: 2800}
"""Of a point's graph and of what its backward pass adds, with normals and two layers of 64 neurons, for both cases."""
OPAQUE = 0.99
"""From there on a ray of a picture needs no second look."""
KEPT_SHARE = 32
"""The lookups of parts whose graph is not held are kept, up to this part of a GPU's memory."""
MIN_TRANSMITTANCE = 1e-4
"""Share of the light that must reach a sample for it to be seen."""
LOOKUP_CHUNK = 2**20
"""Points per call on a GPU where nothing is kept for a backward pass, with Triton kernels: about 1 GB."""
LOOKUP_AT_ONCE = 4
"""So many times as many go into one call if there are no more, and if each GB is at most a 32nd of the GPU's memory:
few points are done before the host has launched their kernels."""


class Samples(NamedTuple):
    """The N samples behind one render, packed by ray."""

    weights: Float[Tensor, "N 1"]
    density: Float[Tensor, "N 1"]
    points: Float[Tensor, "N 3"]
    dirs: Float[Tensor, "N 3"]
    normal: Float[Tensor, "N 3"] | None
    normal_perturbed: Float[Tensor, "M 3"] | None
    """Normals of random neighbours of some samples, when ``return_normal_perturb`` is on (training only)."""
    perturbed: slice
    """Which samples these are neighbours of."""
    ray_indices: Int[Tensor, " N"]
    distances: Float[Tensor, "N 1"]
    """Of the points from the camera, world units."""
    lengths: Float[Tensor, "N 1"]


class RenderOutput(NamedTuple):
    """What R rays see."""

    rgb: Float[Tensor, "R 3"]
    """Over the background."""
    background: Float[Tensor, "R 3"]
    opacity: Float[Tensor, "R 1"]
    depth: Float[Tensor, "R 1"]
    """sum w t along the ray, as released: the distance times the opacity."""
    normal: Float[Tensor, "R 3"] | None
    """World, unit length, or 0 where nothing is seen."""
    samples: Samples

    @property
    def normal_image(self) -> Float[Tensor, "R 3"]:
        """Normals as colours, (n + 1) / 2 times the opacity; the form that 2D smoothness and pictures use."""
        if self.normal is None:
            raise ValueError("rendered without normals")
        return 0.5 * (self.normal + 1.0) * self.opacity


class VolumeRenderer(nn.Module):
    """Renders a field by packed ray marching behind an occupancy grid (``renderer_type`` "nerf-volume-renderer")."""

    @dataclass
    class Config:
        """Keys of ``system.renderer``."""

        radius: float = 1.0
        num_samples_per_ray: int = 512
        """Steps along the diagonal of the box."""
        eval_num_samples_per_ray: int = 0
        """The same for a second look, in pictures, along rays that are not opaque at the first; 0 for none. Training
        moves samples at random; in a picture they lie in planes, and what is thinner than a step breaks into pieces."""
        eval_chunk_size: int = 160000
        """Points per call of the networks where no gradient flows; at least `LOOKUP_CHUNK` with Triton kernels."""
        train_chunk_size: int = 0
        """Points per call of the networks in training; beyond it they are computed again for the backward pass, so
        that memory hardly grows with the number of samples. 0: no limit on the CPU; on a GPU `CUDA_CHUNK` in plain
        PyTorch, and with Triton kernels what a sixteenth of the GPU's memory holds, at most `TRITON_CHUNK`."""
        randomized: bool = True
        """In training, move each ray's samples at random by up to a step."""
        near_plane: float = 0.0
        far_plane: float = 1e10
        return_comp_normal: bool = ignored(False, "normals are rendered whenever a loss asks for them", (True,))
        return_normal_perturb: bool = False
        normal_perturb_stride: int = 1
        """One sample in so many has a neighbour, from a random first one on: the same loss in expectation."""
        estimator: str = "occgrid"
        grid_prune: bool = True
        prune_alpha_threshold: bool = True
        """Drop samples of opacity under 0.01 (under the grid's mean, when that is lower) before asking for colours."""
        occupancy_resolution: int = 128
        occupancy_interval: int = 16
        """Steps between updates of the grid."""
        occupancy_threshold: float = 0.01
        occupancy_decay: float = limited(0.95, ge=0, le=1)
        occupancy_warmup_steps: int = 256
        backend: Literal["auto", "triton", "torch"] = "auto"
        """Of marching and compositing: "triton" (kernels for CUDA), "torch", or "auto": Triton on CUDA where it is
        installed, else PyTorch."""

        def __post_init__(self) -> None:
            check_backend(self.backend, "renderer")
            if self.estimator != "occgrid":
                raise InputError(f"renderer.estimator: unknown {self.estimator!r}; use occgrid")
            counts = ("num_samples_per_ray", "eval_chunk_size", "occupancy_resolution", "occupancy_interval")
            for name in (*counts, "normal_perturb_stride"):
                if getattr(self, name) < 1:
                    raise InputError(f"renderer.{name}: must be at least 1, got {getattr(self, name)}")
            for name in ("train_chunk_size", "eval_num_samples_per_ray"):
                if getattr(self, name) < 0:
                    raise InputError(f"renderer.{name}: must be 0 or more, got {getattr(self, name)}")
            if self.radius <= 0:
                raise InputError(f"renderer.radius: must be above zero, got {self.radius}")

    def __init__(
        self,
        config: Config,
        geometry: ImplicitVolume,
        material: DiffusePointLight | NoMaterial,
        background: SolidBackground | NeuralEnvironmentMap,
    ) -> None:
        super().__init__()
        self.config = config
        self.geometry, self.material, self.background = geometry, material, background
        self.step_size = step_length(config.radius, config.num_samples_per_ray)
        self.grid = OccupancyGrid(
            config.occupancy_resolution,
            config.radius,
            config.occupancy_threshold,
            config.occupancy_decay,
            config.occupancy_warmup_steps,
            config.eval_chunk_size,
        )

    def update(self, step: int, generator: torch.Generator | None = None) -> None:
        """Bring field levels, material and (every ``occupancy_interval`` steps) the occupancy grid to ``step``."""
        self.geometry.update(step)
        self.material.update(step)
        if self.config.grid_prune and step % self.config.occupancy_interval == 0:
            self.grid.chunk = self._lookup_chunk(self.grid.opacity.device)
            self.grid.update(step, self.geometry.density, self.step_size, generator)

    def refresh(self, generator: torch.Generator | None = None) -> None:
        """Rebuild the occupancy grid from the field as it is now; call once before evaluating a finished field."""
        if self.config.grid_prune:
            self.grid.chunk = self._lookup_chunk(self.grid.opacity.device)
            self.grid.refresh(self.geometry.density, self.step_size, generator)

    def forward(
        self,
        rays_o: Float[Tensor, "R 3"],
        rays_d: Float[Tensor, "R 3"],
        *,
        light_positions: Float[Tensor, "R 3"] | None = None,
        ambient_ratio: float | None = 1.0,
        shading: str | None = None,
        generator: torch.Generator | None = None,
        normals: bool = False,
        bg_color: Float[Tensor, "R 3"] | None = None,
        intervals: Intervals | None = None,
        step_size: float | None = None,
    ) -> RenderOutput:
        """Render rays.

        Args:
            rays_o, rays_d: world origins and unit directions.
            light_positions: one point light per ray, world units; needed for lit shadings.
            ambient_ratio: share of ambient light; None takes the material's colours.
            shading: "albedo", "diffuse", "textureless", "normal", or None for the material's own choice.
            generator: source of sample positions, shading and background draws.
            normals: also return normals.
            bg_color: overrides the background.
            intervals: what :meth:`sample` has found for these rays, if it was asked before.
            step_size: length of a step, world units, instead of the configured one.
        """
        shading = self.material.choose(shading, generator)
        wanted = normals or self.material.requires_normal(shading, ambient_ratio)
        if intervals is None:
            intervals = self.sample(rays_o, rays_d, generator, step_size)
        rays = intervals.ray_indices
        dirs, distances = rays_d[rays], intervals.middles[:, None]
        points = rays_o[rays] + distances * dirs

        field = self._field(points, wanted)
        lights = None if light_positions is None else light_positions[rays]
        colors = self.material(field.features, points, field.normal, lights, shading, ambient_ratio, generator)
        background = self.background(rays_d, generator) if bg_color is None else bg_color
        perturbed, some = None, slice(None)
        if field.normal is not None and self.training and self.config.return_normal_perturb:
            some = self._some(generator)
            perturbed = self._normal(points[some] + PERTURBATION * _normal_like(points[some], generator))
        weights, sums = self._sums(field, intervals, distances, colors, len(rays_o), step_size)
        samples = Samples(
            weights[:, None],
            field.density,
            points,
            dirs,
            field.normal,
            perturbed,
            some,
            rays,
            distances,
            intervals.lengths[:, None],
        )
        return _over(background, sums, samples)

    @torch.no_grad()
    def sample(
        self,
        rays_o: Float[Tensor, "R 3"],
        rays_d: Float[Tensor, "R 3"],
        generator: torch.Generator | None = None,
        step_size: float | None = None,
    ) -> Intervals:
        """Return the samples that can be seen: in occupied cells, not clear, and reached by at least 1e-4 of the light.

        This asks the field for densities without gradient first; a third of the full cost at most, and what it removes
        (most of what lies behind the first surface) then needs no colour, no normal and no backward pass.
        """
        config, step = self.config, step_size or self.step_size
        jitter = None
        if self.training and config.randomized:
            device = rays_o.device if generator is None else generator.device
            jitter = torch.rand(len(rays_o), generator=generator, device=device).to(rays_o)
        min_opacity = 0.0
        if config.prune_alpha_threshold and config.grid_prune:
            # Of the grid's steps; a shorter one is as opaque in proportion.
            min_opacity = min(config.occupancy_threshold, self.grid.mean_opacity) * step / self.step_size
        limits = (step, config.near_plane, config.far_plane)
        if self._packs(rays_o.device):
            from threedrec.rendering.packed_triton import march_packed, visible_packed

            starts, points, offsets = march_packed(rays_o, rays_d, self.grid, *limits, jitter, config.grid_prune)
            return visible_packed(self._densities(points), starts, offsets, step, MIN_TRANSMITTANCE, min_opacity)
        intervals = march(rays_o, rays_d, self.grid, *limits, jitter, config.grid_prune)
        points = rays_o[intervals.ray_indices] + intervals.middles[:, None] * rays_d[intervals.ray_indices]
        density = self._densities(points)
        keep = visible(density, intervals.lengths, intervals.ray_indices, MIN_TRANSMITTANCE, min_opacity)
        return intervals.select(keep.nonzero()[:, 0])

    @torch.no_grad()
    def render_image(
        self,
        cameras: Cameras,
        chunk_rays: int | None = None,
        *,
        shading: str | None = None,
        ambient_ratio: float | None = 1.0,
        normals: bool = True,
    ) -> dict[str, Float[Tensor, "B H W C"]]:
        """Render whole images chunk by chunk, without gradient or randomness.

        Args:
            cameras: B views; their lights are used by lit shadings.
            chunk_rays: rays at a time; by default as many as keep the tables of one chunk near 100 MB on the CPU and
                below 2 GB on CUDA, where small chunks leave the device waiting for the next kernel.
            shading, ambient_ratio: as in ``forward``.
            normals: also return "normal".

        Returns:
            "rgb", "opacity", "depth" and "normal" (world, unit or 0), each (B, H, W, C).
        """
        if chunk_rays is None:
            samples = 2**26 if next(self.parameters()).is_cuda else 2**21
            config = self.config
            chunk_rays = max(1024, samples // max(config.num_samples_per_ray, config.eval_num_samples_per_ray))
        was_training = self.training
        self.eval()
        try:
            frames = [
                self._render_frame(cameras[index], chunk_rays, shading, ambient_ratio, normals)
                for index in range(len(cameras))
            ]
        finally:
            self.train(was_training)
        shape = (len(cameras), cameras.height, cameras.width, -1)
        return {name: torch.cat([frame[name] for frame in frames]).view(shape) for name in frames[0]}

    def _render_frame(
        self, camera: Cameras, chunk_rays: int, shading: str | None, ambient_ratio: float | None, normals: bool
    ) -> dict[str, Tensor]:
        rays_o, rays_d = (rays.reshape(-1, 3) for rays in camera.rays())
        lights = camera.light_positions
        names = ("rgb", "opacity", "depth", *(["normal"] if normals else []))

        def look(origins: Tensor, directions: Tensor, step_size: float | None = None) -> dict[str, Tensor]:
            output = self(
                origins,
                directions,
                light_positions=None if lights is None else lights.expand_as(origins),
                ambient_ratio=ambient_ratio,
                shading=shading,
                normals=normals,
                step_size=step_size,
            )
            return {name: getattr(output, name) for name in names}

        parts, config = [], self.config
        finer = step_length(config.radius, max(config.num_samples_per_ray, config.eval_num_samples_per_ray))
        for origins, directions in zip(rays_o.split(chunk_rays), rays_d.split(chunk_rays), strict=True):
            part = look(origins, directions)
            if finer < self.step_size:
                again = (part["opacity"][:, 0] < OPAQUE).nonzero()[:, 0]
                for name, values in look(origins[again], directions[again], finer).items():
                    part[name][again] = values
            parts.append(part)
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _packs(self, device: torch.device) -> bool:
        return use_triton(self.config.backend, device, None, "renderer")

    def _densities(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        size = self._lookup_chunk(points.device, len(points))
        parts = [self.geometry.density(part)[:, 0] for part in points.split(size)]
        return torch.cat(parts)

    def _sums(
        self,
        field: FieldOutput,
        intervals: Intervals,
        distances: Tensor,
        colors: Tensor,
        n_rays: int,
        step_size: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Weights of the samples, and what `composite` sums along the rays."""
        values, rays = (distances, colors, field.normal), intervals.ray_indices
        if self._packs(colors.device):
            from threedrec.rendering.packed_triton import composite_packed

            return composite_packed(field.density, step_size or self.step_size, *values, rays, n_rays)
        return composite(field.density, intervals.lengths, *values, rays, n_rays)

    def _field(self, points: Float[Tensor, "N 3"], normals: bool) -> FieldOutput:
        if normals:
            return FieldOutput(*self._in_parts(lambda part: tuple(self.geometry(part, True)), points))
        density, features = self._in_parts(lambda part: tuple(self.geometry(part)[:2]), points)
        return FieldOutput(density, features, None)

    def _normal(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return self._in_parts(lambda part: (self.geometry.normal(part),), points)[0]

    def _some(self, generator: torch.Generator | None) -> slice:
        """Return the samples whose neighbours are looked at."""
        stride = self.config.normal_perturb_stride
        return slice(int(torch.randint(stride, (), generator=host_generator(generator))), None, stride)

    def _in_parts(self, function: PointFunction, points: Float[Tensor, "N 3"]) -> tuple[Tensor, ...]:
        kept = 0
        if torch.is_grad_enabled():
            size = self.config.train_chunk_size or self._train_chunk(points)
            if points.is_cuda:
                kept = torch.cuda.get_device_properties(points.device).total_memory // KEPT_SHARE
        else:
            size = self._lookup_chunk(points.device, len(points))
        return in_parts(function, points, size, self.geometry.parameters(), kept)

    def _train_chunk(self, points: Float[Tensor, "N 3"]) -> int:
        """Points whose graph is held at a time where the config leaves it open."""
        if not points.is_cuda:
            return len(points)
        if not self._has_kernels(points.device):
            return CUDA_CHUNK
        fused = self.geometry.density_network.fused(points) and self.geometry.feature_network.fused(points)
        memory = torch.cuda.get_device_properties(points.device).total_memory
        return min(TRITON_CHUNK[fused], memory // (16 * TRITON_BYTES[fused]))

    def _lookup_chunk(self, device: torch.device, count: int | None = None) -> int:
        """Points per call where nothing is kept for a backward pass, of so many in all if that is known."""
        size = self.config.eval_chunk_size
        if not self._has_kernels(device):
            return size
        size = max(size, LOOKUP_CHUNK)
        memory = torch.cuda.get_device_properties(device).total_memory
        most = LOOKUP_CHUNK * min(LOOKUP_AT_ONCE, memory // (32 * 10**9))
        return count if count is not None and size < count <= most else size

    def _has_kernels(self, device: torch.device) -> bool:
        """Whether the field's encoding, which takes most of the memory in plain PyTorch, works by Triton kernels."""
        encoding = getattr(self.geometry, "encoding", None)
        if device.type != "cuda" or not isinstance(encoding, HashGrid):
            return False
        config = encoding.config
        return config.n_features_per_level in CHANNELS and use_triton(config.backend, device, None, encoding.key)


def _over(background: Float[Tensor, "R 3"], sums: Float[Tensor, "R 8"], samples: Samples) -> RenderOutput:
    """Put the light that the samples leave onto the background."""
    opacity, depth, rgb = sums[:, :1], sums[:, 1:2], sums[:, 2:5]
    normal = functional.normalize(sums[:, 5:8], dim=-1) if samples.normal is not None else None
    return RenderOutput(rgb + background * (1.0 - opacity), background, opacity, depth, normal, samples)


def _normal_like(points: Tensor, generator: torch.Generator | None) -> Tensor:
    device = points.device if generator is None else generator.device
    return torch.randn(points.shape, generator=generator, device=device).to(points)
