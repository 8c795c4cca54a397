"""Multiresolution hash encoding (Mueller et al. 2022, "Instant Neural Graphics Primitives", section 3).

Notation: L levels, F features per row, T rows in all. Points x lie in [0, 1]^3. Level l has the scale
s_l = b^l N_min - 1 and the resolution N_l = ceil(s_l) + 1; a point falls into the cell floor(s_l x + 1/2). These, the
row order of dense levels and the table sizes are tiny-cuda-nn's, so its parameters and configurations keep their
meaning.

Two versions of the lookup: ``encode_plain`` and ``jacobian_plain`` are the definition, differentiable any number of
times in points and table. ``encode`` and ``encode_with_jacobian`` have the same values and first derivatives with a
hand-written backward: bags of eight rows in the forward pass (no per-corner features in memory) and one-dimensional
scatters in the backward pass, level by level so that temporaries stay small. With the closed-form d(features)/dx,
analytic normals need no second derivative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

PRIMES = (1, 2654435761, 805459861)
"""Equation 4: the first is 1, so that rows along x stay close in memory."""


@dataclass(frozen=True)
class Level:
    """One grid of the pyramid."""

    scale: float
    resolution: int
    rows: int
    """Table rows of this level; a power of two when hashed."""
    start: int
    """First row of this level in the common table."""
    hashed: bool


def build_levels(n_levels: int, base_resolution: int, per_level_scale: float, log2_hashmap_size: int) -> list[Level]:
    """Return the levels: dense where all N_l^3 corners fit into 2^log2_hashmap_size rows, hashed otherwise."""
    levels: list[Level] = []
    start = 0
    for index in range(n_levels):
        scale = math.exp2(index * math.log2(per_level_scale)) * base_resolution - 1.0
        resolution = math.ceil(scale) + 1
        dense_rows = -(-(resolution**3) // 8) * 8
        hashed = resolution**3 > 2**log2_hashmap_size
        rows = min(dense_rows, 2**log2_hashmap_size)
        levels.append(Level(scale, resolution, rows, start, hashed))
        start += rows
    return levels


def locate(points: Float[Tensor, "N 3"], level: Level) -> tuple[Int[Tensor, "3 N"], Float[Tensor, "3 N"]]:
    """Return the cell of every point, per axis, and the position inside the cell, in [0, 1)."""
    position = points.t().clamp(0.0, 1.0) * level.scale + 0.5
    cell = position.detach().floor()
    return cell.int(), position - cell


def corner_rows(cell: Int[Tensor, "3 N"], level: Level) -> Int[Tensor, "8 N"]:
    """Return the rows (within the level) of a cell's eight corners; bit 0, 1, 2 of the corner steps along x, y, z."""
    size = level.rows
    if level.hashed:
        # Only the low bits of a product survive the modulo, and they depend on the low bits of the factors alone: the
        # reduced primes keep everything inside 32-bit integers.
        strides = [prime % size for prime in PRIMES]
    else:
        strides = [1, level.resolution, level.resolution**2]
    x, y, z = (torch.stack([cell[axis] * stride, (cell[axis] + 1) * stride]) for axis, stride in enumerate(strides))
    if level.hashed:
        planes = (z & size - 1)[:, None] ^ (y & size - 1)
        return (planes[:, :, None] ^ x).view(8, -1)
    rows = ((z[:, None] + y)[:, :, None] + x).view(8, -1)
    # Only corners beyond the last cell run over the end; tiny-cuda-nn wraps them round too.
    return torch.where(rows >= size, rows - size, rows)


def corner_weights(fraction: Float[Tensor, "3 N"]) -> Float[Tensor, "8 N"]:
    """Return trilinear weights in the corner order of ``corner_rows``."""
    x, y, z = _axis_weights(fraction)
    return ((z[:, None] * y)[:, :, None] * x).view(8, -1)


def corner_slopes(fraction: Float[Tensor, "3 N"], scale: float) -> list[Float[Tensor, "8 N"]]:
    """Return the derivatives of ``corner_weights`` with respect to x, y and z of the point."""
    x, y, z = _axis_weights(fraction)
    step = fraction.new_tensor([-scale, scale])
    along_x = (z[:, None] * y)[:, :, None] * step[:, None]
    along_y = (z[:, None] * step[:, None])[:, :, None] * x
    along_z = (step[:, None, None] * y)[:, :, None] * x
    return [along_x.view(8, -1), along_y.view(8, -1), along_z.view(8, -1)]


def _axis_weights(fraction: Tensor) -> Tensor:
    """Return the weights of the near and the far corner along each axis, (3, 2, N)."""
    return torch.stack([1.0 - fraction, fraction], dim=1)


def encode_plain(
    points: Float[Tensor, "N 3"], table: Float[Tensor, "T F"], levels: Sequence[Level]
) -> Float[Tensor, "N LF"]:
    """Return the features of points in [0, 1] (clamped); the definition, built from differentiable steps."""
    features = []
    for level in levels:
        cell, fraction = locate(points, level)
        corners = table[level.start : level.start + level.rows][corner_rows(cell, level).long()]
        features.append(torch.einsum("knf,kn->nf", corners, corner_weights(fraction)))
    return torch.cat(features, dim=-1)


def jacobian_plain(
    points: Float[Tensor, "N 3"], table: Float[Tensor, "T F"], levels: Sequence[Level]
) -> Float[Tensor, "N LF 3"]:
    """Return d(features)/d(points) in closed form; the definition."""
    slopes = []
    for level in levels:
        cell, fraction = locate(points, level)
        corners = table[level.start : level.start + level.rows][corner_rows(cell, level).long()]
        weights = torch.stack(corner_slopes(fraction, level.scale))
        slopes.append(torch.einsum("knf,dkn->nfd", corners, weights))
    return torch.cat(slopes, dim=1)


class _Encode(torch.autograd.Function):
    """Features (N, LF) and, with ``jacobian``, their slopes (3, N, LF), with an explicit first derivative."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, table: Tensor, levels: Sequence[Level], jacobian: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        slopes: list[list[Tensor]] = [[], [], []]
        saved: list[Tensor] = []
        for level in levels:
            cell, fraction = locate(points, level)
            rows = corner_rows(cell, level)
            bags = rows.t().contiguous()
            part = table[level.start : level.start + level.rows]
            features.append(_weighted_rows(bags, part, corner_weights(fraction)))
            if jacobian:
                for axis, weights in enumerate(corner_slopes(fraction, level.scale)):
                    slopes[axis].append(_weighted_rows(bags, part, weights))
            saved += [rows, fraction] if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(points, table, *saved)
        ctx.levels = levels
        joined = torch.cat(features, dim=-1)
        return (joined, torch.stack([torch.cat(axis, dim=-1) for axis in slopes])) if jacobian else joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        points, table, *saved = ctx.saved_tensors
        grad_table = grad_points = None
        if ctx.needs_input_grad[1]:
            channels = table.shape[1]
            grad = grad_outputs[0].t().contiguous()[None]
            if len(grad_outputs) > 1:
                grad = torch.cat([grad, grad_outputs[1].transpose(1, 2)])
            grad_table = torch.empty_like(table)
            for index, level in enumerate(ctx.levels):
                block = grad[:, index * channels : (index + 1) * channels]
                part = _scatter(block, level, saved[2 * index], saved[2 * index + 1])
                grad_table[level.start : level.start + level.rows] = part.t()
            # The caller may have left out the finest levels, whose rows come last.
            grad_table[ctx.levels[-1].start + ctx.levels[-1].rows :] = 0.0
        if ctx.needs_input_grad[0]:
            grad_points = _grad_points(points, table, ctx.levels, grad_outputs)
        return grad_points, grad_table, None, None


def _weighted_rows(bags: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    return functional.embedding_bag(bags, table, per_sample_weights=weights.t().contiguous(), mode="sum")


def _scatter(grad: Tensor, level: Level, rows: Tensor, fraction: Tensor) -> Tensor:
    """Return the gradient of one level's rows, (F, rows): what every corner received, summed.

    With a jacobian a corner receives w g + sum_d (dw/dx_d) g_d, where w = w_x w_y w_z; the sum is factored as
    w_z w_y (w_x g + w_x' g_x) + w_x (w_z w_y' g_y + w_z' w_y g_z).
    """
    x, y, z = _axis_weights(fraction)
    planes = (z[:, None] * y)[:, :, None]
    weights = (planes * x).view(8, -1) if len(grad) == 1 else None
    step = fraction.new_tensor([-level.scale, level.scale])
    flat = rows.view(-1)
    result = grad.new_zeros(grad.shape[1], level.rows)
    for channel in range(grad.shape[1]):
        if weights is not None:
            values = weights * grad[0, channel]
        else:
            value, along_x, along_y, along_z = grad[:, channel]
            near_far = x * value + step[:, None] * along_x
            across = z[:, None] * (step[:, None] * along_y) + (step[:, None] * along_z)[:, None] * y
            values = (planes * near_far).addcmul_(across[:, :, None], x)
        # One-dimensional on purpose: row-wise index_add on the CPU costs some fifty times more per element.
        result[channel].index_add_(0, flat, values.view(-1))
    return result


def _grad_points(points: Tensor, table: Tensor, levels: Sequence[Level], grad_outputs: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        leaf = points.detach().requires_grad_(True)
        outputs = [encode_plain(leaf, table.detach(), levels)]
        if len(grad_outputs) > 1:
            outputs.append(jacobian_plain(leaf, table.detach(), levels).permute(2, 0, 1))
        return torch.autograd.grad(outputs, leaf, grad_outputs)[0]


def encode(points: Float[Tensor, "N 3"], table: Float[Tensor, "T F"], levels: Sequence[Level]) -> Float[Tensor, "N LF"]:
    """Return what ``encode_plain`` returns, faster, differentiable once in points and table.

    Args:
        points: in [0, 1]; clamped.
        table: the rows of all levels, one after another.
        levels: from ``build_levels``.
    """
    return _Encode.apply(points, table, levels, False)


def encode_with_jacobian(
    points: Float[Tensor, "N 3"], table: Float[Tensor, "T F"], levels: Sequence[Level]
) -> tuple[Float[Tensor, "N LF"], Float[Tensor, "N LF 3"]]:
    """Return ``encode`` and ``jacobian_plain`` from one lookup, both differentiable once in points and table."""
    features, slopes = _Encode.apply(points, table, levels, True)
    return features, slopes.permute(1, 2, 0)
