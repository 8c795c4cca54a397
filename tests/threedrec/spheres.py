"""An object made of coloured spheres, rendered exactly, and a guidance that knows it: stand-ins for tests."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from threedrec.cameras import Cameras
from threedrec.guidance.protocol import GuidanceOutput
from threedrec.registry import register
from threedrec.warm_start import WarmStartConfig

# centre, radius, colour: a red body, a green nose to the front (+x), a blue ear on +y, a yellow hat.
SPHERES = (
    ((0.0, 0.0, -0.05), 0.30, (0.85, 0.15, 0.10)),
    ((0.28, 0.0, 0.0), 0.12, (0.10, 0.70, 0.20)),
    ((0.0, 0.30, 0.08), 0.13, (0.10, 0.25, 0.85)),
    ((0.0, 0.0, 0.30), 0.14, (0.90, 0.75, 0.10)),
)


def render_spheres(cameras: Cameras, supersample: int = 2, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Return rgb over white (B, H, W, 3) and coverage (B, H, W, 1); ``mirrored`` swaps left and right of the object."""
    height, width = cameras.height, cameras.width
    rays_o, rays_d = cameras.resized(height * supersample, width * supersample).rays()
    nearest = torch.full(rays_o.shape[:-1], torch.inf, device=rays_o.device)
    rgb = torch.ones_like(rays_o)
    for centre, radius, colour in SPHERES:
        place = torch.tensor(centre, device=rays_o.device)
        if mirrored:
            place = place * torch.tensor([1.0, -1.0, 1.0], device=rays_o.device)
        offset = rays_o - place
        half = (offset * rays_d).sum(-1)
        root = half.square() - offset.square().sum(-1) + radius**2
        distance = -half - root.clamp(min=0).sqrt()
        hit = (root > 0) & (distance < nearest)
        nearest = torch.where(hit, distance, nearest)
        rgb = torch.where(hit[..., None], torch.tensor(colour, device=rays_o.device), rgb)
    stacked = torch.cat([rgb, nearest.isfinite()[..., None].float()], dim=-1).permute(0, 3, 1, 2)
    small = torch.nn.functional.avg_pool2d(stacked, supersample).permute(0, 2, 3, 1)
    return small[..., :3], small[..., 3:]


@register("guidance", "spheres-guidance")
class SphereGuidance:
    """Pulls every view towards the true one; samples the true views, some of them corrupted on request."""

    @dataclass
    class Config:
        warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
        wrong_views: int = 0
        noise: float = 0.0
        size: int = 32

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.description = "true views of four spheres"

    def prepare(self, support) -> None:
        self.support = support

    def __call__(self, rgb: Tensor, cameras: Cameras, step: int, generator: torch.Generator) -> GuidanceOutput:
        target = self.preview(rgb, cameras, step, generator)
        return GuidanceOutput((rgb - target).square().mean() * 1000.0, {"timestep": 500.0})

    def preview(self, rgb: Tensor, cameras: Cameras, step: int, generator: torch.Generator) -> Tensor:
        return render_spheres(cameras.resized(*rgb.shape[1:3]))[0]

    def sample_views(
        self,
        cameras: Cameras,
        generator: torch.Generator,
        num_inference_steps: int,
        guidance_scale: float,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        cameras = cameras.resized(self.config.size, self.config.size)
        rgb, _ = render_spheres(cameras)
        wrong, _ = render_spheres(cameras, mirrored=True)
        which = torch.randperm(len(cameras), generator=generator, device=rgb.device)[: self.config.wrong_views]
        rgb[which] = wrong[which].flip(-1)  # the wrong way round, and in other colours
        noise = torch.randn(rgb.shape, generator=generator, device=rgb.device)
        return (rgb + self.config.noise * noise).clamp(0, 1)
