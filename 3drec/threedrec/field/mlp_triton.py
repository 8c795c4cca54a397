"""A small ReLU network on a GPU as one kernel forward and one backward, for training.

Same values and first derivatives as ``VanillaMLP``'s ``forward`` and ``with_gradient``. Products are of float32, or of
TF32 where ``torch.set_float32_matmul_precision`` allows it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from threedrec.field.mlp import KERNEL_OUTPUTS
from threedrec.field.mlp_kernels import backward_kernel, forward_kernel

FORWARD: dict[str, Any] = {"BLOCK": 128, "num_warps": 4}
BACKWARD: dict[str, Any] = {"BLOCK": 64, "num_warps": 4}
"""Rows per program and threads, by measurement (``benchmarks/hashgrid.py --sweep``)."""
PROGRAMS_PER_PROCESSOR = 2
"""Of the backward pass, each with sums of its own."""


class _Network(torch.autograd.Function):
    """Outputs (N, Out) and, with ``slope``, their derivative along the inputs (N, In)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, last: Tensor, deep: bool, slope: bool
    ) -> tuple[Tensor, ...]:
        x, weights = x.contiguous(), (first.contiguous(), second.contiguous(), _sixteen_rows(last))
        y = x.new_empty(len(x), len(last))
        derivative = torch.empty_like(x) if slope else y
        flags = _flags(first, last, deep, slope)
        if len(x):
            with torch.cuda.device_of(x):
                programs = -(-len(x) // FORWARD["BLOCK"])
                forward_kernel[(programs,)](x, *weights, y, derivative, len(x), **flags, **FORWARD)
        ctx.save_for_backward(x, *weights)
        ctx.flags, ctx.slope = flags, slope
        return (y, derivative) if slope else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, last = ctx.saved_tensors
        grad_y, grad_slope = grad_outputs[0].contiguous(), grad_outputs[-1].contiguous()
        grad_x = torch.empty_like(x)
        programs = min(-(-len(x) // BACKWARD["BLOCK"]), PROGRAMS_PER_PROCESSOR * _processors(x.device))
        # Each program writes its own sums, whatever the order they finish in.
        sums = [x.new_empty(programs, *weight.shape) for weight in (first, second, last)]
        if len(x):
            with torch.cuda.device_of(x):
                backward_kernel[(programs,)](
                    x, first, second, last, grad_y, grad_slope, grad_x, *sums, len(x), **ctx.flags, **BACKWARD
                )
        grads = [part.sum(dim=0) for part in sums]
        return grad_x, grads[0], grads[1] if ctx.flags["DEEP"] else None, grads[2][: ctx.flags["OUT"]], None, None


def _sixteen_rows(last: Tensor) -> Tensor:
    return functional.pad(last, (0, 0, 0, KERNEL_OUTPUTS - len(last)))


def _flags(first: Tensor, last: Tensor, deep: bool, slope: bool) -> dict[str, Any]:
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if first.dtype != torch.float32:
        precision = "ieee"
    shape = {"IN": first.shape[1], "WIDTH": first.shape[0], "OUT": last.shape[0]}
    return shape | {"DEEP": deep, "SLOPE": slope, "PRECISION": precision}


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def network_triton(x: Float[Tensor, "N In"], weights: list[Tensor]) -> Float[Tensor, "N Out"]:
    """Return the output of the ReLU network of two or three matrices, (out, in) each."""
    return _apply(x, weights, slope=False)[0]


def network_with_gradient(
    x: Float[Tensor, "N In"], weights: list[Tensor]
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N In"]]:
    """Return the output of the ReLU network of two matrices, and its derivative along the inputs."""
    output, slope = _apply(x, weights, slope=True)
    return output, slope


def _apply(x: Tensor, weights: list[Tensor], slope: bool) -> tuple[Tensor, ...]:
    # Without a second hidden layer any tensor stands in for it; it is never read.
    return _Network.apply(x, weights[0], weights[len(weights) // 2], weights[-1], len(weights) == 3, slope)
