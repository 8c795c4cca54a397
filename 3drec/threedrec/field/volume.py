"""The radiance field: density, albedo features and normals at any point of the box [-radius, radius]^3."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from threedrec.config_schema import ignored
from threedrec.errors import InputError
from threedrec.field.activations import activation
from threedrec.field.backend import use_triton
from threedrec.field.encoding import EncodingConfig, Pull, build_encoding
from threedrec.field.mlp import MLPConfig, VanillaMLP

NORMAL_TYPES = ("analytic", "finite_difference", "finite_difference_laplacian", "pred")

_MESHING = "the mesh is made as system.exporter says"


class FieldOutput(NamedTuple):
    """What lies at N points."""

    density: Float[Tensor, "N 1"]
    """Per world unit, non-negative."""
    features: Float[Tensor, "N C"]
    """Before the material's activation; the first three are the albedo."""
    normal: Float[Tensor, "N 3"] | None
    """Unit vectors that point out of the surface (down the density gradient)."""


class ImplicitVolume(nn.Module):
    """Hash encoding followed by two small MLPs, one for density and one for features (``geometry_type``).

    The MLP's density gets a bias before its activation that puts a blob at the origin, so that optimisation starts from
    something to carve: Magic3D's cone or DreamFusion's Gaussian. Outside the box the density is zero.
    """

    @dataclass
    class Config:
        """Keys of ``system.geometry``."""

        radius: float = 1.0
        """Half side of the box, world units."""
        n_input_dims: int = 3
        n_feature_dims: int = 3
        density_activation: str | None = "softplus"
        density_bias: float | str = "blob_magic3d"
        """"blob_magic3d", "blob_dreamfusion" or a number."""
        density_blob_scale: float = 10.0
        density_blob_std: float = 0.5
        pos_encoding_config: EncodingConfig = field(default_factory=EncodingConfig)
        mlp_network_config: MLPConfig = field(default_factory=MLPConfig)
        normal_type: str = "finite_difference"
        """"analytic", "finite_difference", "finite_difference_laplacian" (central) or "pred" (a third MLP)."""
        finite_difference_normal_eps: float = 0.01
        isosurface: bool = ignored(True, _MESHING)
        isosurface_method: str = ignored("mt", _MESHING)
        isosurface_resolution: int = ignored(128, _MESHING)
        isosurface_threshold: float | str = ignored(25.0, _MESHING, ("auto",))
        isosurface_chunk: int = ignored(0, _MESHING)
        isosurface_coarse_to_fine: bool = ignored(True, _MESHING)
        isosurface_deformable_grid: bool = ignored(False, _MESHING)
        isosurface_remove_outliers: bool = ignored(True, _MESHING)
        isosurface_outlier_n_faces_threshold: int | float = ignored(0.01, _MESHING)

        def __post_init__(self) -> None:
            if self.normal_type not in NORMAL_TYPES:
                raise InputError(
                    f"geometry.normal_type: unknown {self.normal_type!r}; use one of {', '.join(NORMAL_TYPES)}"
                )
            if isinstance(self.density_bias, str) and self.density_bias not in ("blob_magic3d", "blob_dreamfusion"):
                raise InputError(
                    f"geometry.density_bias: unknown {self.density_bias!r}; "
                    "use blob_magic3d, blob_dreamfusion or a number"
                )
            if self.n_input_dims != 3 or self.n_feature_dims < 3:
                raise InputError("geometry: needs n_input_dims = 3 and n_feature_dims >= 3")
            if min(self.radius, self.density_blob_std, self.finite_difference_normal_eps) <= 0:
                raise InputError(
                    "geometry: radius, density_blob_std and finite_difference_normal_eps must be above zero"
                )
            activation(self.density_activation, "geometry.density_activation")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoding = build_encoding(config.pos_encoding_config, "geometry.pos_encoding_config")
        width, mlp = self.encoding.n_output_dims, config.mlp_network_config
        self.density_network = VanillaMLP(width, 1, mlp, "geometry.mlp_network_config")
        self.feature_network = VanillaMLP(width, config.n_feature_dims, mlp, "geometry.mlp_network_config")
        self.normal_network = VanillaMLP(width, 3, mlp) if config.normal_type == "pred" else None
        self.density_activation = activation(config.density_activation)

    def forward(self, points: Float[Tensor, "N 3"], normals: bool = False) -> FieldOutput:
        """Return density, features and, on request, normals of world points.

        Normals carry gradients to the parameters whenever gradients are enabled, never to ``points``.
        """
        normal: Tensor | None = None
        if normals and self.config.normal_type == "analytic":
            encoded, pull = self.encoding.with_pull(self._unit(points))
            raw, normal = self._with_raw_and_normal(points, encoded, pull)
            density = self._activated(points, raw)
        else:
            encoded = self.encoding(self._unit(points))
            density = self._activated(points, self.density_network(encoded))
            if normals:
                normal = self._other_normal(points, encoded, density)
        return FieldOutput(density, self.feature_network(encoded), normal)

    def density(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 1"]:
        """Return the density of world points."""
        return self._activated(points, self.density_network(self.encoding(self._unit(points))))

    def features(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N C"]:
        """Return the features of world points, before the material's activation."""
        return self.feature_network(self.encoding(self._unit(points)))

    def normal(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Return unit normals of world points without evaluating the features."""
        if self.config.normal_type == "analytic":
            return self._with_raw_and_normal(points, *self.encoding.with_pull(self._unit(points)))[1]
        encoded = self.encoding(self._unit(points))
        return self._other_normal(points, encoded, self._activated(points, self.density_network(encoded)))

    def update(self, step: int) -> None:
        """Open the encoding levels that belong to an optimisation step."""
        self.encoding.update(step)

    def _unit(self, points: Tensor) -> Tensor:
        return points / (2.0 * self.config.radius) + 0.5

    def _inside(self, points: Tensor) -> Bool[Tensor, "N 1"]:
        return (points.abs() <= self.config.radius).all(dim=-1, keepdim=True)

    def _activated(self, points: Tensor, raw: Tensor) -> Tensor:
        config = self.config
        if config.density_activation == "softplus" and not points.requires_grad and self._has_kernels(points):
            from threedrec.field.density_kernel import density_triton

            blob = (config.density_bias, config.density_blob_scale, config.density_blob_std)
            return density_triton(raw, points, config.radius, *blob)
        return self.density_activation(raw + self._bias(points)) * self._inside(points)

    def _has_kernels(self, points: Tensor) -> bool:
        """Whether what lies around the lookup has kernels here, as the lookup itself has."""
        backend = self.config.pos_encoding_config.backend
        return use_triton(backend, points.device, None, "geometry.pos_encoding_config")

    def _bias(self, points: Tensor) -> Tensor | float:
        """Return the blob, (N, 1): Magic3D's s (1 - |x| / d) or DreamFusion's s exp(-|x|^2 / 2 d^2)."""
        bias, scale, std = self.config.density_bias, self.config.density_blob_scale, self.config.density_blob_std
        if bias == "blob_magic3d":
            return scale * (1.0 - points.norm(dim=-1, keepdim=True) / std)
        if bias == "blob_dreamfusion":
            return scale * torch.exp(-0.5 * points.square().sum(-1, keepdim=True) / std**2)
        return float(bias)

    def _bias_gradient(self, points: Tensor) -> Tensor:
        bias, scale, std = self.config.density_bias, self.config.density_blob_scale, self.config.density_blob_std
        if bias == "blob_magic3d":
            return -scale / std * functional.normalize(points, dim=-1)
        if bias == "blob_dreamfusion":
            return -points / std**2 * self._bias(points)
        return torch.zeros_like(points)

    def _with_raw_and_normal(self, points: Tensor, encoded: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
        """Return the MLP's density before bias and activation, and -grad density / |grad density|.

        The gradient before activation is J^T d(MLP)/d(encoding), plus the bias's; the activation is monotonic, so it
        scales the gradient and leaves its direction.
        """
        raw, outer = self.density_network.with_gradient(encoded)
        config, pulled, factor = self.config, pull(outer), 0.5 / self.config.radius
        if self._has_kernels(points):
            from threedrec.field.normal_kernel import normal_triton

            blob = (config.density_bias, config.density_blob_scale, config.density_blob_std)
            return raw, normal_triton(pulled, points.detach(), factor, *blob)
        gradient = pulled / (2.0 * config.radius)
        return raw, functional.normalize(-(gradient + self._bias_gradient(points)), dim=-1)

    def _other_normal(self, points: Tensor, encoded: Tensor, density: Tensor) -> Tensor:
        if self.normal_network is not None:
            return functional.normalize(self.normal_network(encoded), dim=-1)
        eps, radius = self.config.finite_difference_normal_eps, self.config.radius
        offsets = eps * torch.eye(3, device=points.device, dtype=points.dtype)

        def shifted(sign: float) -> Tensor:
            moved = (points[:, None] + sign * offsets).clamp(-radius, radius)
            return self.density(moved.reshape(-1, 3)).view(-1, 3)

        if self.config.normal_type == "finite_difference_laplacian":
            gradient = (shifted(1.0) - shifted(-1.0)) / (2.0 * eps)
        else:
            gradient = (shifted(1.0) - density) / eps
        return functional.normalize(-gradient, dim=-1)
