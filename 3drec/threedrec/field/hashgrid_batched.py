"""The hash encoding's lookup for all levels at once, for devices where starting kernels costs more than arithmetic.

Same values and first derivatives as ``hashgrid.encode_plain`` and ``hashgrid.jacobian_plain``. Where a GPU adds the
gradients of many points to one row, their order is random and with it the last bits of a float sum; here sums are made
of integers (fixed point), which do not depend on order, so the same seed gives the same field.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from threedrec.field.hashgrid import PRIMES, Level

MOST_CORNERS = 2**24
"""Corners of cells looked up at a time."""


class Pyramid(NamedTuple):
    """The numbers of L levels as tensors; dense levels come first."""

    scale: Float[Tensor, "L 1 1"]
    strides: Int[Tensor, "L 3 1 1"]
    rows: Int[Tensor, "L 1 1"]
    start: Int[Tensor, "L 1 1"]
    dense: int
    """How many levels are dense."""


@lru_cache(maxsize=64)
def _pyramid(levels: tuple[Level, ...], device: torch.device) -> Pyramid:
    strides = [
        [prime % level.rows for prime in PRIMES] if level.hashed else [1, level.resolution, level.resolution**2]
        for level in levels
    ]
    column = [[[level.scale]] for level in levels]
    whole = [[[[level.rows]], [[level.start]]] for level in levels]
    rows, start = torch.tensor(whole, dtype=torch.int32, device=device).unbind(1)
    return Pyramid(
        torch.tensor(column, dtype=torch.float64, device=device),
        torch.tensor(strides, dtype=torch.int32, device=device)[:, :, None, None],
        rows,
        start,
        sum(not level.hashed for level in levels),
    )


def _locate(points: Tensor, pyramid: Pyramid) -> tuple[Int[Tensor, "L 8 N"], Float[Tensor, "L 3 2 N"]]:
    """Return the table rows of every point's corners, and its near and far weights along each axis."""
    position = points.t().clamp(0.0, 1.0) * pyramid.scale.to(points.dtype) + 0.5
    cell = position.floor()
    fraction = position - cell
    steps = torch.stack([cell, cell + 1.0], dim=2).int() * pyramid.strides
    x, y, z = steps.unbind(1)
    dense, size = pyramid.dense, pyramid.rows
    summed = ((z[:dense, :, None] + y[:dense, None])[:, :, :, None] + x[:dense, None, None]).flatten(1, 3)
    # Only corners beyond the last cell run over the end; tiny-cuda-nn wraps them round too.
    summed = torch.where(summed >= size[:dense], summed - size[:dense], summed)
    mixed = ((z[dense:, :, None] ^ y[dense:, None])[:, :, :, None] ^ x[dense:, None, None]).flatten(1, 3)
    mixed = mixed & (size[dense:] - 1)
    return torch.cat([summed, mixed]) + pyramid.start, torch.stack([1.0 - fraction, fraction], dim=2)


def _product(x: Tensor, y: Tensor, z: Tensor) -> Float[Tensor, "L 8 N"]:
    """Return the products of one factor (L, 2, N) per axis, in the corner order of ``hashgrid.corner_rows``."""
    return ((z[:, :, None] * y[:, None])[:, :, :, None] * x[:, None, None]).flatten(1, 3)


def _all_weights(near_far: Tensor, pyramid: Pyramid, jacobian: bool) -> list[Float[Tensor, "L 8 N"]]:
    """Return the trilinear weights and, if wanted, their slopes along x, y and z."""
    x, y, z = near_far.unbind(1)
    if not jacobian:
        return [_product(x, y, z)]
    slope = (pyramid.scale.to(x.dtype) * x.new_tensor([[-1.0], [1.0]])).expand_as(x)
    return [_product(x, y, z), _product(slope, y, z), _product(x, slope, z), _product(x, y, slope)]


def _chunks(points: Tensor, levels: int) -> list[slice]:
    """Divide the points so that temporaries stay below a gigabyte."""
    size = max(1, MOST_CORNERS // (8 * levels))
    return [slice(start, start + size) for start in range(0, len(points), size)] or [slice(0, 0)]


class _EncodeLevels(torch.autograd.Function):
    """Features (N, LF) and, with ``jacobian``, their slopes (3, N, LF); differentiable once, in the table only."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, table: Tensor, levels: Sequence[Level], jacobian: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        pyramid = _pyramid(tuple(levels), points.device)
        parts: list[list[Tensor]] = []
        for chunk in _chunks(points, len(levels)):
            rows, near_far = _locate(points[chunk], pyramid)
            corners = table[rows.long()]
            parts.append(
                [
                    (weights[..., None] * corners).sum(dim=1).transpose(0, 1).flatten(1)
                    for weights in _all_weights(near_far, pyramid, jacobian)
                ]
            )
        sums = [torch.cat(part) for part in zip(*parts, strict=True)]
        # Rows and weights are made again in the backward pass: kept, they would take a hundred times the points.
        ctx.save_for_backward(points)
        ctx.pyramid, ctx.table_shape, ctx.jacobian = pyramid, table.shape, jacobian
        return (sums[0], torch.stack(sums[1:])) if jacobian else sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (points,) = ctx.saved_tensors
        pyramid, levels = ctx.pyramid, len(ctx.pyramid.rows)
        grads = [grad_outputs[0], *grad_outputs[1]] if ctx.jacobian else [grad_outputs[0]]
        # A weight is at most 1, a slope at most the scale of the finest level.
        largest = [grad.abs().amax() if grad.numel() else grad.new_zeros(()) for grad in grads]
        bound = largest[0] + pyramid.scale.amax() * sum(largest[1:])
        sums = FixedPointSums(ctx.table_shape, bound, 8 * len(points), points.device)
        for chunk in _chunks(points, levels):
            rows, near_far = _locate(points[chunk], pyramid)
            pushed = near_far.new_zeros(*rows.shape, ctx.table_shape[1])
            for grad, weights in zip(grads, _all_weights(near_far, pyramid, ctx.jacobian), strict=True):
                by_level = grad[chunk].unflatten(1, (levels, -1)).transpose(0, 1)
                pushed += weights[..., None] * by_level[:, None]
            sums.add(pushed.flatten(0, 2), rows.flatten())
        return None, sums.values(grads[0].dtype), None, None


class FixedPointSums:
    """Sums of many values into few rows that are the same whatever the order of addition.

    Args:
        shape: rows and columns.
        bound: no value is larger than this; a tensor, so that nothing waits for the device.
        most: no row gets more values than this. With ``bound`` it decides how fine the fixed point can be.
        device: where the sums are kept.
    """

    def __init__(self, shape: tuple[int, int], bound: Float[Tensor, ""], most: int, device: torch.device) -> None:
        bits = 61 - (most + 1).bit_length()
        # A power of two, so that scaling is exact; where all values are zero any finite number will do.
        self._scale = torch.exp2(bits - torch.log2(bound.double().clamp_min(1e-30)).ceil())
        self._sums = torch.zeros(shape, dtype=torch.long, device=device)

    def add(self, values: Float[Tensor, "M F"], rows: Int[Tensor, " M"]) -> None:
        """Add each value to its row."""
        with _any_order():
            self._sums.index_add_(0, rows, (values.double() * self._scale).round().long())

    def values(self, dtype: torch.dtype) -> Float[Tensor, "rows F"]:
        """The sums so far; not numbers where the bound was none."""
        return (self._sums.double() / self._scale).to(dtype)


@contextmanager
def _any_order() -> Iterator[None]:
    """Let additions happen in any order although results have to be repeatable: integers do not mind."""
    wanted, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


def encode_batched(
    points: Float[Tensor, "N 3"], table: Float[Tensor, "T F"], levels: Sequence[Level]
) -> Float[Tensor, "N LF"]:
    """Return what ``hashgrid.encode`` returns, differentiable once in the table."""
    return _EncodeLevels.apply(points, table, levels, False)


def encode_batched_with_jacobian(
    points: Float[Tensor, "N 3"], table: Float[Tensor, "T F"], levels: Sequence[Level]
) -> tuple[Float[Tensor, "N LF"], Float[Tensor, "N LF 3"]]:
    """Return what ``hashgrid.encode_with_jacobian`` returns, differentiable once in the table."""
    features, slopes = _EncodeLevels.apply(points, table, levels, True)
    return features, slopes.permute(1, 2, 0)
