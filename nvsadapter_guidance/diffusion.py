"""Diffusion arithmetic as small pure functions: schedules, predictions, guidance, score distillation.

Notation: a = alphas_cumprod[t]; variance-preserving noisy latents are x_t = sqrt(a) x_0 + sqrt(1 - a) e. Latents are
[B, n, c, h, w] (views of a sample share its timestep) or any shape that starts with the batch.
"""

from typing import Literal, Optional, Tuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.errors import InputError

PredictionType = Literal["epsilon", "v_prediction"]


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


def guide(
    unconditional: Float[Tensor, "*any"], conditional: Float[Tensor, "*any"], scale: float
) -> Float[Tensor, "*any"]:
    """Classifier-free guidance u + s (c - u) (Ho & Salimans 2022, eq. 6, with s = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


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
