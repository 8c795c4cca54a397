"""Views sampled in the middle of training, for people to look at."""

from typing import Any, Dict

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.images import to_bytes
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training.adapter.objective import image_tokens, latent_shape, view_rays


@torch.no_grad()
def sample_views(
    model: NVSModel, batch: Dict[str, Any], steps: int, guidance_scale: float, generator: torch.Generator
) -> Float[Tensor, "B n 3 H W"]:
    """Query views of a training batch, sampled from its support views and poses alone, in [-1, 1].

    DDIM (Song et al. 2021, eq. 12, without noise), which for these schedules is Euler's method, and stays defined where
    the last timestep holds no signal; classifier-free guidance.

    Args:
        batch: as in `objective.batch_loss`; `queries` is not used.
        generator: on the CPU.
    """
    support, c2w, device = batch["support"], batch["c2w"], batch["c2w"].device
    count, num_query = len(c2w), c2w.shape[1] - 1
    shape = (count, num_query, *latent_shape(model))
    noisy = torch.randn(shape, generator=generator).to(device)
    replacement = torch.randn((count, 1, *latent_shape(model)), generator=generator).to(device)
    if model.config.unconditional_support == "zeros":
        replacement = torch.zeros_like(replacement)
    # Unconditional samples first.
    fixed = {
        "text_context": model.text_context.expand(2 * count, -1, -1),
        "image_context": image_tokens(model, support).repeat(2, 1, 1),
        "ray_embedding": view_rays(model, c2w).repeat(2, 1, 1, 1, 1),
        "support_latents": model.encode(support)[:, None].repeat(2, 1, 1, 1, 1),
        "ucg_mask": torch.tensor([True, False], device=device).repeat_interleave(count),
        "unconditional_support_latents": replacement.repeat(2, 1, 1, 1, 1),
    }
    if model.network.controlnet is not None:
        fixed["control_images"] = batch["control"].repeat(2, 1, 1, 1, 1)
    timesteps = diffusion.sampling_timesteps(steps, model.schedule.num_train_timesteps).to(device)
    alphas = torch.cat((model.schedule.alphas_cumprod.to(device)[timesteps], torch.ones(1, device=device)))
    for timestep, following in zip(timesteps, alphas[1:], strict=True):
        t = timestep.expand(count)
        unconditional, conditional = model.network(noisy.repeat(2, 1, 1, 1, 1), t.repeat(2), **fixed).chunk(2)
        prediction = diffusion.guide(unconditional, conditional, guidance_scale).float()
        clean, noise = model.schedule.split(noisy, prediction, t)
        noisy = following.sqrt() * clean + (1.0 - following).sqrt() * noise
    return model.decode(noisy.flatten(0, 1)).unflatten(0, (count, num_query))


def view_sheet(batch: Dict[str, Any], sampled: Float[Tensor, "B n 3 H W"]) -> UInt8[np.ndarray, "height width 3"]:
    """Two rows per object: its support view and query views as they are, and below them the sampled ones."""
    support, queries = batch["support"][:, None], batch["queries"]
    truth = torch.cat((support, queries), dim=1)
    made = torch.cat((torch.ones_like(support), sampled.to(queries)), dim=1)
    rows = torch.stack((truth, made), dim=1).flatten(0, 1)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return to_bytes((0.5 * sheet.float() + 0.5).clamp(0.0, 1.0).cpu().numpy())
