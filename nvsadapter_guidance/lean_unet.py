"""Stable Diffusion's UNet by `lean_layers`, for inference: the same modules, half of the memory traffic."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nvsadapter_guidance.blocks import CONTEXT_KEY, ViewContext
from nvsadapter_guidance.cuda_graphs import is_offloaded
from nvsadapter_guidance.group_norm import group_norm_silu
from nvsadapter_guidance.lean_block import can_run_lean_block, lean_block
from nvsadapter_guidance.lean_layers import enlarge, is_lean, residual_block

_KINDS = (
    blocks.DownBlock2D,
    blocks.CrossAttnDownBlock2D,
    blocks.UNetMidBlock2DCrossAttn,
    blocks.CrossAttnUpBlock2D,
    blocks.UpBlock2D,
)


def can_run_lean(unet: Any) -> bool:
    """Whether `predict_lean` computes what this UNet computes, with weights that lie where it is called."""
    if is_offloaded(unet.modules()):
        return False
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    if not all(isinstance(part, _KINDS) for part in parts):
        return False
    resnets = [resnet for part in parts for resnet in part.resnets]
    attentions = [attention for part in parts for attention in getattr(part, "attentions", ())]
    samplers = [
        sampler
        for part in parts
        for sampler in (getattr(part, "downsamplers", None) or getattr(part, "upsamplers", None) or ())
    ]
    extras = (unet.class_embedding, unet.config.addition_embed_type, unet.time_embed_act, unet.encoder_hid_proj)
    return (
        isinstance(unet, UNet2DConditionModel)  # not a compiled one, say
        and all(map(is_lean, resnets))
        and all(isinstance(a, Transformer2DModel) and a.is_input_continuous for a in attentions)
        and all(isinstance(s.conv, nn.Conv2d) and s.norm is None for s in samplers)
        and all(getattr(s, "padding", 1) > 0 for s in samplers)
        and all(extra is None for extra in extras)
        and not any(getattr(part, "s1", None) for part in parts)  # FreeU
        and not unet.config.center_input_sample
        and isinstance(unet.conv_norm_out, nn.GroupNorm)
        and isinstance(unet.conv_act, nn.SiLU)
    )


@torch.no_grad()
def predict_lean(
    unet: Any, latents: Float[Tensor, "rows c h w"], timesteps: Shaped[Tensor, " rows"], context: ViewContext
) -> Float[Tensor, "rows c h w"]:
    """What the UNet predicts for rows in its precision, with what its transformer blocks know of them."""
    if unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        latents = latents.contiguous(memory_format=torch.channels_last)
    time = F.silu(unet.time_embedding(unet.time_proj(timesteps).to(latents.dtype)))
    x = unet.conv_in(latents)
    skips = [x]
    for part in unet.down_blocks:
        attentions = getattr(part, "attentions", (None,) * len(part.resnets))
        for resnet, attention in zip(part.resnets, attentions, strict=True):
            x = _transform(attention, residual_block(resnet, x, time), context)
            skips.append(x)
        for sampler in part.downsamplers or ():
            x = sampler.conv(x)
            skips.append(x)
    middle = unet.mid_block
    x = residual_block(middle.resnets[0], x, time)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = residual_block(resnet, _transform(attention, x, context), time)
    for part in unet.up_blocks:
        attentions = getattr(part, "attentions", (None,) * len(part.resnets))
        for resnet, attention in zip(part.resnets, attentions, strict=True):
            x = residual_block(resnet, torch.cat((x, skips.pop()), dim=1), time)
            x = _transform(attention, x, context)
        for sampler in part.upsamplers or ():
            x = sampler.conv(enlarge(x, tuple(skips[-1].shape[-2:])))
    return unet.conv_out(group_norm_silu(x, unet.conv_norm_out))


def _transform(attention: Any, x: Float[Tensor, "rows C h w"], context: ViewContext) -> Float[Tensor, "rows C h w"]:
    """A `Transformer2DModel`; nothing without one."""
    if attention is None:
        return x
    linear = attention.use_linear_projection
    tokens = group_norm_silu(x, attention.norm, silu=False)
    if not linear:
        tokens = attention.proj_in(tokens)
    tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
    tokens = attention.proj_in(tokens) if linear else tokens.contiguous()
    for block in attention.transformer_blocks:
        if context.folded is not None and _runs_lean(block, tokens):
            tokens = lean_block(block, tokens, context, context.folded)
        else:
            tokens = block(tokens, cross_attention_kwargs={CONTEXT_KEY: context})
    if linear:
        tokens = attention.proj_out(tokens)
    grid = tokens.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)
    return x + (grid if linear else attention.proj_out(grid))


def _runs_lean(block: Any, tokens: Tensor) -> bool:
    # What works in place knows nothing of autocast.
    merged = block.merged_self is not None and not torch.is_autocast_enabled(tokens.device.type)
    return merged and can_run_lean_block(block)
