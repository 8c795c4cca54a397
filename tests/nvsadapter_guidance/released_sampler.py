"""The released sampler and training loss in their own variance-exploding form, twins of what the library computes.

x = x_0 + sigma e with sigma = sqrt((1 - a) / a) is the variance-preserving form divided by sqrt(a), which networks see.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.diffusion import sampling_timesteps

Denoiser = Callable[[Tensor, Tensor], Tensor]


def sigmas_from_alphas(alphas_cumprod: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
    """Variance-exploding noise levels sqrt((1 - a) / a), float32."""
    return ((1.0 - alphas_cumprod) / alphas_cumprod).to(torch.float32).sqrt()


def sampling_sigmas(alphas_cumprod: Float[Tensor, "timesteps"], num_steps: int) -> Float[Tensor, "levels"]:
    """Descending noise levels of `sampling_timesteps` with a final 0, float32."""
    timesteps = sampling_timesteps(num_steps, alphas_cumprod.shape[0]).to(alphas_cumprod.device)
    sigmas = sigmas_from_alphas(alphas_cumprod[timesteps])
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def quantise_sigma(
    sigma: Float[Tensor, "B"], table: Float[Tensor, "timesteps"]
) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
    """The nearest noise level of the ascending table, and its index, which is the network's timestep."""
    index = (sigma[:, None] - table).abs().argmin(dim=1)
    return table[index], index


def denoise(
    network: Denoiser, x: Float[Tensor, "B *rest"], sigma: Float[Tensor, "B"], table: Float[Tensor, "timesteps"]
) -> Float[Tensor, "B *rest"]:
    """Clean latents x - sigma e of variance-exploding `x`, where e = network(x / sqrt(1 + sigma^2), timestep)."""
    level, index = quantise_sigma(sigma, table)
    level = broadcast(level, x)
    return x - level * network(x / (1.0 + level**2).sqrt(), index)


def euler_steps(
    denoise_fn: Denoiser, noise: Float[Tensor, "B *rest"], sigmas: Float[Tensor, "levels"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler's method on the probability flow ODE, no churn (Karras et al. 2022, algorithm 1 without 2nd order).

    Args:
        denoise_fn: (x, sigma [B]) -> clean latents.
        noise: unit gaussian; not modified.
        sigmas: descending, last one 0 (`sampling_sigmas`).

    Yields:
        (x after the step, clean latents predicted at the step), one pair a step.
    """
    x = noise * (1.0 + sigmas[0] ** 2).sqrt()
    for sigma, following in pairwise(sigmas):
        clean = denoise_fn(x, sigma.expand(x.shape[0]))
        x = x + (x - clean) / sigma * (following - sigma)
        yield x, clean


def euler_sample(
    denoise_fn: Denoiser, noise: Float[Tensor, "B *rest"], sigmas: Float[Tensor, "levels"]
) -> Float[Tensor, "B *rest"]:
    """The last x of `euler_steps`."""
    *_, (samples, _) = euler_steps(denoise_fn, noise, sigmas)
    return samples


def x0_loss(
    prediction: Float[Tensor, "B *rest"], latents: Float[Tensor, "B *rest"], sigma: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Training loss per sample: mean of (x0_pred - x0)^2 / sigma^2, which equals the mean squared noise error."""
    return ((prediction - latents) ** 2 / broadcast(sigma, latents) ** 2).flatten(1).mean(dim=1)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
