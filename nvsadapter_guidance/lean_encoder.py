"""The encoder of Stable Diffusion's autoencoder by `lean_layers`: the same modules, half of the memory traffic."""

from typing import Any

import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D
from jaxtyping import Float
from torch import Tensor, nn

from nvsadapter_guidance.group_norm import branch_group_norm_silu, group_norm_silu
from nvsadapter_guidance.lean_layers import convolve, convolve_few_channels, is_lean, residual_block

FUSED_WIDTH = 128
"""Channels of a head."""


def can_run_lean(encoder: Any) -> bool:
    """Whether `encode_lean` computes what this encoder computes."""
    blocks, middle = encoder.down_blocks, encoder.mid_block
    if not all(isinstance(block, DownEncoderBlock2D) for block in blocks) or not isinstance(middle, UNetMidBlock2D):
        return False
    resnets = [resnet for block in (*blocks, middle) for resnet in block.resnets]
    samplers = [sampler for block in blocks for sampler in block.downsamplers or ()]
    attentions = [attention for attention in middle.attentions if attention is not None]
    return (
        all(map(is_lean, resnets))
        and all(type(s.conv) is nn.Conv2d and s.padding == 0 and s.norm is None for s in samplers)
        and all(len(block.downsamplers or ()) <= 1 for block in blocks)
        and all(type(layer) is nn.Conv2d for layer in (encoder.conv_in, encoder.conv_out))
        and all(layer.bias is not None for layer in (encoder.conv_in, *(s.conv for s in samplers)))
        and all(a.residual_connection and a.rescale_output_factor == 1.0 and a.norm_q is None for a in attentions)
        and isinstance(encoder.conv_act, nn.SiLU)
    )


def encode_lean(encoder: Any, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 2C h w"]:
    """What ``encoder(images)`` is."""
    x, owed = convolve_few_channels(images, encoder.conv_in), encoder.conv_in.bias
    for block in encoder.down_blocks:
        sampler = next(iter(block.downsamplers or ()), None)
        for resnet in block.resnets:
            # As trained: one row and one column of zeros at the far ends of what is sampled down.
            last = sampler is not None and resnet is block.resnets[-1]
            x, owed = residual_block(resnet, x, owed=owed, border=last), None
        if sampler is not None:
            x, owed = convolve(x, sampler.conv), sampler.conv.bias
    middle = encoder.mid_block
    x = residual_block(middle.resnets[0], x, owed=owed)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = residual_block(resnet, x if attention is None else _attend(attention, x))
    return convolve(group_norm_silu(x, encoder.conv_norm_out), encoder.conv_out, with_bias=True)


def _attend(attention: Any, x: Float[Tensor, "N C h w"]) -> Float[Tensor, "N C h w"]:
    """Self-attention of the pixels, added to them."""
    normed, x = branch_group_norm_silu(x, attention.group_norm, silu=False)
    tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
    projections = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for layer in projections)
    attended = _attention(q, k, v, attention.scale).transpose(1, 2).flatten(2)
    return x + attention.to_out[0](attended).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention; heads wider than fused kernels take well are multiplied out, which is cheap for few pixels."""
    if q.shape[-1] <= FUSED_WIDTH:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return ((q * scale) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
