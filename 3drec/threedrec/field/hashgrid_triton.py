"""The hash encoding on a GPU by Triton kernels: features, and their derivative along x without a jacobian in memory.

Same values and first derivatives as ``hashgrid.encode_plain`` and ``hashgrid.jacobian_plain``. An analytic normal needs
u = J^T g, where g = d(density)/d(features): ``LinkedFeatures.pull`` returns it, differentiable once in g and the table.
With v = dL/du, dL/dg is the derivative of the features along v, and a corner's row receives (w' . v) g next to the
w dL/d(features) of the features themselves, so both go into the table in one pass.

Repeatability: many points add to one row in random order. Where PyTorch is asked for deterministic algorithms, rows are
summed in 64-bit fixed point, which does not depend on order; otherwise in float32, and the last bits differ from run to
run. Everything else here repeats itself.

This module needs Triton, which PyTorch for CUDA brings along. With ``TRITON_INTERPRET=1`` it works on CPU tensors.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from threedrec.field.hashgrid import PRIMES, Level
from threedrec.field.hashgrid_kernels import (
    bound_kernel,
    features_kernel,
    pull_kernel,
    scatter_kernel,
    tangent_kernel,
)
from threedrec.field.tape import remembered

LAUNCH: dict[str, dict[str, Any]] = {
    "features": {"BLOCK": 64, "GROUP": 4, "num_warps": 4},
    "tangent": {"BLOCK": 64, "GROUP": 4, "num_warps": 4},
    "pull": {"BLOCK": 256, "num_warps": 8},
    "bound": {"BLOCK": 128, "num_warps": 4},
    "scatter": {"BLOCK": 128, "GROUP": 4, "RUN": 1, "num_warps": 8},
}
"""Points and levels per program, and threads, by measurement (``benchmarks/hashgrid.py --sweep``)."""


class Pyramid(NamedTuple):
    """The numbers of L levels as the kernels read them."""

    scales: Float[Tensor, " L"]
    numbers: Int[Tensor, "L 5"]
    """Strides along y and z, rows, first row, 1 if hashed."""


@lru_cache(maxsize=64)
def pyramid(levels: tuple[Level, ...], device: torch.device) -> Pyramid:
    """Return the levels' numbers on ``device``."""
    numbers = []
    for level in levels:
        strides = (
            [prime % level.rows for prime in PRIMES] if level.hashed else [1, level.resolution, level.resolution**2]
        )
        numbers.append([*strides[1:], level.rows, level.start, int(level.hashed)])
    scales = torch.tensor([level.scale for level in levels], dtype=torch.float64, device=device)
    return Pyramid(scales, torch.tensor(numbers, dtype=torch.int32, device=device))


class Grid(NamedTuple):
    """What a lookup needs to know beside the points and the table."""

    levels: tuple[Level, ...]
    opened: int
    """Only that many levels are looked up; the features of the others are zero."""
    channels: int
    read: Tensor
    """The table that values are read from: the trained one, or a half precision copy of it."""

    @property
    def width(self) -> int:
        """Number of features of a point."""
        return len(self.levels) * self.channels

    def launch(self, name: str, kernel: Any, points: Tensor, *tensors: Tensor, **flags: Any) -> None:
        """Run a kernel over all points, each program with a group of levels, or with all if it knows no groups."""
        if len(points) == 0:
            return
        settings = LAUNCH[name] | flags
        programs = -(-len(points) // (settings["BLOCK"] * settings.get("RUN", 1)))
        if "GROUP" in settings:
            programs *= -(-len(self.levels) // settings["GROUP"])
        numbers = pyramid(self.levels, points.device)
        sizes = {"LEVELS": len(self.levels), "CHANNELS": self.channels}
        with torch.cuda.device_of(points):
            kernel[(programs,)](points, *tensors, *numbers, len(points), self.opened, **sizes, **settings)


def _look_up(points: Tensor, grid: Grid) -> Tensor:
    features = points.new_empty(len(points), grid.width)
    grid.launch("features", features_kernel, points, grid.read, features)
    return features


def _pull(points: Tensor, pull: Tensor, grid: Grid) -> Tensor:
    out = torch.empty_like(points)
    grid.launch("pull", pull_kernel, points, grid.read, pull, out)
    return out


class _Features(torch.autograd.Function):
    """Features (N, LC), and two placeholders whose gradients are g and v of ``_Pull``; see the module's text."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, grid: Grid, linked: bool) -> tuple[Tensor, ...]:
        features = remembered(lambda: _look_up(points, grid))
        ctx.save_for_backward(points)
        ctx.grid, ctx.table = grid, (table.shape, table.dtype)
        ctx.set_materialize_grads(False)
        if not linked:
            return (features,)
        # One number each in memory: only the way of their gradients matters.
        return features, points.new_zeros(1, 1).expand(features.shape), points.new_zeros(1, 1).expand(points.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (points,) = ctx.saved_tensors
        grad, pull, tangent = (*grad_outputs, None, None)[:3]
        shape, dtype = ctx.table
        return None, scatter(points, grad, pull, tangent, ctx.grid, shape).to(dtype), None, None


class _Pull(torch.autograd.Function):
    """u = J^T g; gives its g and v = dL/du to ``_Features`` instead of scattering them itself."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, pull: Tensor, grid: Grid, link_pull: Tensor, link_tangent: Tensor
    ) -> Float[Tensor, "N 3"]:
        pull = pull.contiguous()
        out = remembered(lambda: _pull(points, pull, grid))
        ctx.save_for_backward(points, pull)
        ctx.grid = grid
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        points, pull = ctx.saved_tensors
        tangent = grad_outputs[0].contiguous()
        grad_pull = None
        if ctx.needs_input_grad[1]:
            grad_pull = torch.empty_like(pull)
            ctx.grid.launch("tangent", tangent_kernel, points, ctx.grid.read, tangent, grad_pull)
        return None, grad_pull, None, pull, tangent


def scatter(
    points: Float[Tensor, "N 3"],
    grad: Float[Tensor, "N LC"] | None,
    pull: Float[Tensor, "N LC"] | None,
    tangent: Float[Tensor, "N 3"] | None,
    grid: Grid,
    shape: Sequence[int],
) -> Float[Tensor, "T C"]:
    """Return the table's gradient: w ``grad`` + (w' . ``tangent``) ``pull``, summed over points, corner by corner."""
    fixed = torch.are_deterministic_algorithms_enabled()
    unit = _unit(points, grad, pull, tangent, grid) if fixed else points.new_ones(1)
    sums = torch.zeros(shape, dtype=torch.int64 if fixed else points.dtype, device=points.device)
    flags = {"VALUES": grad is not None, "SLOPES": pull is not None, "FIXED": fixed}
    if flags["VALUES"] or flags["SLOPES"]:
        # What a flag leaves out is never read; any tensor stands in for it.
        grads, pulls, tangents = (points if part is None else part.contiguous() for part in (grad, pull, tangent))
        grid.launch("scatter", scatter_kernel, points, grads, pulls, tangents, unit, sums, **flags)
    return sums * unit.reciprocal().to(points.dtype) if fixed else sums


def _unit(
    points: Tensor, grad: Tensor | None, pull: Tensor | None, tangent: Tensor | None, grid: Grid
) -> Float[Tensor, " 1"]:
    """Return how many fixed-point steps make 1: a power of two, as fine as the sum of all points' pushes allows."""
    value, slope = _largest(points, grad, pull, tangent, grid.width).double()
    # A slope is at most the scale of the finest level.
    bound = value + grid.levels[-1].scale * slope
    bits = 61 - (8 * len(points) + 1).bit_length()
    # At most 2^120, which float32 still holds, as well as its inverse.
    return torch.exp2((bits - torch.log2(bound).ceil()).clamp(max=120.0)).view(1)


def _largest(
    points: Tensor, grad: Tensor | None, pull: Tensor | None, tangent: Tensor | None, width: int
) -> Float[Tensor, " 2"]:
    """Return the greatest |grad| and |pull| |tangent| of all points, 0 for what is not there."""
    if len(points) == 0:
        return points.new_zeros(2)
    settings, flags = LAUNCH["bound"], {"VALUES": grad is not None, "SLOPES": pull is not None and tangent is not None}
    programs = -(-len(points) // settings["BLOCK"])
    largest = points.new_zeros(programs, 2)
    grads, pulls, tangents = (points if part is None else part.contiguous() for part in (grad, pull, tangent))
    sizes = {"WIDTH": width, "PADDED": 1 << (width - 1).bit_length()}
    with torch.cuda.device_of(points):
        bound_kernel[(programs,)](grads, pulls, tangents, largest, len(points), **sizes, **flags, **settings)
    return largest.amax(dim=0)


class LinkedFeatures(NamedTuple):
    """Features of N points, and the means to differentiate them along the points once."""

    features: Float[Tensor, "N LC"]
    points: Float[Tensor, "N 3"]
    grid: Grid
    links: tuple[Tensor, Tensor]

    def pull(self, g: Float[Tensor, "N LC"]) -> Float[Tensor, "N 3"]:
        """Return J^T g of every point, J = d(features)/d(point); to be called once if it is to be differentiated."""
        if g.shape != self.features.shape:
            raise ValueError(
                f"g: expected the shape of the features, {tuple(self.features.shape)}, got {tuple(g.shape)}"
            )
        return _Pull.apply(self.points, g, self.grid, *self.links)


def encode_triton(points: Float[Tensor, "N 3"], table: Float[Tensor, "T C"], grid: Grid) -> Float[Tensor, "N LC"]:
    """Return what ``hashgrid.encode`` returns, zeros for closed levels, differentiable once in the table."""
    return _Features.apply(points.detach().contiguous(), table, grid, False)[0]


def encode_linked(points: Float[Tensor, "N 3"], table: Float[Tensor, "T C"], grid: Grid) -> LinkedFeatures:
    """Return the features of ``encode_triton`` in a form that also gives J^T g."""
    points = points.detach().contiguous()
    features, *links = _Features.apply(points, table, grid, True)
    return LinkedFeatures(features, points, grid, (links[0], links[1]))
