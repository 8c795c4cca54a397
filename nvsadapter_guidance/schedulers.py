"""Samplers by name: Euler's method as released, and diffusers' multistep solvers on the schedule of a set of weights.

All work on variance-preserving latents ``x_t = sqrt(a) x_0 + sqrt(1 - a) e``, and all are configured by
``trained_betas``, so that diffusers' idiom ``Other.from_config(pipeline.scheduler.config)`` leads to another solver of
the same schedule.
"""

from dataclasses import dataclass
from typing import Any, Optional, Sequence, Union

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.schedule import NoiseSchedule


@dataclass
class EulerSchedulerOutput(BaseOutput):
    """Result of one step."""

    prev_sample: Tensor
    """Latents at the next, lower noise level."""
    pred_original_sample: Tensor
    """Clean latents that the prediction stands for."""


class EulerScheduler(SchedulerMixin, ConfigMixin):
    """The released sampler: Euler's method on the probability flow ODE, 50 steps of it by default.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its second-order correction, at the noise levels of
    `diffusion.sampling_timesteps`. The release writes it for variance-exploding latents ``y = x_0 + s e`` with
    ``s = sqrt((1 - a) / a)``: ``y' = y + (s' - s) (y - x_0) / s = x_0 + s' e``. Divided by
    ``sqrt(1 + s'^2)`` that is the step taken here, ``x' = sqrt(a') x_0 + sqrt(1 - a') e``, which stays finite where
    ``a`` is zero, and which is deterministic DDIM (Song et al. 2021, arXiv 2010.02502, Eq. 12 with sigma 0).

    Args:
        num_train_timesteps: steps of the noise schedule.
        trained_betas: its betas; None for Stable Diffusion's.
        prediction_type: ``epsilon`` or ``v_prediction``.
        rescale_betas_zero_snr, timestep_spacing, clip_sample: no effect here; they tell diffusers' schedulers, when
            built from this configuration, that the last timestep is pure noise, that sampling starts there, and that
            latents have no bounds.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        trained_betas: Optional[Sequence[float]] = None,
        prediction_type: diffusion.PredictionType = "epsilon",
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str = "trailing",
        clip_sample: bool = False,
    ) -> None:
        if trained_betas is None:
            self.alphas_cumprod = diffusion.legacy_alphas_cumprod(num_train_timesteps)
        else:
            self.alphas_cumprod = torch.cumprod(1.0 - torch.tensor(trained_betas, dtype=torch.float64), dim=0)
        self.timesteps: Int[Tensor, " steps"] = torch.arange(num_train_timesteps - 1, -1, -1)
        self._steps, self._table = self.timesteps.tolist(), self.alphas_cumprod

    def set_timesteps(self, num_inference_steps: int, device: Union[str, torch.device, None] = None) -> None:
        """Choose the timesteps of the next sample.

        Raises:
            InputError: the number is not between 1 and the number of training steps.
        """
        timesteps = diffusion.sampling_timesteps(num_inference_steps, len(self.alphas_cumprod))
        # Numbers on the host and the table on the device: no step waits for the one before it.
        self._steps, self._table = timesteps.tolist(), self.alphas_cumprod.to(device)
        self.timesteps = timesteps.to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents as they are: they already have the scale that networks see."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, "B *rest"],
        timestep: Union[int, Int[Tensor, ""]],
        sample: Float[Tensor, "B *rest"],
        return_dict: bool = True,
    ) -> Union[EulerSchedulerOutput, tuple[Tensor, Tensor]]:
        """From ``timestep`` to the next one; from the last one to the clean latents."""
        step, table = int(timestep), self._table
        now = torch.full((len(sample),), step, device=sample.device)
        clean, noise = diffusion.split_prediction(model_output, sample, now, table, self.config.prediction_type)
        lower = next((later for later in self._steps if later < step), None)
        following = clean if lower is None else diffusion.add_noise(clean, noise, torch.full_like(now, lower), table)
        return EulerSchedulerOutput(following, clean) if return_dict else (following, clean)


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
}
"""Classes by the names that commands take, with the options that differ from diffusers' defaults. They are given even
where they are our own default: ``from_config`` of another class takes over only what was given.

diffusers' DDIM steps by a whole number of timesteps: it equals Euler's method where the number of steps divides that of
training steps, and drifts otherwise.
"""


def build_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """The scheduler called ``euler``, ``ddim``, ``dpm++`` or ``unipc``, for a model's noise schedule.

    Where the last timestep is pure noise, diffusers' solvers are told so (``rescale_betas_zero_snr``, Lin et al. 2023,
    arXiv 2305.08891): it leaves such betas as they are and keeps their ``1 / sqrt(a)`` finite. All start at the last
    timestep ("trailing" spacing, Table 2 of that paper).

    Raises:
        InputError: there is no scheduler of that name.
    """
    if name not in SCHEDULERS:
        raise InputError(f"scheduler '{name}' is unknown; use one of {', '.join(SCHEDULERS)}")
    kind, options = SCHEDULERS[name]
    return kind(
        num_train_timesteps=schedule.num_train_timesteps,
        trained_betas=schedule.betas().tolist(),
        prediction_type=schedule.prediction_type,
        rescale_betas_zero_snr=float(schedule.alphas_cumprod[-1]) == 0.0,
        timestep_spacing="trailing",
        **options,
    )
