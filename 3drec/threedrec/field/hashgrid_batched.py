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


class _EncodeLevels(torch.autograd.Function):
    """Features (N, LF) and, with ``jacobian``, their slopes (3, N, LF); differentiable once, in the table only."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, table: Tensor, levels: Sequence[Level], jacobian: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        pyramid = _pyramid(tuple(levels), points.device)
        rows, near_far = _locate(points, pyramid)
        corners = table[rows.long()]
        sums = [
            (weights[..., None] * corners).sum(dim=1).transpose(0, 1).flatten(1)
            for weights in _all_weights(near_far, pyramid, jacobian)
        ]
        ctx.save_for_backward(rows, near_far)
        ctx.pyramid, ctx.table_shape, ctx.jacobian = pyramid, table.shape, jacobian
        return (sums[0], torch.stack(sums[1:])) if jacobian else sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, near_far = ctx.saved_tensors
        grads = [grad_outputs[0], *grad_outputs[1]] if ctx.jacobian else [grad_outputs[0]]
        pushed = near_far.new_zeros(*rows.shape, ctx.table_shape[1])
        for grad, weights in zip(grads, _all_weights(near_far, ctx.pyramid, ctx.jacobian), strict=True):
            by_level = grad.unflatten(1, (len(rows), -1)).transpose(0, 1)
            pushed += weights[..., None] * by_level[:, None]
        return None, add_rows(pushed.flatten(0, 2), rows.flatten(), ctx.table_shape[0], 8 * rows.shape[2]), None, None


def add_rows(values: Float[Tensor, "M F"], rows: Int[Tensor, " M"], count: int, most: int) -> Float[Tensor, "count F"]:
    """Return for each row the sum of the values that belong to it, the same whatever the order of addition.

    Args:
        values: what to add.
        rows: where.
        count: how many rows there are.
        most: no row gets more values than this; it decides how many bits a single value may take.
    """
    bits = 62 - (most + 1).bit_length()
    # A power of two, so that scaling is exact; all values zero leave it at any finite number.
    exponent = bits - torch.log2(values.abs().amax().double().clamp_min(1e-30)).ceil()
    scale = torch.exp2(exponent)
    whole = (values.double() * scale).round().long()
    sums = torch.zeros(count, values.shape[1], dtype=torch.long, device=values.device)
    with _any_order():
        sums.index_add_(0, rows, whole)
    return (sums.double() / scale).to(values.dtype)


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
