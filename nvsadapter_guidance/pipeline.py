"""What one image tells about its object: conditions computed once, and predictions of its views made with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.cameras import look_at
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.folded import Constants, can_fold, denoise_folded, fold
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

    def groups(self, size: int) -> "Poses":
        """Consecutive ``size`` cameras side by side, ``(groups, size)``."""
        return Poses(*(angle.unflatten(0, (-1, size)) for angle in (self.azimuth, self.elevation, self.distance)))


def view_poses(
    elevations: Sequence[float],
    azimuths: Sequence[float],
    distances: Sequence[float] | None = None,
    default_distance: float = 1.5,
    device: torch.device | str = "cpu",
) -> Poses:
    """Cameras of the views asked for; degrees, and object diameters.

    Raises:
        InputError: no view, numbers that differ or are not finite, or a camera under or above the object or inside it.
    """
    distances = [default_distance] * len(elevations) if distances is None else distances
    counts = {"elevations": len(elevations), "azimuths": len(azimuths), "distances": len(distances)}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"views: got {found}; give one of each per view")
    if not elevations:
        raise InputError("views: none asked for; give at least one elevation and azimuth")
    poses = Poses(*(torch.tensor([float(v) for v in values]) for values in (azimuths, elevations, distances)))
    if not bool(torch.stack([poses.azimuth, poses.elevation, poses.distance]).isfinite().all()):
        raise InputError("views: an elevation, azimuth or distance is not a finite number")
    if bool((poses.elevation.abs() > 90.0).any()):
        raise InputError(f"views: elevations are {list(elevations)}; they must be between -90 and 90 degrees")
    if bool((poses.distance <= 0.5).any()):
        raise InputError(f"views: distances are {list(distances)}; the object has radius 0.5, stay outside of it")
    return Poses(*(value.to(device) for value in (poses.azimuth, poses.elevation, poses.distance)))


@dataclass
class SupportConditions:
    """What one support image contributes to every call, computed once."""

    pose: Poses
    """The support camera; a batch of one."""
    latents: Float[Tensor, "1 1 C h w"]
    image_context: Float[Tensor, "1 1 D"]
    text_context: Float[Tensor, "1 tokens dim"]
    conditional: SupportCache | None = None
    """Keys and values of the support stream; None where the view attention mode forbids caching."""
    unconditional: SupportCache | None = None
    """The same for the unconditional branch; None where that branch sees fresh noise at every call."""
    folded: Constants | None = None
    """Everything that transformer blocks know of the object, see `folded`; None where they cannot be folded."""


@torch.no_grad()
def prepare(
    model: NVSModel,
    image: Float[Tensor, "1 3 H W"],
    pose: Poses,
    generator: torch.Generator,
    prompt: str = "",
    frozen_unconditional: bool = False,
) -> SupportConditions:
    """Encode a support image in [-1, 1] seen from ``pose``.

    Args:
        frozen_unconditional: draw what unconditional samples see here, once, where the model wants noise.

    Raises:
        InputError: the prompt cannot be encoded.
    """
    image = model.resize(image)
    latents = model.encode(image, generator)[:, None]
    conditions = SupportConditions(pose, latents, model.semantic_tokens(image), model.text_tokens(prompt))
    if model.network.adapter.config.support_is_independent:
        conditions.conditional = _encode_support(model, conditions)
        if model.config.unconditional_support == "zeros" or frozen_unconditional:
            instead = model.unconditional_support_latents(latents, generator)
            conditions.unconditional = _encode_support(model, conditions, instead)
        if can_fold(model.network):
            conditions.folded = fold(
                model.network, conditions.text_context, conditions.image_context, conditions.conditional,
                conditions.unconditional,
            )  # fmt: skip
    return conditions


def _encode_support(
    model: NVSModel, conditions: SupportConditions, unconditional: Float[Tensor, "G 1 C h w"] | None = None
) -> SupportCache:
    """The support stream of one conditional sample, or of unconditional ones that see these latents instead."""
    pose = conditions.pose
    samples = 1 if unconditional is None else len(unconditional)
    rays = model.ray_embedding(pose.azimuth[None], pose.elevation[None], pose.distance[None])
    return model.network.encode_support(
        conditions.latents.expand(samples, -1, -1, -1, -1),
        conditions.text_context.expand(samples, -1, -1),
        conditions.image_context.expand(samples, -1, -1),
        rays.expand(samples, -1, -1, -1, -1),
        ucg_mask=torch.full((samples,), unconditional is not None, device=conditions.latents.device),
        unconditional_support_latents=conditions.latents if unconditional is None else unconditional,
    )


def _support_cache(
    model: NVSModel, conditions: SupportConditions, branches: list[bool], noise: Float[Tensor, "G 1 C h w"]
) -> SupportCache | None:
    """Keys and values for all samples of a call; only an unconditional branch that sees fresh noise is encoded anew."""
    conditional, unconditional = conditions.conditional, conditions.unconditional
    if conditional is None:
        return None
    caches = []
    for is_unconditional in branches:
        if is_unconditional and unconditional is None:
            caches.append(_encode_support(model, conditions, noise))
        else:
            known = unconditional if is_unconditional and unconditional is not None else conditional
            caches.append(known.expand(len(noise)))
    return SupportCache.cat(caches)


def guided_prediction(
    model: NVSModel,
    conditions: SupportConditions,
    noisy: Float[Tensor, "G n C h w"],
    timesteps: Int[Tensor, " G"],
    poses: Poses,
    guidance_scale: float,
    generator: torch.Generator,
    groups_per_call: int | None = None,
) -> Float[Tensor, "G n C h w"]:
    """The network's prediction (noise or velocity) for groups of views, with classifier-free guidance.

    Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6 in the form ``u + s (c - u)``. ``poses`` are ``(G, n)``. Whatever
    precision the network runs in, the difference of its predictions is formed in float32 at least.

    Args:
        groups_per_call: groups in one network call, which need not divide G; None for all. Fewer need less memory.
    """
    latents = conditions.latents.expand(len(noisy), -1, -1, -1, -1)
    # Drawn for all groups at once, so that the draw does not depend on how the groups are divided.
    noise = latents if guidance_scale == 1.0 else model.unconditional_support_latents(latents, generator)
    step = groups_per_call or len(noisy)
    parts = [slice(first, first + step) for first in range(0, len(noisy), step)]
    folded = conditions.conditional is not None and conditions.folded is not None
    call = _folded_call if folded and not torch.is_grad_enabled() else _guided_call
    predictions = [
        call(model, conditions, noisy[part], timesteps[part], poses[part], guidance_scale, noise[part])
        for part in parts
    ]
    return predictions[0] if len(predictions) == 1 else torch.cat(predictions)


def _folded_call(
    model: NVSModel,
    conditions: SupportConditions,
    noisy: Float[Tensor, "G n C h w"],
    timesteps: Int[Tensor, " G"],
    poses: Poses,
    guidance_scale: float,
    unconditional_latents: Float[Tensor, "G 1 C h w"],
) -> Float[Tensor, "G n C h w"]:
    """`_guided_call` with constant conditions, as a CUDA graph where `NVSModel.graphs` allows it."""
    fresh = guidance_scale != 1.0 and conditions.unconditional is None
    varying = {"noisy": noisy, "timesteps": timesteps, **_named("query", poses)}
    if fresh:
        varying["fresh_support"] = unconditional_latents
    constant = {**(conditions.folded or {}), **_named("support", conditions.pose)}

    def predict(inputs: Mapping[str, Tensor]) -> Tensor:
        support, query = (Poses(*(inputs[f"{of}.{name}"] for name in _ANGLES)) for of in ("support", "query"))
        prediction = denoise_folded(
            model.network, inputs["noisy"], inputs["timesteps"], lambda: query_rays(model, support, query), inputs,
            guidance_scale != 1.0, inputs.get("fresh_support"),
        )  # fmt: skip
        # Guidance at scale 1 is the conditional prediction alone.
        return prediction[0] if len(prediction) == 1 else diffusion.guide(prediction[0], prediction[1], guidance_scale)

    key = (guidance_scale, model.config.image_size, model.convention)
    return model.graphs(key, predict, varying, constant, (model.network.unet, model.network.adapter))


def query_rays(model: NVSModel, support: Poses, query: Poses) -> Float[Tensor, "G n R h w"]:
    """Embedding of the rays of query views ``(G, n)`` relative to one support view, a batch of one."""
    # All cameras at once: on a GPU the many small steps take as long for one of them as for all.
    azimuth, elevation, distance = (
        torch.cat((getattr(support, angle), getattr(query, angle).flatten())) for angle in _ANGLES
    )
    poses = look_at(azimuth, elevation, distance, model.convention)
    front, views = poses.split((1, len(poses) - 1))
    views = views.unflatten(0, query.azimuth.shape)
    size = model.config.image_size
    embedding = model.network.adapter.config.rays
    return embedding(views, model.config.fov_deg, (size, size), model.latent_stride, model.convention, front)


_ANGLES = ("azimuth", "elevation", "distance")


def _named(name: str, poses: Poses) -> dict[str, Tensor]:
    return {f"{name}.{angle}": getattr(poses, angle) for angle in _ANGLES}


def _guided_call(
    model: NVSModel,
    conditions: SupportConditions,
    noisy: Float[Tensor, "G n C h w"],
    timesteps: Int[Tensor, " G"],
    poses: Poses,
    guidance_scale: float,
    unconditional_latents: Float[Tensor, "G 1 C h w"],
) -> Float[Tensor, "G n C h w"]:
    """`guided_prediction` in one network call."""
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
    prediction = model.network(
        noisy.repeat(len(branches), 1, 1, 1, 1),
        timesteps.repeat(len(branches)),
        conditions.text_context.expand(batch, -1, -1),
        conditions.image_context.expand(batch, -1, -1),
        rays.repeat(len(branches), 1, 1, 1, 1),
        conditions.latents.expand(batch, -1, -1, -1, -1),
        ucg_mask=torch.tensor(branches, device=noisy.device).repeat_interleave(groups),
        unconditional_support_latents=unconditional_latents.repeat(len(branches), 1, 1, 1, 1),
        support_cache=_support_cache(model, conditions, branches, unconditional_latents),
    ).to(torch.promote_types(noisy.dtype, torch.float32))
    if len(branches) == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return diffusion.guide(unconditional, conditional, guidance_scale)


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
    groups_per_call: int | None = None,
) -> Float[Tensor, "V 3 H W"]:
    """One-step denoising: noise ``images`` to a share of the schedule in (0, 1] and return the clean prediction.

    Views are denoised in groups of ``num_query``, by default as many as the model was trained with, and
    ``groups_per_call`` of them at a time (None: all).
    """
    size, count = num_query or model.num_query, len(poses)
    order = torch.arange(-(-count // size) * size) % count
    latents = model.encode(model.resize(images))[order].unflatten(0, (-1, size))
    timestep = min(int(noise_level * model.schedule.num_train_timesteps), model.schedule.num_train_timesteps - 1)
    t = torch.full((len(latents),), timestep, device=model.device)
    noise = torch.randn(latents.shape, generator=generator, device=model.device)
    noisy = model.schedule.add_noise(latents, noise, t)
    grouped = poses[order.view(-1, size)]
    prediction = guided_prediction(model, conditions, noisy, t, grouped, guidance_scale, generator, groups_per_call)
    clean, _ = model.schedule.split(noisy, prediction, t)
    return model.decode(clean.flatten(0, 1)[:count])
