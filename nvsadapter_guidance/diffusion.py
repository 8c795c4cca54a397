"""Diffusion arithmetic as small pure functions: schedules, predictions, guidance, sampling, score distillation.

Notation: a = alphas_cumprod[t]; variance-preserving noisy latents are x_t = sqrt(a) x_0 + sqrt(1 - a) e. The released
model is sampled in the variance-exploding form x = x_0 + sigma e with sigma = sqrt((1 - a) / a), which is the same
thing divided by sqrt(a); networks always see the variance-preserving scale. Latents are [B, n, c, h, w] (views of a
sample share its timestep) or any shape that starts with the batch.
"""

from itertools import pairwise
from typing import Callable, Iterator, Literal, Optional, Tuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.errors import InputError

PredictionType = Literal["epsilon", "v_prediction"]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def legacy_alphas_cumprod(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float[Tensor, "timesteps"]:
    """Stable Diffusion's schedule, linear in sqrt(beta), float64 (Rombach et al. 2022, appendix)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def shift_schedule(alphas_cumprod: Float[Tensor, "timesteps"], factor: float) -> Float[Tensor, "timesteps"]:
    """Multiply the signal-to-noise ratio by factor^2 (Hoogeboom et al. 2023, eq. 4); factor < 1 means more noise.

    For a schedule tuned at resolution r and used at resolution s the paper's factor is r / s.
    """
    signal = factor**2 * alphas_cumprod
    return signal / (signal + 1.0 - alphas_cumprod)


def sigmas_from_alphas(alphas_cumprod: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
    """Variance-exploding noise levels sqrt((1 - a) / a), float32."""
    return ((1.0 - alphas_cumprod) / alphas_cumprod).to(torch.float32).sqrt()


def sampling_timesteps(num_steps: int, num_timesteps: int = 1000) -> Int[Tensor, "steps"]:
    """Descending timesteps spread evenly from the last one, e.g. 999, 979, ..., 19 for 50 of 1000.

    Raises:
        InputError: `num_steps` is not between 1 and `num_timesteps`.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(f"number of sampling steps is {num_steps}; use 1 to {num_timesteps}")
    if num_steps == num_timesteps:
        return torch.arange(num_timesteps - 1, -1, -1)
    # linspace(last, 0) with `num_steps` intervals, end point left out, truncated as in the released sampler.
    return ((num_timesteps - 1) * (1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps)).long()


def sampling_sigmas(alphas_cumprod: Float[Tensor, "timesteps"], num_steps: int) -> Float[Tensor, "levels"]:
    """Descending noise levels of `sampling_timesteps` with a final 0, float32."""
    timesteps = sampling_timesteps(num_steps, alphas_cumprod.shape[0]).to(alphas_cumprod.device)
    sigmas = sigmas_from_alphas(alphas_cumprod[timesteps])
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def add_noise(
    latents: Float[Tensor, "B *rest"],
    noise: Float[Tensor, "B *rest"],
    timesteps: Int[Tensor, "B"],
    alphas_cumprod: Float[Tensor, "timesteps"],
) -> Float[Tensor, "B *rest"]:
    """Variance-preserving noisy latents sqrt(a) x_0 + sqrt(1 - a) e (Ho et al. 2020, eq. 4)."""
    signal, deviation = _levels(alphas_cumprod, timesteps, latents)
    return signal * latents + deviation * noise


def training_target(
    latents: Float[Tensor, "B *rest"],
    noise: Float[Tensor, "B *rest"],
    timesteps: Int[Tensor, "B"],
    alphas_cumprod: Float[Tensor, "timesteps"],
    prediction_type: PredictionType,
) -> Float[Tensor, "B *rest"]:
    """What the network is trained to output: e, or v = sqrt(a) e - sqrt(1 - a) x_0 (Salimans & Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return noise
    signal, deviation = _levels(alphas_cumprod, timesteps, latents)
    return signal * noise - deviation * latents


def split_prediction(
    prediction: Float[Tensor, "B *rest"],
    noisy: Float[Tensor, "B *rest"],
    timesteps: Int[Tensor, "B"],
    alphas_cumprod: Float[Tensor, "timesteps"],
    prediction_type: PredictionType,
) -> Tuple[Float[Tensor, "B *rest"], Float[Tensor, "B *rest"]]:
    """Clean latents and noise that a prediction on variance-preserving `noisy` latents stands for."""
    signal, deviation = _levels(alphas_cumprod, timesteps, noisy)
    if prediction_type == "epsilon":
        return (noisy - deviation * prediction) / signal, prediction
    return signal * noisy - deviation * prediction, signal * prediction + deviation * noisy


def quantise_sigma(
    sigma: Float[Tensor, "B"], table: Float[Tensor, "timesteps"]
) -> Tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
    """The nearest noise level of the ascending table, and its index, which is the network's timestep."""
    index = (sigma[:, None] - table).abs().argmin(dim=1)
    return table[index], index


def denoise(
    network: Denoiser, x: Float[Tensor, "B *rest"], sigma: Float[Tensor, "B"], table: Float[Tensor, "timesteps"]
) -> Float[Tensor, "B *rest"]:
    """Clean latents x - sigma e of variance-exploding `x`, where e = network(x / sqrt(1 + sigma^2), timestep)."""
    level, index = quantise_sigma(sigma, table)
    level = _broadcast(level, x)
    return x - level * network(x / (1.0 + level**2).sqrt(), index)


def guide(
    unconditional: Float[Tensor, "*any"], conditional: Float[Tensor, "*any"], scale: float
) -> Float[Tensor, "*any"]:
    """Classifier-free guidance u + s (c - u) (Ho & Salimans 2022, eq. 6, with s = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def euler_steps(
    denoise_fn: Denoiser, noise: Float[Tensor, "B *rest"], sigmas: Float[Tensor, "levels"]
) -> Iterator[Tuple[Tensor, Tensor]]:
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
    return ((prediction - latents) ** 2 / _broadcast(sigma, latents) ** 2).flatten(1).mean(dim=1)


def draw_timesteps(groups: int, min_step: int, max_step: int, generator: torch.Generator) -> Int[Tensor, "groups"]:
    """One timestep per group, uniform on min_step..max_step, both included; on the generator's device."""
    return torch.randint(min_step, max_step + 1, (groups,), generator=generator, device=generator.device)


def sds_gradient(
    latents: Float[Tensor, "B *rest"],
    noise: Float[Tensor, "B *rest"],
    timesteps: Int[Tensor, "B"],
    prediction: Float[Tensor, "B *rest"],
    alphas_cumprod: Float[Tensor, "timesteps"],
    prediction_type: PredictionType = "epsilon",
    max_norm: Optional[float] = None,
) -> Float[Tensor, "B *rest"]:
    """Score distillation (Poole et al. 2023, eq. 3): w (e_pred - e) with w = 1 - a. Not a number becomes 0.

    Args:
        latents: clean latents, whose `add_noise` at `timesteps` the network saw.
        prediction: the network's guided output.
        max_norm: clip the entries to [-max_norm, max_norm]; None: no clipping.
    """
    noisy = add_noise(latents, noise, timesteps, alphas_cumprod)
    _, predicted_noise = split_prediction(prediction, noisy, timesteps, alphas_cumprod, prediction_type)
    weight = _broadcast((1.0 - alphas_cumprod.to(timesteps.device))[timesteps].to(latents), latents)
    gradient = torch.nan_to_num(weight * (predicted_noise - noise))
    return gradient if max_norm is None else gradient.clamp(-max_norm, max_norm)


def sds_loss(latents: Float[Tensor, "N *rest"], gradient: Float[Tensor, "N *rest"]) -> Float[Tensor, ""]:
    """Surrogate whose value is 0.5 sum(gradient^2) / N and whose gradient in `latents` is gradient / N, N views."""
    gradient = gradient.detach()
    # The difference is zero in value; only its derivative counts, so no rounding enters through the latents.
    linear = ((latents - latents.detach()) * gradient).sum()
    return (0.5 * (gradient**2).sum() + linear) / latents.shape[0]


def _levels(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> Tuple[Tensor, Tensor]:
    alphas = alphas_cumprod.to(timesteps.device)[timesteps]
    return _broadcast(alphas.sqrt().to(like), like), _broadcast((1.0 - alphas).sqrt().to(like), like)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
