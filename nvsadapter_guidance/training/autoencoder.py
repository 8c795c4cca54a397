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
from nvsadapter_guidance.training.muon import Muon, split_parameters
from nvsadapter_guidance.training.views import ViewBank, composite, sample_batch, take

log = logging.getLogger(__name__)

FIRST_AND_LAST = ("conv_in", "conv_out", "quant_conv")
"""Parts of names of the kernels that AdamW trains."""
COLOURED = 0.1
"""Difference of a channel from the mean of its pixel, in [-1, 1], from which a pixel counts as coloured."""


@dataclass
class AutoencoderTraining:
    """How long and how hard to train."""

    seconds: float = 60.0
    batch_size: int = 64
    lr: float = 3e-3
    """Of Muon, which trains the hidden kernels; it learns colour, a small part of the error, much sooner than Adam."""
    adam_lr: float = 2e-3
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
    index = sample_batch(bank, count, 1, generator, level_share=0.0, highest_support=90.0)
    views = augment(take(bank, index), generator)
    return composite(views.rgba[:, 1]).permute(0, 3, 1, 2) * 2.0 - 1.0


def train_autoencoder(vae: AutoencoderKL, banks: list[ViewBank], config: AutoencoderTraining) -> dict[str, float]:
    """Train ``vae`` in place for ``config.seconds``; set its ``scaling_factor`` so that latents have unit variance.

    Returns:
        ``psnr`` (dB, on training images without sampling noise), ``steps``, ``seconds`` and ``scaling_factor``.
    """
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(config.seed)
    hidden, rest = split_parameters(vae, FIRST_AND_LAST)
    optimisers = [
        (config.lr, Muon(hidden, weight_decay=0.0)),
        (config.adam_lr, torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)),
    ]
    vae.to(memory_format=torch.channels_last).train()
    start, step, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < config.seconds:
        progress = elapsed / config.seconds
        for rate, optimiser in optimisers:
            factor = min(1.0, (step + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * progress))
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.zero_grad(set_to_none=True)
        # The last bank is drawn more rarely: the first one is the data that counts.
        bank = banks[0] if len(banks) == 1 or step % 4 else banks[-1]
        images = random_images(bank, config.batch_size, generator)
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
        for _, optimiser in optimisers:
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
