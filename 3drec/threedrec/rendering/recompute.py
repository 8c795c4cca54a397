"""Functions of many points, part by part: what a part's backward pass needs is computed again, not kept.

But for what was put on a `Tape`: results that take long and are small, as far as there is memory for them.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from threedrec.field.tape import Tape

Outputs = tuple[Tensor, ...]
PointFunction = Callable[[Float[Tensor, "N 3"]], Outputs]


class _Recomputed(torch.autograd.Function):
    """``function(points)`` without a graph, and its gradient in the parameters from a second call."""

    @staticmethod
    def forward(
        ctx: Any, function: PointFunction, tape: Tape | None, points: Tensor, *parameters: nn.Parameter
    ) -> Outputs:
        ctx.function, ctx.tape, ctx.parameters = function, tape, parameters
        ctx.save_for_backward(points)
        with nullcontext() if tape is None else tape.recording():
            return function(points)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (points,), tape = ctx.saved_tensors, ctx.tape
        ctx.tape = None  # read once; another backward pass would compute everything
        with torch.enable_grad(), nullcontext() if tape is None else tape.replaying():
            outputs = ctx.function(points)
        pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
        values, grads = zip(*pairs, strict=True)
        return None, None, None, *torch.autograd.grad(values, ctx.parameters, grads, allow_unused=True)


def in_parts(
    function: PointFunction,
    points: Float[Tensor, "N 3"],
    size: int,
    parameters: Iterable[nn.Parameter],
    kept_bytes: int = 0,
) -> Outputs:
    """Return ``function(points)``, of ``size`` points at a time when there are more.

    A backward pass then holds the graph of one part at a time, at the price of a second forward pass (gradient
    checkpointing, Chen et al. 2016, arXiv 1604.06174). Gradients are those of one call, to rounding.

    Args:
        function: row by row, without random draws; returns tensors of N rows each.
        points: get no gradient.
        size: points in a part.
        parameters: everything else that the function depends on and that may get a gradient.
        kept_bytes: what tapes may hold until the backward pass.
    """
    if len(points) <= size:
        return function(points)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not trained:
        return _joined([function(part) for part in points.split(size)])
    parts, left, expected = [], kept_bytes, 1
    for part in points.split(size):
        tape = Tape() if left >= expected else None
        parts.append(_Recomputed.apply(function, tape, part, *trained))
        if tape is not None:
            left, expected = left - tape.bytes, tape.bytes
    return _joined(parts)


def _joined(parts: list[Outputs]) -> Outputs:
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
