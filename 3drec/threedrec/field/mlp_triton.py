"""A small ReLU network on a GPU as one kernel forward and one backward, for training.

Same values and first derivatives as ``VanillaMLP``'s ``forward`` and ``with_gradient`` in PyTorch, to the precision of
the products. Repeatable: every program keeps sums of its own, which PyTorch then adds.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from threedrec.field.mlp_kernels import slope_backward_kernel, slope_kernel, value_backward_kernel, value_kernel

LAUNCH: dict[str, dict[str, Any]] = {
    "value": {"BLOCK": 64, "num_warps": 4},
    "value backward": {"BLOCK": 64, "num_warps": 4},
    "slope": {"BLOCK": 64, "num_warps": 4},
    "slope backward": {"BLOCK": 128, "num_warps": 8},
}
"""Rows that a program looks at together, and threads, by measurement (``benchmarks/hashgrid.py --sweep``)."""
SMALL: dict[str, dict[str, Any]] = {"slope backward": {"BLOCK": 64, "num_warps": 4}}
"""The same on GPUs whose programs have less shared memory; not measured."""
AMPLE_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Capabilities of GPUs whose programs may have 160 KiB of shared memory or more; on others it is 64 to 100."""
PROGRAMS_PER_PROCESSOR = {"value": 8, "value backward": 8, "slope": 4, "slope backward": 1}
"""Of each kernel; a program goes through many blocks and reads the weights once."""
PRODUCTS = {"float32": "tf32x3", "tf32": "tf32", "float16": "float16"}
"""What the kernels call the precisions of ``MLPConfig``; three TF32 products have float32's digits."""

Weights = tuple[Tensor, ...]


class _Value(torch.autograd.Function):
    """Outputs, (N, Out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, precision: str, *weights: Tensor) -> Tensor:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        y = x.new_empty(len(x), len(weights[-1]))
        ctx.flags = _flags(x, weights, precision) | {"OUT": len(weights[-1])}
        _launch("value", value_kernel, x, *_three(weights), y, **ctx.flags)
        ctx.save_for_backward(x, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), _sums("value backward", x, weights)
        grads = (grad_outputs[0].contiguous(), grad_x, sums)
        _launch("value backward", value_backward_kernel, x, *_three(weights), *grads, **ctx.flags)
        return grad_x, None, *_summed(sums, weights)


class _ValueAndSlope(torch.autograd.Function):
    """Outputs, (N, 1), and their derivative along the inputs, (N, In)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, precision: str, *weights: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        y, slope = x.new_empty(len(x), 1), torch.empty_like(x)
        ctx.flags = _flags(x, weights, precision)
        _launch("slope", slope_kernel, x, *_three(weights), y, slope, **ctx.flags)
        ctx.save_for_backward(x, slope, *weights)
        ctx.set_materialize_grads(False)
        return y, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, slope, *weights = ctx.saved_tensors
        wanted: dict[str, Any] = {"VALUES": grad_outputs[0] is not None, "SLOPES": grad_outputs[1] is not None}
        if not any(wanted.values()):
            return None, None, *[None] * len(weights)
        # What a flag leaves out is never touched; any tensor stands in for it.
        grads = [x if grad is None else grad.contiguous() for grad in grad_outputs]
        grad_x = torch.empty_like(x) if wanted["VALUES"] else None
        sums = _sums("slope backward", x, weights)
        outputs = (x if grad_x is None else grad_x, sums)
        _launch(
            "slope backward", slope_backward_kernel, x, *_three(weights), slope, *grads, *outputs, **ctx.flags | wanted
        )
        return grad_x, None, *_summed(sums, weights)


def _launch(name: str, kernel: Any, x: Tensor, *tensors: Tensor, **flags: Any) -> None:
    if len(x):
        with torch.cuda.device_of(x):
            kernel[(_programs(name, x),)](x, *tensors, len(x), **flags, **_settings(name, x.device))


def _settings(name: str, device: torch.device) -> dict[str, Any]:
    return LAUNCH[name] if has_ample_memory(device) else LAUNCH[name] | SMALL.get(name, {})


@lru_cache
def has_ample_memory(device: torch.device) -> bool:
    """Whether programs on a GPU may have as much shared memory as `LAUNCH` asks for."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in AMPLE_MEMORY


def _programs(name: str, x: Tensor) -> int:
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(-(-len(x) // _settings(name, x.device)["BLOCK"]), PROGRAMS_PER_PROCESSOR[name] * processors)


def _three(weights: Weights | list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Without a second hidden layer any tensor stands in for it; it is never read."""
    return weights[0], weights[len(weights) // 2], weights[-1]


def _sums(name: str, x: Tensor, weights: list[Tensor]) -> Tensor:
    """Return room for the gradients of all weights of every program."""
    return x.new_empty(_programs(name, x), sum(weight.numel() for weight in weights))


def _summed(sums: Tensor, weights: list[Tensor]) -> list[Tensor]:
    parts = sums.sum(dim=0).split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def _flags(x: Tensor, weights: Weights, precision: str) -> dict[str, Any]:
    products = PRODUCTS[precision] if x.dtype == torch.float32 else "ieee"
    return {"IN": x.shape[1], "WIDTH": len(weights[0]), "DEEP": len(weights) == 3, "PRECISION": products}


def network_triton(x: Float[Tensor, "N In"], weights: list[Tensor], precision: str) -> Float[Tensor, "N Out"]:
    """Return the output of the ReLU network of two or three matrices, (out, in) each."""
    return _Value.apply(x, precision, *weights)


def network_with_gradient(
    x: Float[Tensor, "N In"], weights: list[Tensor], precision: str
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N In"]]:
    """Return the output of the ReLU network of two or three matrices, and its derivative along the inputs."""
    return _ValueAndSlope.apply(x, precision, *weights)
