"""What is optimised: field, material and background, seen through one renderer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threedrec import registry
from threedrec.cameras import Cameras
from threedrec.config_schema import SystemConfig
from threedrec.field import ImplicitVolume
from threedrec.rendering import VolumeRenderer

SURFACE_REACH = 0.01
"""World units; about one voxel of the meshing grid."""


class Scene(nn.Module):
    """Field, material, background and renderer of a config; parameters and buffers are called ``renderer.…``."""

    def __init__(self, config: SystemConfig, generator_seed: int = 0) -> None:
        """Build the parts that ``config`` names.

        Args:
            config: types and configs of the parts.
            generator_seed: seed of the initial weights; torch's global generator is left as it was.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            geometry = registry.find("geometry", config.geometry_type)(config.geometry)
            material = registry.find("material", config.material_type)(config.material)
            background = registry.find("background", config.background_type)(config.background)
        self.renderer: VolumeRenderer = registry.find("renderer", config.renderer_type)(
            config.renderer, geometry, material, background
        )

    @property
    def geometry(self) -> ImplicitVolume:
        """The field."""
        return self.renderer.geometry

    def density(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 1"]:
        """Density of world points."""
        return self.geometry.density(points)

    def surface_albedo(
        self, points: Float[Tensor, "N 3"], reach: float = SURFACE_REACH, samples: int = 6
    ) -> Float[Tensor, "N 3"]:
        """Colour that a look along the inward normal meets near surface points, in [0, 1].

        A field's surface is a soft layer, and only what rays gather across it has been fitted to images; the colour at
        one depth alone can be far off. So this composites ``samples`` points, from ``reach`` outside to twice that
        inside.
        """
        normal = self.geometry.normal(points)
        offsets = torch.linspace(reach, -2.0 * reach, samples, device=points.device)
        inside = (points[:, None] + offsets[:, None] * normal[:, None]).flatten(0, 1)
        found = self.geometry(inside)
        alpha = 1.0 - torch.exp(-found.density.view(-1, samples) * (3.0 * reach / (samples - 1)))
        through = torch.cumprod(1.0 - alpha + 1e-6, dim=1)
        weights = alpha * torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=1) + 1e-6
        weights = weights / weights.sum(dim=1, keepdim=True)
        colors = self.renderer.material.albedo(found.features)
        return (weights[..., None] * colors.view(-1, samples, 3)).sum(dim=1)

    def views(self, cameras: Cameras, normals: bool = True) -> dict[str, Float[Tensor, "B H W C"]]:
        """Render whole images without light: rgb, opacity, depth (and normal), see `VolumeRenderer.render_image`."""
        return self.renderer.render_image(cameras.to(self.device), shading="albedo", normals=normals)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device
