"""The small multilayer perceptron that turns encodings into densities, albedos and colours."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from threedrec.errors import InputError
from threedrec.field.activations import activation, identity
from threedrec.field.backend import check_backend, use_triton


@dataclass
class MLPConfig:
    """Keys of ``mlp_network_config``."""

    otype: str = "VanillaMLP"
    activation: str = "ReLU"
    output_activation: str | None = "none"
    n_neurons: int = 64
    n_hidden_layers: int = 1
    backend: Literal["auto", "triton", "torch"] = "auto"
    """"triton" (one kernel for all layers, on CUDA), "torch", or "auto": Triton on CUDA where it fits, else PyTorch."""
    precision: Literal["float32", "tf32", "float16"] = "tf32"
    """Of the factors in Triton's matrix products; weights and sums are float32. float16 has as many digits as tf32 and
    is faster, but ends at 65504. Meshes made with tf32 are no worse than with float32 (docs/performance.md)."""


KERNEL_WIDTHS = (16, 32, 64)
"""Inputs and hidden neurons that the Triton kernels can hold."""
KERNEL_OUTPUTS = 16
PRECISIONS = ("float32", "tf32", "float16")


class VanillaMLP(nn.Module):
    """Linear layers without biases (as in instant-NGP), an activation after all but the last."""

    def __init__(self, dim_in: int, dim_out: int, config: MLPConfig, key: str = "mlp_network_config") -> None:
        super().__init__()
        if config.otype != "VanillaMLP":
            raise InputError(f"{key}.otype: unknown network {config.otype!r}; use VanillaMLP")
        if config.n_neurons < 1 or config.n_hidden_layers < 0:
            raise InputError(f"{key}: needs n_neurons >= 1 and n_hidden_layers >= 0")
        check_backend(config.backend, key)
        if config.precision not in PRECISIONS:
            raise InputError(f"{key}.precision: unknown {config.precision!r}; use one of {', '.join(PRECISIONS)}")
        self.backend, self.precision, self.key = config.backend, config.precision, key
        widths = [dim_in, *[config.n_neurons] * config.n_hidden_layers, dim_out]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=False) for before, after in itertools.pairwise(widths)
        )
        self.hidden = activation(config.activation, f"{key}.activation")
        self.output = activation(config.output_activation, f"{key}.output_activation")

    def forward(self, x: Float[Tensor, "N In"]) -> Float[Tensor, "N Out"]:
        """Return one row of outputs per row of inputs."""
        if self.fused(x):
            from threedrec.field.mlp_triton import network_triton

            return network_triton(x, self.weights, self.precision)
        for layer in self.layers[:-1]:
            x = self.hidden(layer(x))
        return self.output(self.layers[-1](x))

    def with_gradient(self, x: Float[Tensor, "N In"]) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N In"]]:
        """Return the output of a network with one output, and its derivative along the inputs.

        Both are differentiable in ``x`` and the weights as far as gradients are enabled. For ReLU the derivative is
        written out: PyTorch's second derivative of the same network keeps and fills several times the memory.
        """
        if not self.rectified:
            return self._with_autograd(x)
        if self.fused(x):
            from threedrec.field.mlp_triton import network_with_gradient

            return network_with_gradient(x, self.weights, self.precision)
        *hidden, last = self.weights
        masks = []
        for weight in hidden:
            x = functional.relu(functional.linear(x, weight))
            masks.append(x.detach() > 0)
        slope = last if masks else last.expand(len(x), -1)
        for weight, mask in zip(hidden[::-1], masks[::-1], strict=True):
            slope = torch.where(mask, slope, 0.0) @ weight
        return functional.linear(x, last), slope

    @property
    def weights(self) -> list[Float[Tensor, "Out In"]]:
        """The layers' matrices, first to last."""
        return [layer.get_parameter("weight") for layer in self.layers]

    @property
    def rectified(self) -> bool:
        """Whether the hidden activation is ReLU and the output is left as it is."""
        return self.hidden is functional.relu and self.output is identity

    def fused(self, x: Float[Tensor, "N In"]) -> bool:
        """Return whether Triton kernels compute the network of such inputs."""
        if self.backend == "torch" or (self.backend == "auto" and not x.is_cuda):
            return False
        return use_triton(self.backend, x.device, self._misfit(x), self.key)

    def _misfit(self, x: Tensor) -> str | None:
        """Return what the Triton kernels cannot do of this network."""
        if not self.rectified:
            return "they know only ReLU without an output activation"
        if x.is_cuda and x.dtype != torch.float32:
            return f"they take float32, not {str(x.dtype).removeprefix('torch.')}"
        shapes = [tuple(weight.shape) for weight in self.weights]
        layers, outputs = len(shapes) - 1, shapes[-1][0]
        if layers not in (1, 2):
            return f"n_hidden_layers is {layers}, not 1 or 2"
        if not {shapes[0][1], shapes[0][0]} <= set(KERNEL_WIDTHS) or outputs > KERNEL_OUTPUTS:
            sizes = f"{shapes[0][1]} inputs, {shapes[0][0]} neurons, {outputs} outputs"
            return f"{sizes}: not of {KERNEL_WIDTHS}, and at most {KERNEL_OUTPUTS} outputs"
        return None

    def _with_autograd(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            output = self(leaf)
            (slope,) = torch.autograd.grad(output.sum(), leaf, create_graph=keep_graph, retain_graph=True)
        return output if keep_graph else output.detach(), slope
