"""Functions of many points, part by part: what a part's backward pass needs is computed again, not kept."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Outputs = tuple[Tensor, ...]
PointFunction = Callable[[Float[Tensor, "N 3"]], Outputs]


class _Recomputed(torch.autograd.Function):
    """``function(points)`` without a graph, and its gradient in the parameters from a second call."""

    @staticmethod
    def forward(ctx: Any, function: PointFunction, points: Tensor, *parameters: nn.Parameter) -> Outputs:
        ctx.function, ctx.parameters = function, parameters
        ctx.save_for_backward(points)
        return function(points)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (points,) = ctx.saved_tensors
        with torch.enable_grad():
            outputs = ctx.function(points)
        pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
        values, grads = zip(*pairs, strict=True)
        return None, None, *torch.autograd.grad(values, ctx.parameters, grads, allow_unused=True)


def in_parts(
    function: PointFunction, points: Float[Tensor, "N 3"], size: int, parameters: Iterable[nn.Parameter]
) -> Outputs:
    """Return ``function(points)``, of ``size`` points at a time when there are more.

    A backward pass then holds the graph of one part at a time, at the price of a second forward pass (gradient
    checkpointing, Chen et al. 2016, arXiv 1604.06174). Gradients are those of one call, to rounding.

    Args:
        function: row by row, without random draws; returns tensors of N rows each.
        points: get no gradient.
        size: points in a part.
        parameters: everything else that the function depends on and that may get a gradient.
    """
    if len(points) <= size:
        return function(points)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.is_grad_enabled() and trained:
        parts = [_Recomputed.apply(function, part, *trained) for part in points.split(size)]
    else:
        parts = [function(part) for part in points.split(size)]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
