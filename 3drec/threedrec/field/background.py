"""What a ray sees behind the object: one colour, or a small learned map of directions."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threedrec.draws import host_generator
from threedrec.errors import InputError
from threedrec.field.activations import activation
from threedrec.field.encoding import EncodingConfig, build_encoding
from threedrec.field.mlp import MLPConfig, VanillaMLP


def _augmented(color: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Return ``color``, or with the given probability one random colour for all rays."""
    if torch.rand((), generator=host_generator(generator)).item() >= probability:
        return color
    device = color.device if generator is None else generator.device
    return torch.rand((1, color.shape[1]), generator=generator, device=device).to(color).expand_as(color)


class SolidBackground(nn.Module):
    """One colour for every direction (``background_type`` "solid-color-background")."""

    @dataclass
    class Config:
        """Keys of ``system.background``."""

        n_output_dims: int = 3
        color: tuple[float, float, float] = (1.0, 1.0, 1.0)
        """RGB in [0, 1]."""
        learned: bool = False
        random_aug: bool = False
        """In training, replace the colour by a random one with ``random_aug_prob``."""
        random_aug_prob: float = 0.5

        def __post_init__(self) -> None:
            if len(self.color) != self.n_output_dims:
                raise InputError(
                    f"background.color: needs n_output_dims = {self.n_output_dims} numbers, got {len(self.color)}"
                )

    color: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        color = torch.tensor(config.color)
        if config.learned:
            self.color = nn.Parameter(color)
        else:
            self.register_buffer("color", color)

    def forward(
        self, directions: Float[Tensor, "R 3"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "R 3"]:
        """Return the colour behind each ray."""
        color = self.color.to(directions.dtype).expand(len(directions), -1)
        if self.training and self.config.random_aug:
            return _augmented(color, self.config.random_aug_prob, generator)
        return color


class NeuralEnvironmentMap(nn.Module):
    """A learned map from direction to colour (``background_type`` "neural-environment-map-background")."""

    @dataclass
    class Config:
        """Keys of ``system.background``."""

        n_output_dims: int = 3
        color_activation: str = "sigmoid"
        dir_encoding_config: EncodingConfig = field(
            default_factory=lambda: EncodingConfig(otype="SphericalHarmonics", degree=3)
        )
        mlp_network_config: MLPConfig = field(default_factory=lambda: MLPConfig(n_neurons=16, n_hidden_layers=2))
        random_aug: bool = False
        random_aug_prob: float = 0.5
        eval_color: tuple[float, float, float] | None = None
        """Colour shown outside training, instead of the map."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoding = build_encoding(config.dir_encoding_config, "background.dir_encoding_config")
        self.network = VanillaMLP(
            self.encoding.n_output_dims,
            config.n_output_dims,
            config.mlp_network_config,
            "background.mlp_network_config",
        )
        self.activation = activation(config.color_activation, "background.color_activation")

    def forward(
        self, directions: Float[Tensor, "R 3"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "R 3"]:
        """Return the colour behind each ray; ``directions`` are unit vectors."""
        if not self.training and self.config.eval_color is not None:
            return torch.tensor(self.config.eval_color).to(directions).expand(len(directions), -1)
        color = self.activation(self.network(self.encoding(0.5 * directions + 0.5)))
        if self.training and self.config.random_aug:
            return _augmented(color, self.config.random_aug_prob, generator)
        return color
