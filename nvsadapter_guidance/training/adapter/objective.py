"""One training sample's random numbers, and the loss.

Everything that is drawn for a sample comes from a generator seeded with the run's seed and the sample's number in the
stream of all samples. The draws therefore do not depend on how many devices share a batch or on whether the run was
interrupted, and no random state has to be stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Dict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nvsadapter_guidance.cameras import RELEASED, CameraConvention, from_opengl
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel

_SPREAD = 0x9E3779B97F4A7C15
"""Odd 64-bit constant of the golden ratio; neighbouring numbers become unrelated seeds."""


def sample_seed(seed: int, number: int) -> int:
    """A seed for the `number`-th sample of a run (63 bits)."""
    mixed = ((seed + 1) * _SPREAD + number) & (2**64 - 1)
    # Finaliser of SplitMix64 (Steele et al. 2014).
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch."""

    timesteps: Int[Tensor, " B"]
    noise: Float[Tensor, "B n C h w"]
    """Of the query views; independent between views, which share the timestep."""
    posterior: Float[Tensor, "B 1+n C h w"]
    """Which latents of the autoencoder's posterior are taken."""
    ucg_mask: Bool[Tensor, " B"]
    """Samples trained unconditionally."""
    support: Float[Tensor, "B 1 C h w"]
    """Noise in place of the support latents of those."""


def draw(
    seed: int, numbers: Sequence[int], num_query: int, latent: tuple[int, int, int], timesteps: int, dropout: float
) -> Draws:
    """Random numbers of the samples with these `numbers` in the stream, on the CPU.

    Each sample is unconditional with probability `dropout`; while all of the batch are, they are drawn again, so that
    every layer of the adapter is used in every step.

    Args:
        latent: channels, height and width of latents.
        timesteps: of the noise schedule; drawn uniformly.
    """
    generators = [torch.Generator().manual_seed(sample_seed(seed, number)) for number in numbers]

    def normal(views: int) -> Tensor:
        return torch.stack([torch.randn((views, *latent), generator=g) for g in generators])

    steps = torch.stack([torch.randint(timesteps, (), generator=g) for g in generators])
    noise, posterior, support = normal(num_query), normal(1 + num_query), normal(1)
    while True:
        mask = torch.stack([torch.rand((), generator=g) for g in generators]) < dropout
        if not bool(mask.all()):
            return Draws(steps, noise, posterior, mask, support)


def to_convention(c2w: Float[Tensor, "*batch 4 4"], convention: CameraConvention) -> Float[Tensor, "*batch 4 4"]:
    """Poses of training data (rotation -R_gl, as the released training has it) in the camera frame of a model.

    It does not matter whether they are relative to the support view already: all of them, the support's too, get the
    same factor from the right, which making them relative once more takes to both sides.
    """
    # The signs of the released axes undo themselves.
    return from_opengl(from_opengl(c2w, RELEASED), convention)


@torch.no_grad()
def encode_views(
    model: NVSModel, images: Float[Tensor, "B V 3 H W"], posterior: Float[Tensor, "B V C h w"], chunk: int = 32
) -> Float[Tensor, "B V C h w"]:
    """Latents of views, samples of the posterior, in float32 whatever autocast says; `chunk` views at a time."""
    latents = []
    with torch.autocast(images.device.type, enabled=False):
        for pixels, noise in zip(images.flatten(0, 1).split(chunk), posterior.flatten(0, 1).split(chunk), strict=True):
            distribution = model.vae.encode(pixels.float()).latent_dist
            latents.append(distribution.mean + distribution.std * noise)
    return torch.cat(latents).unflatten(0, images.shape[:2]) * model.vae.config.scaling_factor


@torch.no_grad()
def image_tokens(model: NVSModel, support: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 D"]:
    """The support images' tokens; zeros where no layer looks at them."""
    options = model.network.adapter.config
    if options.image_attn_mode is None and not options.imgemb_to_text:
        return support.new_zeros(len(support), 1, options.image_context_dim)
    return model.semantic_tokens(support)


def view_rays(model: NVSModel, c2w: Float[Tensor, "B V 4 4"]) -> Float[Tensor, "B V R h w"]:
    """Ray embedding of training poses, support view first."""
    size = model.config.image_size
    embedding = model.network.adapter.config.rays
    poses = to_convention(c2w, model.convention)
    return embedding(poses, model.config.fov_deg, (size, size), model.latent_stride, model.convention)


def latent_shape(model: NVSModel) -> tuple[int, int, int]:
    """Channels, height and width of a view's latents."""
    side = model.config.image_size // model.latent_stride
    return (int(model.vae.config.latent_channels), side, side)


def batch_loss(model: NVSModel, batch: Dict[str, Any], draws: Draws) -> Float[Tensor, " B"]:
    """Mean squared error of the network's target over the query views of each sample.

    For networks that predict noise this is the released loss: the error of the clean latents weighted by sigma^-2 is
    the error of the noise (Ho et al. 2020, eq. 14).

    Args:
        batch: `support` (B, 3, H, W) and `queries` (B, n, 3, H, W) in [-1, 1], `c2w` (B, 1+n, 4, 4) in the released
            training frame, support first; `control` (B, 1+n, 3, H, W) in [0, 1] where there is a ControlNet.

    Raises:
        InputError: views are of another size than the model's, or control images are missing.
    """
    images = torch.cat((batch["support"][:, None], batch["queries"]), dim=1)
    size = model.config.image_size
    if tuple(images.shape[-2:]) != (size, size):
        raise InputError(f"data: views are {tuple(images.shape[-2:])} pixels; the model is for {size}x{size}")
    if model.network.controlnet is not None and "control" not in batch:
        raise InputError("data: has no control images, model.controlnet needs them; give data with 'control'")
    latents = encode_views(model, images, draws.posterior)
    support, clean = latents[:, :1], latents[:, 1:]
    noisy = model.schedule.add_noise(clean, draws.noise, draws.timesteps)
    target = model.schedule.target(clean, draws.noise, draws.timesteps)
    unconditional = draws.support
    if model.config.unconditional_support == "zeros":
        unconditional = torch.zeros_like(support)
    prediction = model.network(
        noisy,
        draws.timesteps,
        model.text_context.expand(len(images), -1, -1),
        image_tokens(model, batch["support"]),
        view_rays(model, batch["c2w"]),
        support,
        ucg_mask=draws.ucg_mask,
        unconditional_support_latents=unconditional,
        control_images=batch.get("control") if model.network.controlnet is not None else None,
    )
    return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(dim=1)
