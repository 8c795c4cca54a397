"""Marching, visibility and compositing on a GPU by Triton kernels, with two waits for the device in all.

Same samples, values and derivatives as ``marching.march``, ``compositing.visible`` and
``compositing.composite``, for segments of one length. Every ray is summed by one program in a fixed order, so results
repeat themselves. With ``TRITON_INTERPRET=1`` everything works on CPU tensors.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from threedrec.rendering.compositing import MAX_OPTICAL_DEPTH
from threedrec.rendering.marching import Intervals
from threedrec.rendering.occupancy import OccupancyGrid
from threedrec.rendering.packed_kernels import (
    composite_backward_kernel,
    composite_kernel,
    march_kernel,
    visible_kernel,
)

STEPS: dict[str, Any] = {"BLOCK": 64, "num_warps": 1}
"""Steps that a program looks at together while it marches."""
SAMPLES: dict[str, Any] = {"BLOCK": 32, "num_warps": 1}
"""Samples that a program sums together."""


@torch.no_grad()
def march_packed(
    rays_o: Float[Tensor, "R 3"],
    rays_d: Float[Tensor, "R 3"],
    grid: OccupancyGrid,
    step_size: float,
    near: float = 0.0,
    far: float = 1e10,
    jitter: Float[Tensor, " R"] | None = None,
    skip: bool = True,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"], Int[Tensor, " R1"]]:
    """Return starts, middle points and offsets of the segments that ``march`` returns for the same arguments."""
    rays_o, rays_d = rays_o.contiguous(), rays_d.contiguous()
    bounds = grid.bounds.to(rays_o.dtype).contiguous()
    if jitter is None:
        jitter = torch.zeros_like(rays_o[:, 0])
    inputs = (rays_o, rays_d, jitter, bounds, grid.binary.view(torch.uint8))
    numbers = (grid.radius, step_size, near, far, grid.resolution)
    flags = {"SKIP": skip, **STEPS}
    counts = torch.zeros(len(rays_o), dtype=torch.int64, device=rays_o.device)
    _launch(march_kernel, counts, *inputs, counts, counts, rays_o, rays_o, *numbers, WRITE=False, **flags)
    offsets, total = _offsets(counts)
    starts, points = rays_o.new_empty(total), rays_o.new_empty(total, 3)
    _launch(march_kernel, counts, *inputs, offsets, counts, starts, points, *numbers, WRITE=True, **flags)
    return starts, points, offsets


@torch.no_grad()
def visible_packed(
    density: Float[Tensor, " N"],
    starts: Float[Tensor, " N"],
    offsets: Int[Tensor, " R1"],
    length: float,
    min_transmittance: float = 1e-4,
    min_opacity: float = 0.0,
) -> Intervals:
    """Return the segments that ``visible`` keeps."""
    counts = torch.zeros(len(offsets) - 1, dtype=torch.int64, device=offsets.device)
    inputs = (density.contiguous(), starts, offsets)
    numbers = (length, MAX_OPTICAL_DEPTH, min_transmittance, min_opacity)
    _launch(visible_kernel, counts, *inputs, counts, counts, counts, starts, *numbers, WRITE=False, **SAMPLES)
    kept, total = _offsets(counts)
    rays, chosen = counts.new_empty(total), starts.new_empty(total)
    _launch(visible_kernel, counts, *inputs, kept, counts, rays, chosen, *numbers, WRITE=True, **SAMPLES)
    return Intervals(rays, chosen, chosen + length)


def composite_packed(
    density: Float[Tensor, "N 1"],
    length: float,
    distances: Float[Tensor, "N 1"],
    colors: Float[Tensor, "N 3"],
    normals: Float[Tensor, "N 3"] | None,
    ray_indices: Int[Tensor, " N"],
    n_rays: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "R 8"]]:
    """Return the weights and, per ray, the weighted sums of 1, distance, colour and normal (0 without normals)."""
    offsets = torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device))
    return _Composite.apply(density, distances, colors, normals, offsets, length)  # type: ignore[no-any-return]


class _Composite(torch.autograd.Function):
    """Forward and backward pass of ``composite_packed``."""

    @staticmethod
    def forward(
        ctx: Any,
        density: Tensor,
        distances: Tensor,
        colors: Tensor,
        normals: Tensor | None,
        offsets: Tensor,
        length: float,
    ) -> tuple[Tensor, Tensor]:
        density, distances, colors = density.contiguous(), distances.contiguous(), colors.contiguous()
        # Without normals any tensor stands in for them; it is never read.
        directions = colors if normals is None else normals.contiguous()
        weights, through = (density.new_empty(len(density)) for _ in range(2))
        sums = density.new_empty(len(offsets) - 1, 8)
        inputs = (density, distances, colors, directions, offsets, weights, through)
        flags = {"NORMALS": normals is not None, **SAMPLES}
        _launch(composite_kernel, sums, *inputs, sums, length, MAX_OPTICAL_DEPTH, **flags)
        ctx.save_for_backward(*inputs)
        ctx.length, ctx.flags = length, flags
        return weights, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        density, _, colors, normals, *_ = inputs = ctx.saved_tensors
        grads = [torch.empty_like(density), torch.empty_like(colors), torch.empty_like(normals)]
        given = (grad_weights.contiguous(), grad_sums.contiguous())
        numbers = (ctx.length, MAX_OPTICAL_DEPTH)
        _launch(composite_backward_kernel, grad_sums, *inputs, *given, *grads, *numbers, **ctx.flags)
        return grads[0], None, grads[1], grads[2] if ctx.flags["NORMALS"] else None, None, None


def _launch(kernel: Any, rays: Tensor, *arguments: Any, **flags: Any) -> None:
    """Run a kernel with one program per row of ``rays``."""
    if len(rays):
        with torch.cuda.device_of(rays):
            kernel[(len(rays),)](*arguments, **flags)


def _offsets(counts: Int[Tensor, " R"]) -> tuple[Int[Tensor, " R1"], int]:
    """Return where each ray's samples begin, and their number, for which it waits."""
    offsets = functional.pad(torch.cumsum(counts, dim=0), (1, 0))
    return offsets, int(offsets[-1])
