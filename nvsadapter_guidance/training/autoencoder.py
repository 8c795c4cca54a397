"""Train the small autoencoder whose latents the embedded model works on."""

import logging
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.training.augment import augment
from nvsadapter_guidance.training.views import ViewBank, composite, sample_batch, take

log = logging.getLogger(__name__)

COLOURED = 0.1
"""Difference of a channel from the mean of its pixel, in [-1, 1], from which a pixel counts as coloured."""


@dataclass
class AutoencoderTraining:
    """How long and how hard to train."""

    seconds: float = 60.0
    batch_size: int = 192
    crop: int = 64
    """Side of the crops it is trained on, in pixels; objects cover a tenth of a frame, and the rest teaches white."""
    crop_share: float = 0.6
    """Share of the time spent on crops. Then come whole views, a quarter as many a step, with their own statistics."""
    warmup_steps: int = 100
    lr: float = 1e-3
    """Of Adam: Muon, which moves all directions of a kernel alike, loses the colours that training starts with."""
    kl_weight: float = 1e-5
    """Weight of the mean KL divergence per latent value."""
    gradient_weight: float = 0.5
    """Weight of the error of image gradients, which keeps silhouettes sharp."""
    chroma_weight: float = 2.0
    """Extra weight of the error of colour differences, which are small beside light and dark and learned last."""
    seed: int = 0


def reconstruction_loss(
    prediction: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "B 3 H W"],
    gradient_weight: float,
    chroma_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Absolute error of pixels, of their colour differences, and of their finite differences at two scales."""
    loss = F.l1_loss(prediction, target)
    chroma, wanted = (x - x.mean(dim=1, keepdim=True) for x in (prediction, target))
    loss = loss + chroma_weight * F.l1_loss(chroma, wanted)
    for scale in (1, 2):
        p, t = (F.avg_pool2d(x, scale) if scale > 1 else x for x in (prediction, target))
        for axis in (-1, -2):
            loss = loss + gradient_weight * F.l1_loss(p.diff(dim=axis), t.diff(dim=axis))
    return loss


def random_images(bank: ViewBank, count: int, generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """Draw augmented views over white, in [-1, 1]."""
    return _over_white(_random_views(bank, count, generator))


def random_crops(bank: ViewBank, count: int, size: int, generator: torch.Generator) -> Float[Tensor, "B 3 h w"]:
    """Draw augmented views and cut a square (at most the view) around a point of each object, in [-1, 1]."""
    rgba = _random_views(bank, count, generator)
    height, width = rgba.shape[1:3]
    size = min(size, height, width)
    # The offset keeps views without any object possible to draw from.
    points = torch.multinomial(rgba[..., 3].flatten(1) + 1e-6, 1, generator=generator)[:, 0]
    shift = torch.randint(-size // 2, size // 2, (2, count), generator=generator, device=rgba.device)
    within = torch.arange(size, device=rgba.device)
    top = (points // width - size // 2 + shift[0]).clamp(0, height - size)
    left = (points % width - size // 2 + shift[1]).clamp(0, width - size)
    rows, columns = top[:, None] + within, left[:, None] + within
    return _over_white(rgba[torch.arange(count, device=rgba.device)[:, None, None], rows[:, :, None], columns[:, None]])


def _random_views(bank: ViewBank, count: int, generator: torch.Generator) -> Float[Tensor, "B H W 4"]:
    index = sample_batch(bank, count, 1, generator, level_share=0.0, highest_support=90.0, front_share=0.0)
    return augment(take(bank, index), generator).rgba[:, 1]


def _over_white(rgba: Float[Tensor, "B H W 4"]) -> Float[Tensor, "B 3 H W"]:
    return composite(rgba).permute(0, 3, 1, 2) * 2.0 - 1.0


def train_autoencoder(vae: AutoencoderKL, banks: list[ViewBank], config: AutoencoderTraining) -> dict[str, float]:
    """Train ``vae`` in place for ``config.seconds``; set its ``scaling_factor`` so that latents have unit variance.

    Returns:
        ``psnr`` (dB, on training images without sampling noise), ``steps``, ``seconds`` and ``scaling_factor``.
    """
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(config.seed)
    optimiser = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.95))
    vae.to(memory_format=torch.channels_last).train()
    start, step, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < config.seconds:
        factor = min(1.0, (step + 1) / config.warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * elapsed / config.seconds))
        optimiser.param_groups[0]["lr"] = config.lr * factor
        optimiser.zero_grad(set_to_none=True)
        # The other banks are drawn more rarely, in turn: the first one is the data that counts.
        bank = banks[0] if len(banks) == 1 or step % 4 else banks[1 + step // 4 % (len(banks) - 1)]
        if elapsed < config.crop_share * config.seconds:
            images = random_crops(bank, config.batch_size, config.crop, generator)
        else:
            images = random_images(bank, -(-config.batch_size // 4), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=generator, device=device, dtype=posterior.mean.dtype
            )
            prediction = vae.decode(latents).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(prediction.float(), images, config.gradient_weight, config.chroma_weight)
        loss = loss + config.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 20 == 0 or device.type == "cpu":
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
        if step % 200 == 0:
            log.info("autoencoder step %d (%.0f s): loss %.4f", step, elapsed, loss.item())
    vae.to(memory_format=torch.contiguous_format).eval()
    return measure(vae, banks[0], generator) | {"steps": float(step), "seconds": elapsed}


@torch.no_grad()
def measure(vae: AutoencoderKL, bank: ViewBank, generator: torch.Generator) -> dict[str, float]:
    """Quality of mean reconstructions, and the scaling factor that gives latents unit variance (set on ``vae``).

    Returns:
        ``psnr`` (dB), ``colour_error`` (error of colour differences over their size, on coloured pixels: 1 where all
        is grey) and ``scaling_factor``.
    """
    images = random_images(bank, 256 if bank.rgba.is_cuda else 16, generator)
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
    decoded = torch.cat([vae.decode(chunk).sample.clamp(-1, 1) for chunk in latents.split(64)])
    mse = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    chroma, found = (x - x.mean(dim=1, keepdim=True) for x in (images, decoded))
    coloured = (chroma.abs().amax(dim=1, keepdim=True) > COLOURED).expand_as(chroma)
    colour_error = float((found - chroma)[coloured].abs().sum() / chroma[coloured].abs().sum().clamp_min(1e-6))
    if colour_error > 0.5:
        log.warning("autoencoder: colours are %.0f%% wrong; train it longer", 100 * colour_error)
    scaling_factor = 1.0 / float(latents.std())
    vae.register_to_config(scaling_factor=scaling_factor)
    psnr = float((-10 * mse.log10()).mean())
    return {"psnr": psnr, "colour_error": colour_error, "scaling_factor": scaling_factor}
