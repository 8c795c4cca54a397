"""What colour a point shows: its albedo, or that under one point light (DreamFusion, Poole et al. 2022, eq. 7)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from threedrec.draws import host_generator
from threedrec.errors import InputError
from threedrec.field.activations import activation
from threedrec.field.mlp import MLPConfig, VanillaMLP

SHADINGS = ("albedo", "diffuse", "textureless", "normal")


def check_shading(shading: str | None) -> None:
    """Raise InputError unless ``shading`` is one of ``SHADINGS`` or None."""
    if shading is not None and shading not in SHADINGS:
        raise InputError(f"shading: unknown {shading!r}; use one of {', '.join(SHADINGS)}")


class DiffusePointLight(nn.Module):
    """Lambertian surface, one point light, ambient light (``material_type`` "diffuse-with-point-light-material").

    color = albedo (max(0, n . l) diffuse + ambient). Before ``ambient_only_steps`` everything shows its plain albedo.
    """

    @dataclass
    class Config:
        """Keys of ``system.material``."""

        ambient_light_color: tuple[float, float, float] = (0.1, 0.1, 0.1)
        diffuse_light_color: tuple[float, float, float] = (0.9, 0.9, 0.9)
        ambient_only_steps: int = 1000
        diffuse_prob: float = 0.75
        """After those steps, probability that a training batch is lit at all."""
        textureless_prob: float = 0.5
        """Probability that a lit batch shows white albedo, which makes shape visible."""
        albedo_activation: str = "sigmoid"
        soft_shading: bool = False
        """Draw the share of ambient light of every training batch."""

    ambient: Tensor
    diffuse: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("ambient", torch.tensor(config.ambient_light_color), persistent=False)
        self.register_buffer("diffuse", torch.tensor(config.diffuse_light_color), persistent=False)
        self.activation = activation(config.albedo_activation, "material.albedo_activation")
        self.ambient_only = config.ambient_only_steps > 0

    def update(self, step: int) -> None:
        """Set the state that belongs to an optimisation step."""
        self.ambient_only = step < self.config.ambient_only_steps

    def albedo(self, features: Float[Tensor, "N C"]) -> Float[Tensor, "N 3"]:
        """Return the unlit colour in [0, 1]; what a texture is baked from."""
        return self.activation(features[:, :3]).clamp(0.0, 1.0)

    def choose(self, shading: str | None, generator: torch.Generator | None) -> str:
        """Return the shading of one batch: the one asked for, or in training a random one as configured."""
        check_shading(shading)
        if shading is not None:
            return shading
        if self.ambient_only:
            return "albedo"
        if not self.training:
            return "diffuse"
        lit, textureless = _draws(2, generator)
        if lit >= self.config.diffuse_prob:
            return "albedo"
        return "textureless" if textureless < self.config.textureless_prob else "diffuse"

    def requires_normal(self, shading: str, ambient_ratio: float | None) -> bool:
        """Return whether the colour depends on the normal."""
        return shading == "normal" or (shading in ("diffuse", "textureless") and ambient_ratio != 1.0)

    def forward(
        self,
        features: Float[Tensor, "N C"],
        points: Float[Tensor, "N 3"],
        normal: Float[Tensor, "N 3"] | None,
        light_positions: Float[Tensor, "N 3"] | None,
        shading: str,
        ambient_ratio: float | None = 1.0,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N 3"]:
        """Return the colours of points.

        Args:
            features: from the field, before activation.
            points, light_positions: world units.
            normal: unit vectors; needed where ``requires_normal`` says so.
            shading: "albedo", "diffuse", "textureless" or "normal" (0.5 n + 0.5).
            ambient_ratio: share of ambient light, the rest is diffuse; None takes the configured colours.
            generator: source of the drawn share when ``soft_shading`` is on.
        """
        if shading == "normal":
            return 0.5 * _needed(normal) + 0.5
        albedo = self.albedo(features)
        if shading == "albedo":
            return albedo
        light = self._light(points, normal, light_positions, ambient_ratio, generator)
        return light if shading == "textureless" else albedo * light

    def _light(
        self,
        points: Tensor,
        normal: Tensor | None,
        light_positions: Tensor | None,
        ambient_ratio: float | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        ambient, diffuse = self.ambient, self.diffuse
        if ambient_ratio is None and self.training and self.config.soft_shading:
            ambient_ratio = 1.0 - _draws(1, generator)[0]
        if ambient_ratio is not None:
            ambient = torch.full_like(ambient, ambient_ratio)
            diffuse = 1.0 - ambient
        if ambient_ratio == 1.0:
            return ambient.expand_as(points)
        towards = functional.normalize(_needed(light_positions) - points, dim=-1)
        return (_needed(normal) * towards).sum(-1, keepdim=True).clamp(min=0.0) * diffuse + ambient


class NoMaterial(nn.Module):
    """The features are the colour, or a small network turns them into it (``material_type`` "no-material")."""

    @dataclass
    class Config:
        """Keys of ``system.material``."""

        n_output_dims: int = 3
        color_activation: str = "sigmoid"
        input_feature_dims: int | None = None
        """With ``mlp_network_config``: the features pass through that network first."""
        mlp_network_config: MLPConfig | None = None
        requires_normal: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.activation = activation(config.color_activation, "material.color_activation")
        self.network: VanillaMLP | None = None
        if config.input_feature_dims is not None and config.mlp_network_config is not None:
            self.network = VanillaMLP(config.input_feature_dims, config.n_output_dims, config.mlp_network_config)

    def update(self, step: int) -> None:
        """Nothing here depends on the step."""

    def albedo(self, features: Float[Tensor, "N C"]) -> Float[Tensor, "N 3"]:
        """Return the colour in [0, 1]."""
        values = features[:, : self.config.n_output_dims] if self.network is None else self.network(features)
        return self.activation(values)[:, :3].clamp(0.0, 1.0)

    def choose(self, shading: str | None, generator: torch.Generator | None) -> str:
        """Return "normal" when asked for, else "albedo": there is no light here."""
        check_shading(shading)
        return "normal" if shading == "normal" else "albedo"

    def requires_normal(self, shading: str, ambient_ratio: float | None) -> bool:
        """Return whether normals are wanted."""
        return shading == "normal" or self.config.requires_normal

    def forward(
        self,
        features: Float[Tensor, "N C"],
        points: Float[Tensor, "N 3"],
        normal: Float[Tensor, "N 3"] | None,
        light_positions: Float[Tensor, "N 3"] | None,
        shading: str,
        ambient_ratio: float | None = 1.0,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N 3"]:
        """Return the colours of points; light and ambient share have no effect."""
        return 0.5 * _needed(normal) + 0.5 if shading == "normal" else self.albedo(features)


def _draws(count: int, generator: torch.Generator | None) -> list[float]:
    return torch.rand(count, generator=host_generator(generator)).tolist()


def _needed(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("this shading needs normals and light positions")
    return value
