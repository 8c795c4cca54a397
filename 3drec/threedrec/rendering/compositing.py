"""Volume rendering on packed samples (Max 1995; Mildenhall et al. 2020, equation 3).

Notation for one ray: segment i has density sigma_i and length delta_i, its optical depth is sigma_i delta_i,
its opacity alpha_i = 1 - exp(-sigma_i delta_i), the transmittance before it T_i = exp(-sum_{j<i} sigma_j delta_j),
its weight w_i = T_i alpha_i. Samples of R rays lie one after another; ``ray_indices`` (N,) must not decrease.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_OPTICAL_DEPTH = 1e3
"""Of one segment: nothing passes it anyway, and sums over many rays stay finite and exact."""


def exclusive_sum(values: Float[Tensor, " N"], ray_indices: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return for each sample the sum of the values before it on the same ray.

    One running sum over all rays, minus what stood at the ray's first sample; in double precision, so that the
    difference of large sums stays exact to the result's own precision.
    """
    if len(values) == 0:
        return values
    before = torch.cumsum(values.double(), dim=0) - values.double()
    fresh = torch.ones_like(ray_indices, dtype=torch.bool)
    fresh[1:] = ray_indices[1:] != ray_indices[:-1]
    starts = fresh.nonzero()[:, 0]
    first = starts[torch.cumsum(fresh, dim=0) - 1]
    return (before - before[first]).to(values.dtype)


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
    min_opacity: float = 0.0,
) -> Tensor:
    """Return which samples can matter: light still reaches them, and they are not clear themselves."""
    transmittance, opacity = transmittance_and_opacity(density, lengths, ray_indices)
    return (transmittance >= min_transmittance) & (opacity >= min_opacity)


def accumulate(
    weights: Float[Tensor, " N"], values: Float[Tensor, "N C"], ray_indices: Int[Tensor, " N"], n_rays: int
) -> Float[Tensor, "R C"]:
    """Return sum_i w_i v_i per ray; rays without samples get zeros."""
    weighted = weights[:, None] * values
    result = weighted.new_zeros(n_rays, values.shape[1])
    return result.scatter_add(0, ray_indices[:, None].expand_as(weighted), weighted)
