"""Stable Diffusion's UNet by `lean_layers`, for inference: the same modules, half of the memory traffic."""

from collections.abc import Iterator
from typing import Any, TypeAlias

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
from nvsadapter_guidance.lean_layers import convolve_owing, enlarge, is_lean, offset_of, residual_block
from nvsadapter_guidance.merged import drop_merged, keep_merged

Owing: TypeAlias = tuple[Float[Tensor, "rows C h w"], Float[Tensor, " C"] | None]
"""A tensor, and a bias that is still to be added to it."""

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


def merge_time(unet: Any) -> None:
    """Make one product of what all residual blocks make of the time embedding.

    Nothing is merged where one of these layers is of another kind, one with a LoRA, say.
    """
    resnets = _resnets(unet)
    layers = [resnet.time_emb_proj for resnet in resnets]
    if not _are_plain(layers):
        drop_merged(unet)
        return
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be written later
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias + resnet.conv1.bias for layer, resnet in zip(layers, resnets, strict=True)])
        keep_merged(unet, {"time_weight": weight, "time_bias": bias})


@torch.no_grad()
def predict_lean(
    unet: Any, latents: Float[Tensor, "rows c h w"], timesteps: Shaped[Tensor, " rows"], context: ViewContext
) -> Float[Tensor, "rows c h w"]:
    """What the UNet predicts for rows in its precision, with what its transformer blocks know of them."""
    if unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        latents = latents.contiguous(memory_format=torch.channels_last)
    offsets = _offsets(unet, F.silu(unet.time_embedding(unet.time_proj(timesteps).to(latents.dtype))))
    x, owed = convolve_owing(latents, unet.conv_in)
    skips = [(x, owed)]
    for part in unet.down_blocks:
        attentions = getattr(part, "attentions", (None,) * len(part.resnets))
        for resnet, attention in zip(part.resnets, attentions, strict=True):
            x, owed = _transform(attention, residual_block(resnet, x, next(offsets), owed), context), None
            skips.append((x, owed))
        for sampler in part.downsamplers or ():
            x, owed = convolve_owing(x, sampler.conv)
            skips.append((x, owed))
    middle = unet.mid_block
    x = residual_block(middle.resnets[0], x, next(offsets), owed)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x, owed = residual_block(resnet, _transform(attention, x, context), next(offsets)), None
    for part in unet.up_blocks:
        attentions = getattr(part, "attentions", (None,) * len(part.resnets))
        for resnet, attention in zip(part.resnets, attentions, strict=True):
            x, owed = _beside((x, owed), skips.pop())
            x, owed = _transform(attention, residual_block(resnet, x, next(offsets), owed), context), None
        for sampler in part.upsamplers or ():
            x, owed = convolve_owing(enlarge(x, _size(skips[-1][0])), sampler.conv)
    return unet.conv_out(group_norm_silu(x, unet.conv_norm_out, None if owed is None else owed[None]))


def _resnets(unet: Any) -> list[Any]:
    """Residual blocks in the order in which they run."""
    return [resnet for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for resnet in part.resnets]


def _are_plain(layers: list[Any]) -> bool:
    return all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)


def _offsets(unet: Any, time: Float[Tensor, "rows D"]) -> Iterator[Float[Tensor, "rows C"]]:
    """What the residual blocks add between their convolutions."""
    resnets = _resnets(unet)
    if unet.merged_time_weight is None or not _are_plain([resnet.time_emb_proj for resnet in resnets]):
        return (offset_of(resnet, time) for resnet in resnets)
    together = F.linear(time, unet.merged_time_weight, unet.merged_time_bias)
    return iter(together.split([resnet.conv1.out_channels for resnet in resnets], dim=1))


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _beside(first: Owing, second: Owing) -> Owing:
    """Channels of both."""
    x = torch.cat((first[0], second[0]), dim=1)
    if first[1] is None and second[1] is None:
        return x, None
    return x, torch.cat([x.new_zeros(part.shape[1]) if owed is None else owed for part, owed in (first, second)])


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
