"""The noise schedule of a set of weights: its table, what its network predicts, and the arithmetic bound to them."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.errors import InputError


class NoiseSchedule(nn.Module):
    """A table of ``alphas_cumprod`` with a prediction type; see ``nvsadapter_guidance.diffusion`` for the formulae.

    Args:
        kind: ``scaled_linear``, Stable Diffusion's table (Rombach et al. 2022), or ``cosine`` (Nichol & Dhariwal 2021),
            here with the last timestep pure noise (Lin et al. 2023, arXiv 2305.08891).
        shift: factor on the signal-to-noise amplitude (Hoogeboom et al. 2023); below one means more noise.
        prediction_type: ``epsilon`` or ``v_prediction``.

    Raises:
        InputError: an unknown kind or prediction type.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        kind: str = "cosine",
        shift: float = 0.5,
        prediction_type: str = "v_prediction",
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"schedule.prediction_type: '{prediction_type}' is not one of epsilon, v_prediction")
        if kind not in ("scaled_linear", "cosine"):
            raise InputError(f"schedule.kind: '{kind}' is not one of scaled_linear, cosine")
        self.prediction_type: diffusion.PredictionType = prediction_type  # type: ignore[assignment]
        self.num_train_timesteps = num_train_timesteps
        linear = kind == "scaled_linear"
        table = diffusion.legacy_alphas_cumprod(num_train_timesteps) if linear else _cosine(num_train_timesteps)
        self.register_buffer("alphas_cumprod", diffusion.shift_schedule(table, shift).float(), persistent=False)

    def add_noise(
        self, clean: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"], timesteps: Int[Tensor, " B"]
    ) -> Float[Tensor, "B *rest"]:
        """Noisy latents at ``timesteps``."""
        return diffusion.add_noise(clean, noise, timesteps, self.alphas_cumprod)

    def target(
        self, clean: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"], timesteps: Int[Tensor, " B"]
    ) -> Float[Tensor, "B *rest"]:
        """What the network is trained to return."""
        return diffusion.training_target(clean, noise, timesteps, self.alphas_cumprod, self.prediction_type)

    def split(
        self, noisy: Float[Tensor, "B *rest"], prediction: Float[Tensor, "B *rest"], timesteps: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B *rest"], Float[Tensor, "B *rest"]]:
        """Clean latents and noise that a prediction stands for."""
        return diffusion.split_prediction(prediction, noisy, timesteps, self.alphas_cumprod, self.prediction_type)

    def betas(self) -> Float[Tensor, " timesteps"]:
        """The steps ``1 - a[t] / a[t - 1]`` of the table, float64: what diffusers calls ``trained_betas``."""
        table = self.alphas_cumprod.double().cpu()
        return 1.0 - table / torch.cat((table.new_ones(1), table[:-1]))


def _cosine(steps: int) -> Float[Tensor, " steps"]:
    table = torch.cos(0.5 * math.pi * torch.arange(1, steps + 1, dtype=torch.float64) / steps) ** 2
    # cos(pi / 2) is not zero in floating point; the last timestep is to hold no signal at all.
    table[-1] = 0.0
    return table
