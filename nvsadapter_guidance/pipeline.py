"""Novel views of an object from one image: what is computed once for the image, and the sampling loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.support_cache import SupportCache


@dataclass
class Poses:
    """Cameras that look at the origin: azimuth and elevation in degrees, distance in world units."""

    azimuth: Float[Tensor, "*batch"]
    elevation: Float[Tensor, "*batch"]
    distance: Float[Tensor, "*batch"]

    def __getitem__(self, index: Tensor | slice) -> "Poses":
        return Poses(self.azimuth[index], self.elevation[index], self.distance[index])

    def __len__(self) -> int:
        return len(self.azimuth)


@dataclass
class SupportConditions:
    """What one support image contributes to every call, computed once."""

    pose: Poses
    """The support camera; a batch of one."""
    latents: Float[Tensor, "1 1 C h w"]
    image_context: Float[Tensor, "1 1 D"]
    conditional: SupportCache | None = None
    """Keys and values of the support stream; None where the view attention mode forbids caching."""
    unconditional: SupportCache | None = None
    """The same for the unconditional branch; None where that branch sees fresh noise at every call."""


@torch.no_grad()
def prepare(
    model: NVSModel, image: Float[Tensor, "1 3 H W"], pose: Poses, generator: torch.Generator
) -> SupportConditions:
    """Encode a support image in [-1, 1] seen from ``pose``."""
    image = model.resize(image)
    latents = model.encode(image, generator)[:, None]
    conditions = SupportConditions(pose, latents, model.semantic_tokens(image))
    if model.network.adapter.config.support_is_independent:
        conditions.conditional = _encode_support(model, conditions, unconditional=False)
        if model.config.unconditional_support == "zeros":
            conditions.unconditional = _encode_support(model, conditions, unconditional=True)
    return conditions


def _encode_support(model: NVSModel, conditions: SupportConditions, unconditional: bool) -> SupportCache:
    pose = conditions.pose
    return model.network.encode_support(
        conditions.latents,
        model.text_context,
        conditions.image_context,
        model.ray_embedding(pose.azimuth[None], pose.elevation[None], pose.distance[None]),
        ucg_mask=torch.tensor([unconditional], device=model.device),
        unconditional_support_latents=model.unconditional_support_latents(conditions.latents, None),
    )


def guided_prediction(
    model: NVSModel,
    conditions: SupportConditions,
    noisy: Float[Tensor, "G n C h w"],
    timesteps: Int[Tensor, " G"],
    poses: Poses,
    guidance_scale: float,
    generator: torch.Generator,
) -> Float[Tensor, "G n C h w"]:
    """The network's prediction (noise or velocity) for groups of views, with classifier-free guidance.

    Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6 in the form ``u + s (c - u)``. ``poses`` are ``(G, n)``.
    """
    groups = noisy.shape[0]
    with_support = [
        torch.cat([support.expand(groups, 1), query], dim=1)
        for support, query in (
            (conditions.pose.azimuth[None], poses.azimuth),
            (conditions.pose.elevation[None], poses.elevation),
            (conditions.pose.distance[None], poses.distance),
        )
    ]
    rays = model.ray_embedding(*with_support)
    # Guidance at scale 1 is the conditional prediction alone.
    branches = [False] if guidance_scale == 1.0 else [True, False]
    batch = groups * len(branches)
    mask = torch.tensor(branches, device=noisy.device).repeat_interleave(groups)
    caches = [conditions.unconditional if b else conditions.conditional for b in branches]
    cache = SupportCache.cat([c.expand(groups) for c in caches if c is not None]) if None not in caches else None
    support = conditions.latents.expand(batch, -1, -1, -1, -1)
    prediction = model.network(
        noisy.repeat(len(branches), 1, 1, 1, 1),
        timesteps.repeat(len(branches)),
        model.text_context.expand(batch, -1, -1),
        conditions.image_context.expand(batch, -1, -1),
        rays.repeat(len(branches), 1, 1, 1, 1),
        support,
        ucg_mask=mask,
        unconditional_support_latents=model.unconditional_support_latents(support, generator),
        support_cache=cache,
    )
    if len(branches) == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return diffusion.guide(unconditional, conditional, guidance_scale)


def view_groups(count: int, size: int, step: int) -> Int[Tensor, "groups size"]:
    """Divide ``count`` views (a multiple of ``size``) into groups that differ from step to step.

    Neighbours, neighbours shifted by half a group, and views spread over the whole orbit take turns, so that over a few
    steps every view is denoised together with all others: overlapping groups without denoising a view twice.
    """
    views = torch.arange(count)
    if step % 3 == 2:
        return views.view(size, count // size).T
    return views.roll(-(size // 2) * (step % 3)).view(count // size, size)


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
    """Sample views of the object in [-1, 1]; deterministic DDIM from the generator's noise.

    Args:
        poses: any number of cameras; an incomplete group is filled up with repeated views that are then dropped.
        groups_per_call: groups of ``num_query`` views denoised in one network call.
        on_step: called with the number of finished steps, for progress.

    Raises:
        InputError: no pose was given, or fewer than one step.
    """
    if len(poses) == 0 or num_inference_steps < 1:
        raise InputError(f"sampling needs at least one view and one step, got {len(poses)} and {num_inference_steps}")
    size = model.num_query
    wanted = len(poses)
    poses = poses[torch.arange(-(-wanted // size) * size) % wanted]
    shape = (len(poses), *conditions.latents.shape[2:])
    latents = torch.randn(shape, generator=generator, device=model.device)
    timesteps = model.schedule.sampling_timesteps(num_inference_steps)
    for index, timestep in enumerate(timesteps):
        following = timesteps[index + 1] if index + 1 < len(timesteps) else -1
        stepped = torch.empty_like(latents)
        for chunk in view_groups(len(poses), size, index).split(groups_per_call):
            t = torch.full((len(chunk),), timestep, device=model.device)
            noisy = latents[chunk]
            prediction = guided_prediction(model, conditions, noisy, t, poses[chunk], guidance_scale, generator)
            stepped[chunk] = model.schedule.ddim_step(noisy, prediction, timestep, following)
        latents = stepped
        if on_step is not None:
            on_step(index + 1)
    return torch.cat([model.decode(part) for part in latents[:wanted].split(16)])


@torch.no_grad()
def predict_clean(
    model: NVSModel,
    conditions: SupportConditions,
    images: Float[Tensor, "V 3 H W"],
    poses: Poses,
    noise_level: float,
    generator: torch.Generator,
    guidance_scale: float,
    num_query: int | None = None,
) -> Float[Tensor, "V 3 H W"]:
    """One-step denoising: noise ``images`` to a share of the schedule in (0, 1] and return the clean prediction.

    Views are denoised in groups of ``num_query``, by default as many as the model was trained with.
    """
    size, count = num_query or model.num_query, len(poses)
    order = torch.arange(-(-count // size) * size) % count
    latents = model.encode(model.resize(images))[order].unflatten(0, (-1, size))
    timestep = min(int(noise_level * model.schedule.num_train_timesteps), model.schedule.num_train_timesteps - 1)
    t = torch.full((len(latents),), timestep, device=model.device)
    noise = torch.randn(latents.shape, generator=generator, device=model.device)
    noisy = model.schedule.add_noise(latents, noise, t)
    grouped = poses[order.view(-1, size)]
    prediction = guided_prediction(model, conditions, noisy, t, grouped, guidance_scale, generator)
    clean, _ = model.schedule.split(noisy, prediction, t)
    return model.decode(clean.flatten(0, 1)[:count])
