"""Start an autoencoder as a small picture of its input, so that training never has to discover colour.

From random weights an autoencoder first learns light and dark and stays there for long: colour differences are a small
part of the error, and normalisations hide how strong they are. Here the trunk of the network carries the colours and
their negatives through from the first step. With the activation ``silu``, ``silu(x) - silu(-x) = x``, so the pair is
linear although the activation is not. Everything else keeps its random start.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

COLOURS = 3
START_LOG_VARIANCE = -6.0
"""Of the posterior: little noise until the weights say otherwise."""


@torch.no_grad()
def carry_colours(vae: AutoencoderKL) -> None:
    """Set the weights that lead from the image through the latents to the image; the others stay as they are."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            # The branch of a residual block: leaves the pairs alone.
            module.weight[: 2 * COLOURS] = 0.0
        elif name.endswith("conv_shortcut") or ("samplers" in name and isinstance(module, nn.Conv2d)):
            _pass_on(module.weight)
    for stage in (vae.encoder, vae.decoder):
        _spread(stage.conv_in.weight)
        _gather(stage.conv_out.weight)
    for projection in (vae.quant_conv, vae.post_quant_conv):
        projection.weight[:COLOURS] = 0.0
        projection.weight[range(COLOURS), range(COLOURS), 0, 0] = 1.0
    log_variance = slice(vae.config.latent_channels, None)
    vae.quant_conv.weight[log_variance] *= 0.1
    vae.quant_conv.bias[log_variance] = START_LOG_VARIANCE


def _pass_on(weight: Tensor) -> None:
    """Pairs in, the same pairs out."""
    rows = range(2 * COLOURS)
    weight[rows] = 0.0
    weight[rows, rows, weight.shape[2] // 2, weight.shape[3] // 2] = 1.0


def _spread(weight: Tensor) -> None:
    """Colours in, pairs out."""
    centre = weight.shape[2] // 2
    for sign, start in ((1.0, 0), (-1.0, COLOURS)):
        weight[start : start + COLOURS] = 0.0
        weight[range(start, start + COLOURS), range(COLOURS), centre, centre] = sign


def _gather(weight: Tensor) -> None:
    """Activated pairs in, colours out."""
    centre = weight.shape[2] // 2
    weight[:COLOURS] = 0.0
    for sign, start in ((1.0, 0), (-1.0, COLOURS)):
        weight[range(COLOURS), range(start, start + COLOURS), centre, centre] = sign
