"""Triton kernels that turn the network's raw density into the density, forward and backward: bias, softplus, box.

In PyTorch the same takes a dozen passes over memory, half of them for rows of three numbers.
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
from torch.autograd.function import once_differentiable

from threedrec.field.hashgrid_kernels import load_vector

SETTINGS: dict[str, Any] = {"BLOCK": 512, "num_warps": 4}
LINEAR = tl.constexpr(20.0)
"""From here on softplus is what it is given, as in PyTorch."""


@triton.jit
def biased(raw, points, index, inside, RADIUS, BIAS: tl.constexpr, SCALE, STD):
    """Return the raw density with its bias, and whether the point lies in the box."""
    x, y, z = load_vector(points, index, inside)
    value = tl.load(raw + index, mask=inside, other=0.0)
    if BIAS == "number":
        value += SCALE
    else:
        squared = x * x + y * y + z * z
        if BIAS == "blob_magic3d":
            value += SCALE * (1.0 - tl.sqrt(squared) / STD)
        else:
            value += SCALE * tl.exp(-0.5 * squared / (STD * STD))
    return value, (tl.abs(x) <= RADIUS) & (tl.abs(y) <= RADIUS) & (tl.abs(z) <= RADIUS)


@triton.jit
def softplus(x):
    """Return log(1 + e^x) to all digits: log(w) u / (w - 1) for w = 1 + u (Higham 2002, section 1.14.1)."""
    u = tl.exp(tl.where(x > LINEAR, LINEAR, x))  # not a minimum, in which what is no number would get lost
    w = 1.0 + u
    return tl.where(x > LINEAR, x, tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit(do_not_specialize=["count"])
def density_kernel(
    raw, points, density, count,
    RADIUS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``density`` (N, 1) = softplus(raw + bias), zero outside of the box."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value, within = biased(raw, points, index, inside, RADIUS, BIAS, SCALE, STD)
    tl.store(density + index, softplus(value) * within, mask=inside)


@triton.jit(do_not_specialize=["count"])
def density_backward_kernel(
    raw, points, grad, grad_raw, count,
    RADIUS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``grad_raw`` = g sigmoid(raw + bias), zero outside of the box."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value, within = biased(raw, points, index, inside, RADIUS, BIAS, SCALE, STD)
    slope = tl.where(value > LINEAR, 1.0, 1.0 / (1.0 + tl.exp(-value)))
    tl.store(grad_raw + index, tl.load(grad + index, mask=inside, other=0.0) * slope * within, mask=inside)


class _Density(torch.autograd.Function):
    """softplus(raw + bias) in the box, differentiable once in ``raw``."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, points: Tensor, flags: dict[str, Any]) -> Tensor:
        raw, points = raw.contiguous(), points.contiguous()
        density = torch.empty_like(raw)
        _launch(density_kernel, raw, points, density, **flags)
        ctx.save_for_backward(raw, points)
        ctx.flags = flags
        return density

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raw, points = ctx.saved_tensors
        grad_raw = torch.empty_like(raw)
        _launch(density_backward_kernel, raw, points, grad_outputs[0].contiguous(), grad_raw, **ctx.flags)
        return grad_raw, None, None


def _launch(kernel: Any, rows: Tensor, *tensors: Tensor, **flags: Any) -> None:
    if len(rows):
        with torch.cuda.device_of(rows):
            kernel[(-(-len(rows) // SETTINGS["BLOCK"]),)](rows, *tensors, len(rows), **flags, **SETTINGS)


def density_triton(
    raw: Float[Tensor, "N 1"], points: Float[Tensor, "N 3"], radius: float, bias: float | str, scale: float, std: float
) -> Float[Tensor, "N 1"]:
    """Return softplus(``raw`` + bias), zero outside of the box.

    Args:
        raw: the network's density.
        points: world; get no gradient.
        radius: half side of the box.
        bias: ``density_bias`` of the volume; then ``scale`` and ``std`` of its blob do not matter if it is a number.
        scale, std: of the blob.
    """
    kind, height = (bias, scale) if isinstance(bias, str) else ("number", float(bias))
    return _Density.apply(raw, points, {"RADIUS": radius, "BIAS": kind, "SCALE": height, "STD": std})
