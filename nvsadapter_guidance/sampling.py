"""Sampling of views: any number of them, in groups that the network denoises together, with any scheduler."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, SupportConditions, guided_prediction
from nvsadapter_guidance.schedulers import EulerScheduler, build_scheduler


def view_groups(
    count: int, size: int, step: int = 0, rotating: bool = False, device: torch.device | None = None
) -> Int[Tensor, "groups size"]:
    """Divide ``count`` views (a multiple of ``size``) into groups: neighbours, or groups that differ from step to step.

    When ``rotating``, neighbours, neighbours shifted by half a group, and views spread over the whole orbit take turns,
    so that over a few steps every view is denoised together with all others: overlapping groups without denoising a
    view twice.
    """
    views = torch.arange(count, device=device)
    if not rotating:
        return views.view(count // size, size)
    if step % 3 == 2:
        return views.view(size, count // size).T
    return views.roll(-(size // 2) * (step % 3)).view(count // size, size)


@dataclass
class SamplingOptions:
    """How views are sampled.

    Raises:
        InputError: a number is out of range or no whole one.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    """Of classifier-free guidance; 1 is the conditional prediction alone."""
    num_query: int | None = None
    """Views denoised together; None for as many as the model was trained with."""
    rotating_groups: bool = True
    """Views change their groups from step to step (`view_groups`), which makes many views agree with each other."""
    groups_per_call: int = 8
    """Groups denoised in one network call; fewer need less memory."""
    noise_scale: float | None = None
    """Factor on the noise that sampling starts from; None for what suits the weights (``sampling_noise``)."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "num_query", "groups_per_call"):
            value = getattr(self, name)
            if value is not None and (value < 1 or not float(value).is_integer()):
                raise InputError(f"{name} is {value}; use a whole number of 1 or more")
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise InputError(f"guidance_scale is {self.guidance_scale}; use 0 or more (1 switches guidance off)")
        if self.noise_scale is not None and not 0.0 <= self.noise_scale < float("inf"):
            raise InputError(f"noise_scale is {self.noise_scale}; use 0 or more (1 is the noise of training)")


OnStep = Callable[[int, int, Tensor], Tensor | None]
"""Called as ``on_step(index, timestep, latents)`` after every step; latents it returns take the place of the step's."""


@torch.no_grad()
def sample_latents(
    model: NVSModel,
    conditions: SupportConditions,
    poses: Poses,
    generator: torch.Generator,
    options: SamplingOptions,
    scheduler: Any = None,
    noise: Float[Tensor, "V C h w"] | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "V C h w"]:
    """Sample latents of views of the object, in the order of ``poses``.

    Args:
        poses: any number of cameras; an incomplete group is filled up with repeated views that are then dropped.
        scheduler: of `schedulers.build_scheduler`, or any of diffusers' for the model's schedule; None for Euler's.
        noise: unit gaussian to start from, one per view, before ``options.noise_scale``; drawn when None.

    Raises:
        InputError: no pose was given, the noise is for other views or of another size, or the scheduler cannot solve
            the model's schedule.
    """
    wanted, size = len(poses), options.num_query or model.num_query
    if wanted == 0 or (noise is not None and len(noise) != wanted):
        given = "" if noise is None else f" and noise for {len(noise)}"
        raise InputError(f"sampling needs at least one view and as much noise, got {wanted} views{given}")
    device = conditions.latents.device
    order = torch.arange(-(-wanted // size) * size, device=device) % wanted
    poses = poses[order]
    latents = _first_noise(conditions, order, generator, noise)
    scheduler = build_scheduler("euler", model.schedule) if scheduler is None else scheduler
    scheduler.set_timesteps(options.num_inference_steps, device=device)
    noise_scale = model.config.sampling_noise if options.noise_scale is None else options.noise_scale
    latents = latents * (scheduler.init_noise_sigma * noise_scale)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in accepted else {}
    # diffusers' schedulers want their own tensors; ours takes a number, which needs no waiting for the device.
    numbers = scheduler.timesteps.tolist()
    steps = numbers if isinstance(scheduler, EulerScheduler) else scheduler.timesteps
    for index, timestep in enumerate(steps):
        noisy = scheduler.scale_model_input(latents, timestep)
        prediction = torch.empty_like(latents)
        groups = view_groups(len(order), size, index, options.rotating_groups, device)
        for chunk in groups.split(options.groups_per_call):
            t = torch.full((len(chunk),), numbers[index], device=device)
            prediction[chunk] = guided_prediction(
                model, conditions, noisy[chunk], t, poses[chunk], options.guidance_scale, generator
            )
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
        changed = None if on_step is None else on_step(index, numbers[index], latents[:wanted])
        if changed is not None:
            latents = changed[order]
    if not bool(latents.isfinite().all()):
        raise InputError(
            f"sampling with {type(scheduler).__name__} left the finite numbers; use euler, ddim, dpm++ or unipc, whose "
            "first step may be pure noise, and a network in bfloat16 or float32"
        )
    return latents[:wanted]


def _first_noise(
    conditions: SupportConditions, order: Int[Tensor, " N"], generator: torch.Generator, given: Tensor | None
) -> Float[Tensor, "N C h w"]:
    shape, device = (len(order), *conditions.latents.shape[2:]), order.device
    noise = randn_tensor(shape, generator, device, torch.float32) if given is None else given.to(device)[order].float()
    if noise.shape != shape:
        raise InputError(f"noise has the size {tuple(noise.shape[1:])} a view; the model's latents have {shape[1:]}")
    return noise


@torch.no_grad()
def sample(
    model: NVSModel,
    conditions: SupportConditions,
    poses: Poses,
    generator: torch.Generator,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    groups_per_call: int = 8,
    on_step: Callable[[int], None] | None = None,
) -> Float[Tensor, "V 3 H W"]:
    """Sample views of the object in [-1, 1] by Euler's method, in rotating groups; see `sample_latents`.

    Args:
        on_step: called with the number of finished steps, for progress.

    Raises:
        InputError: no pose was given, or fewer than one step.
    """

    def report(index: int, timestep: int, latents: Tensor) -> None:
        if on_step is not None:
            on_step(index + 1)

    options = SamplingOptions(num_inference_steps, guidance_scale, groups_per_call=groups_per_call)
    latents = sample_latents(model, conditions, poses, generator, options, on_step=report)
    return decode_views(model, latents)


@torch.no_grad()
def decode_views(model: NVSModel, latents: Float[Tensor, "V C h w"], batch: int = 16) -> Float[Tensor, "V 3 H W"]:
    """Images in [-1, 1], ``batch`` at a time."""
    return torch.cat([model.decode(part) for part in latents.split(batch)])
