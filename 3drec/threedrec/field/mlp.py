"""The small multilayer perceptron that turns encodings into densities, albedos and colours."""

import itertools
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from threedrec.errors import InputError
from threedrec.field.activations import activation


@dataclass
class MLPConfig:
    """Keys of ``mlp_network_config``."""

    otype: str = "VanillaMLP"
    activation: str = "ReLU"
    output_activation: str | None = "none"
    n_neurons: int = 64
    n_hidden_layers: int = 1


class VanillaMLP(nn.Module):
    """Linear layers without biases (as in instant-NGP), an activation after all but the last."""

    def __init__(self, dim_in: int, dim_out: int, config: MLPConfig, key: str = "mlp_network_config") -> None:
        super().__init__()
        if config.otype != "VanillaMLP":
            raise InputError(f"{key}.otype: unknown network {config.otype!r}; use VanillaMLP")
        if config.n_neurons < 1 or config.n_hidden_layers < 0:
            raise InputError(f"{key}: needs n_neurons >= 1 and n_hidden_layers >= 0")
        widths = [dim_in, *[config.n_neurons] * config.n_hidden_layers, dim_out]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=False) for before, after in itertools.pairwise(widths)
        )
        self.hidden = activation(config.activation, f"{key}.activation")
        self.output = activation(config.output_activation, f"{key}.output_activation")

    def forward(self, x: Float[Tensor, "N In"]) -> Float[Tensor, "N Out"]:
        """Return one row of outputs per row of inputs."""
        for layer in self.layers[:-1]:
            x = self.hidden(layer(x))
        return self.output(self.layers[-1](x))
