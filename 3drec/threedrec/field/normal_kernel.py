"""Triton kernels that turn the raw density's gradient along the lookup into a normal, forward and backward.

In PyTorch the same takes some twenty passes over memory, half of them for rows of three numbers.
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

SETTINGS: dict[str, Any] = {"BLOCK": 256, "num_warps": 4}


@triton.jit
def store_vector(vectors, index, inside, x, y, z):
    """Write the three components of (N, 3) rows."""
    tl.store(vectors + index * 3, x, mask=inside)
    tl.store(vectors + index * 3 + 1, y, mask=inside)
    tl.store(vectors + index * 3 + 2, z, mask=inside)


@triton.jit(do_not_specialize=["count"])
def normal_kernel(
    pulled, points, normal, inverse, count,
    FACTOR: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``normal`` = -w / |w| and ``inverse`` (N, 1) = 1 / |w|, where w = FACTOR ``pulled`` + the bias's gradient."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x, y, z = load_vector(pulled, index, inside)
    x, y, z = x * FACTOR, y * FACTOR, z * FACTOR
    if BIAS != "none":
        place_x, place_y, place_z = load_vector(points, index, inside)
        squared = place_x * place_x + place_y * place_y + place_z * place_z
        if BIAS == "blob_magic3d":
            factor = -SCALE / STD / tl.maximum(tl.sqrt(squared), 1e-12)
        else:
            factor = -SCALE / (STD * STD) * tl.exp(-0.5 * squared / (STD * STD))
        x, y, z = x + factor * place_x, y + factor * place_y, z + factor * place_z
    over = 1.0 / tl.maximum(tl.sqrt(x * x + y * y + z * z), 1e-12)
    store_vector(normal, index, inside, -x * over, -y * over, -z * over)
    tl.store(inverse + index, over, mask=inside)


@triton.jit(do_not_specialize=["count"])
def normal_backward_kernel(normal, inverse, grad, grad_pulled, count, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """``grad_pulled`` = -FACTOR (g - n (n . g)) / |w|: only what turns the normal counts."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x, y, z = load_vector(normal, index, inside)
    grad_x, grad_y, grad_z = load_vector(grad, index, inside)
    along = x * grad_x + y * grad_y + z * grad_z
    factor = -FACTOR * tl.load(inverse + index, mask=inside, other=0.0)
    x, y, z = factor * (grad_x - x * along), factor * (grad_y - y * along), factor * (grad_z - z * along)
    store_vector(grad_pulled, index, inside, x, y, z)


class _Normal(torch.autograd.Function):
    """-w / |w|, differentiable once in ``pulled``."""

    @staticmethod
    def forward(
        ctx: Any, pulled: Tensor, points: Tensor, factor: float, bias: str, scale: float, std: float
    ) -> Float[Tensor, "N 3"]:
        pulled, points = pulled.contiguous(), points.contiguous()
        normal, inverse = torch.empty_like(pulled), pulled.new_empty(len(pulled), 1)
        flags = {"FACTOR": factor, "BIAS": bias, "SCALE": scale, "STD": std}
        _launch(normal_kernel, pulled, points, normal, inverse, **flags)
        ctx.save_for_backward(normal, inverse)
        ctx.factor = factor
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse = ctx.saved_tensors
        grad_pulled = torch.empty_like(normal)
        _launch(normal_backward_kernel, normal, inverse, grad_outputs[0].contiguous(), grad_pulled, FACTOR=ctx.factor)
        return grad_pulled, None, None, None, None, None


def _launch(kernel: Any, rows: Tensor, *tensors: Tensor, **flags: Any) -> None:
    if len(rows):
        with torch.cuda.device_of(rows):
            kernel[(-(-len(rows) // SETTINGS["BLOCK"]),)](rows, *tensors, len(rows), **flags, **SETTINGS)


def normal_triton(
    pulled: Float[Tensor, "N 3"],
    points: Float[Tensor, "N 3"],
    factor: float,
    bias: float | str,
    scale: float,
    std: float,
) -> Float[Tensor, "N 3"]:
    """Return -w / |w|, w = ``factor`` ``pulled`` + the gradient of the density's bias at ``points``.

    Args:
        pulled: the MLP's gradient along the lookup's coordinates.
        points: world; get no gradient.
        factor: from those coordinates to the world.
        bias: ``density_bias`` of the volume; a number has no gradient.
        scale, std: of the blob.
    """
    return _Normal.apply(pulled, points, factor, bias if isinstance(bias, str) else "none", scale, std)
