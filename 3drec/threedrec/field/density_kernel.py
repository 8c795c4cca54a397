"""Triton kernel from points to the density network's output, without features in memory; for passes without gradients.

A program carries a block of points through all levels, adding each level's part of the first layer as it goes.
"""

# Triton gives the types of a kernel's arguments at its launch.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from threedrec.field.hashgrid_kernels import level_features, points_of_program
from threedrec.field.hashgrid_triton import Grid, pyramid
from threedrec.field.mlp import VanillaMLP

SETTINGS: dict[str, Any] = {"BLOCK": 64, "num_warps": 4}
"""By measurement (``benchmarks/hashgrid.py --sweep``)."""

WIDTHS = (16, 32, 64, 128)
"""Neurons of a hidden layer that the kernel can hold."""


@triton.jit(do_not_specialize=["count", "opened"])
def density_kernel(
    points, table, first, second, last, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, NEURONS: tl.constexpr, DEEP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` (N, 1): relu(relu(features first) second) last, or without the second layer unless ``DEEP``.

    ``first`` (LEVELS CHANNELS, NEURONS), ``second`` (NEURONS, NEURONS), ``last`` (NEURONS, 1).
    """
    index, within, _ = points_of_program(count, BLOCK, 2 * BLOCK)
    kind: tl.constexpr = points.dtype.element_ty
    neuron, channel = tl.arange(0, NEURONS), tl.arange(0, CHANNELS)
    hidden = tl.zeros([BLOCK, NEURONS], dtype=kind)
    for level in range(LEVELS):
        inside = within & (level < opened)
        features = level_features(points, table, scales, numbers, index, inside, level, CHANNELS, BLOCK)
        for number in tl.static_range(CHANNELS):
            feature = tl.sum(tl.where(channel[None, :] == number, features, 0.0), axis=1)
            weight = tl.load(first + (level * CHANNELS + number) * NEURONS + neuron)
            hidden += feature[:, None] * weight[None, :]
    # Written so that what is no number stays none.
    hidden = tl.where(hidden < 0.0, 0.0, hidden)
    if DEEP:
        weights = tl.load(second + neuron[:, None] * NEURONS + neuron[None, :])
        hidden = tl.dot(hidden, weights, input_precision=PRECISION)
        hidden = tl.where(hidden < 0.0, 0.0, hidden)
    result = tl.sum(hidden * tl.load(last + neuron)[None, :], axis=1)
    index, within, _ = points_of_program(count, BLOCK, BLOCK)
    tl.store(out + index, result, mask=within)


def fits(network: VanillaMLP) -> bool:
    """Return whether the kernel can stand for a network."""
    shapes = [tuple(weight.shape) for weight in network.weights]
    widths = {shape[0] for shape in shapes[:-1]}
    if not network.rectified or len(shapes) not in (2, 3) or len(widths) != 1:
        return False
    return widths <= set(WIDTHS) and shapes[-1][0] == 1


def raw_density(points: Float[Tensor, "N 3"], grid: Grid, network: VanillaMLP) -> Float[Tensor, "N 1"]:
    """Return the output for points in [0, 1] of a network that ``fits``; without gradients.

    Args:
        points: clamped.
        grid: the lookup.
        network: of two or three layers.
    """
    points = points.contiguous()
    out = points.new_empty(len(points), 1)
    if len(points) == 0:
        return out
    # (In, Out): neighbouring neurons lie side by side.
    weights = [weight.detach().t().to(points.dtype).contiguous() for weight in network.weights]
    with torch.cuda.device_of(points):
        density_kernel[(-(-len(points) // SETTINGS["BLOCK"]),)](
            points, grid.read, weights[0], weights[len(weights) // 2], weights[-1], out,
            *pyramid(grid.levels, points.device), len(points), grid.opened,
            LEVELS=len(grid.levels), CHANNELS=grid.channels, NEURONS=len(weights[-1]), DEEP=len(weights) == 3,
            PRECISION=_products(points, network), **SETTINGS,
        )  # fmt: skip
    return out


def _products(points: Tensor, network: VanillaMLP) -> str:
    """Return the precision of the second layer's products: the network's own, or float32's where that is PyTorch's."""
    if points.dtype != torch.float32:
        return "ieee"
    return "tf32x3" if network.backend == "torch" or network.precision == "float32" else "tf32"
