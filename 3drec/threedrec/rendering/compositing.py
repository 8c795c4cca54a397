"""Volume rendering on packed samples (Max 1995; Mildenhall et al. 2020, equation 3).

Notation for one ray: segment i has density sigma_i and length delta_i, its optical depth is sigma_i delta_i,
its opacity alpha_i = 1 - exp(-sigma_i delta_i), the transmittance before it T_i = exp(-sum_{j<i} sigma_j delta_j),
its weight w_i = T_i alpha_i. Samples of R rays lie one after another; ``ray_indices`` (N,) must not decrease.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_OPTICAL_DEPTH = 1e3
"""Of one segment: nothing passes it anyway, and sums over many rays stay finite and exact."""


def exclusive_sum(values: Float[Tensor, " N"], ray_indices: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return for each sample the sum of the values before it on the same ray.

    One running sum over all rays, minus what stood at the ray's first sample; in double precision, so that the
    difference of large sums stays exact to the result's own precision.
    """
    if len(values) == 0:
        return values
    if values.is_cuda:
        return ExclusiveSum.apply(values, ray_indices)
    before = torch.cumsum(values.double(), dim=0) - values.double()
    fresh = torch.ones_like(ray_indices, dtype=torch.bool)
    fresh[1:] = ray_indices[1:] != ray_indices[:-1]
    starts = fresh.nonzero()[:, 0]
    first = starts[torch.cumsum(fresh, dim=0) - 1]
    return (before - before[first]).to(values.dtype)


class ExclusiveSum(torch.autograd.Function):
    """`exclusive_sum` without waiting for the device, and without the sorting that differentiating a lookup needs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ray_indices: Tensor) -> Tensor:
        """Return the sums before each sample."""
        ctx.save_for_backward(ray_indices)
        wide = values.double()
        before = torch.cumsum(wide, dim=0).sub_(wide)
        return (before - before[torch.searchsorted(ray_indices, ray_indices)]).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the sums of the gradients after each sample of the same ray."""
        (ray_indices,) = ctx.saved_tensors
        upto = torch.cumsum(grad_outputs[0].double(), dim=0)
        last = torch.searchsorted(ray_indices, ray_indices, right=True).sub_(1)
        return (upto[last] - upto).to(grad_outputs[0].dtype), None


def transmittance_and_opacity(
    density: Float[Tensor, " N"], lengths: Float[Tensor, " N"], ray_indices: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return T_i and alpha_i of every sample."""
    optical_depth = (density * lengths).clamp(max=MAX_OPTICAL_DEPTH)
    return torch.exp(-exclusive_sum(optical_depth, ray_indices)), -torch.expm1(-optical_depth)


def render_weights(
    density: Float[Tensor, " N"], lengths: Float[Tensor, " N"], ray_indices: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return w_i = T_i alpha_i; the weights of a ray sum to its opacity."""
    transmittance, opacity = transmittance_and_opacity(density, lengths, ray_indices)
    return transmittance * opacity


def visible(
    density: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    ray_indices: Int[Tensor, " N"],
    min_transmittance: float = 1e-4,
    min_opacity: float | Float[Tensor, ""] = 0.0,
) -> Tensor:
    """Return which samples can matter: light still reaches them, and they are not clear themselves."""
    transmittance, opacity = transmittance_and_opacity(density, lengths, ray_indices)
    return (transmittance >= min_transmittance) & (opacity >= min_opacity)


def accumulate(
    weights: Float[Tensor, " N"], values: Float[Tensor, "N C"], ray_indices: Int[Tensor, " N"], n_rays: int
) -> Float[Tensor, "R C"]:
    """Return sum_i w_i v_i per ray; rays without samples get zeros."""
    if weights.is_cuda:
        return RaySums.apply(weights, values, ray_indices, n_rays)
    weighted = weights[:, None] * values
    result = weighted.new_zeros(n_rays, values.shape[1])
    return result.scatter_add(0, ray_indices[:, None].expand_as(weighted), weighted)


class RaySums(torch.autograd.Function):
    """`accumulate` by one sum per run of samples: repeatable on a GPU without sorting the samples."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
        """Return the sums, (R, C)."""
        ctx.save_for_backward(weights, values, ray_indices)
        offsets = torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device))
        return torch.segment_reduce(weights[:, None] * values, "sum", offsets=offsets, unsafe=True, initial=0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weights and of the values."""
        weights, values, ray_indices = ctx.saved_tensors
        grad = grad_outputs[0].index_select(0, ray_indices)
        return (grad * values).sum(-1), grad * weights[:, None], None, None


def composite(
    density: Float[Tensor, "N 1"],
    lengths: Float[Tensor, " N"],
    distances: Float[Tensor, "N 1"],
    colors: Float[Tensor, "N 3"],
    normals: Float[Tensor, "N 3"] | None,
    ray_indices: Int[Tensor, " N"],
    n_rays: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "R 8"]]:
    """Return the weights and, per ray, the weighted sums of 1, distance, colour and normal (0 without normals)."""
    weights = render_weights(density[:, 0], lengths, ray_indices)
    columns = [torch.ones_like(distances), distances, colors, *([] if normals is None else [normals])]
    sums = accumulate(weights, torch.cat(columns, dim=-1), ray_indices, n_rays)
    return weights, functional.pad(sums, (0, 8 - sums.shape[1]))
