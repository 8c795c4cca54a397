"""The network call on views of one object with everything constant taken out of it.

Views of one object share their text, their image token and their support view. What every transformer block makes of
these is computed once (`fold`): keys and values of the text or, where there is a single text token, the vector that it
adds; the vector that the image token adds; keys and values of the support view. Rays are embedded once for both
branches of classifier-free guidance: the unconditional branch sees zeros, of which a convolution makes its bias.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.blocks import CONTEXT_KEY, FoldedViews, NVSTransformerBlock, ViewContext
from nvsadapter_guidance.lean_unet import can_run_lean, predict_lean
from nvsadapter_guidance.support_cache import SupportCache
from nvsadapter_guidance.unet import MultiViewUNet

Constants = dict[str, Tensor]
"""By block path and name, e.g. ``<path>.text_keys``; those that differ between branches have the rows
[unconditional, conditional]."""


def can_fold(network: MultiViewUNet) -> bool:
    """Whether the network's blocks are the plain ones that `fold` knows."""
    unet: Any = network.unet
    if network.controlnet is not None or unet.encoder_hid_proj is not None:
        return False
    return network.adapter.config.support_is_independent and all(map(_is_plain, _blocks(network).values()))


@torch.no_grad()
def fold(
    network: MultiViewUNet,
    text: Float[Tensor, "1 tokens dim"],
    image: Float[Tensor, "1 1 image_dim"],
    conditional: SupportCache,
    unconditional: SupportCache | None,
) -> Constants:
    """Everything that blocks need to know of an object.

    Args:
        conditional, unconditional: of the support view; None where unconditional samples see fresh noise.
    """
    dtype = network.unet.conv_in.weight.dtype
    text, image = text.to(dtype), image.to(dtype)
    tokens = torch.cat((torch.zeros_like(image), image))
    support = conditional if unconditional is None else SupportCache.cat((unconditional, conditional))
    constants: Constants = {}
    for path, block in _blocks(network).items():
        adapter, attention = block.block_adapter, block.attn2
        constants[f"{path}.keys"], constants[f"{path}.values"] = support.entries[path]
        if adapter.image_attn is not None and not adapter.config.imgemb_to_text:
            constants[f"{path}.image"] = adapter.image_attn.to_out(adapter.image_attn.to_v(tokens))
        context = tokens if adapter.config.imgemb_to_text else text
        if context.shape[1] == 1:
            constants[f"{path}.text"] = attention.to_out[0](attention.to_v(context))
        else:
            constants[f"{path}.text_keys"] = attention.to_k(context)
            constants[f"{path}.text_values"] = attention.to_v(context)
    return constants


@torch.no_grad()
def denoise_folded(
    network: MultiViewUNet,
    noisy: Float[Tensor, "G n c h w"],
    timesteps: Int[Tensor, " G"],
    rays: Float[Tensor, "G n channels h w"],
    constants: Mapping[str, Tensor],
    both_branches: bool = True,
    fresh_support: Float[Tensor, "G 1 c h w"] | None = None,
) -> Float[Tensor, "branches G n c h w"]:
    """The UNet's predictions, unconditional before conditional; the latter alone without ``both_branches``.

    Equal to `MultiViewUNet.forward` on the same conditions.

    Args:
        rays: of the query views, relative to the support view.
        constants: of `fold`.
        fresh_support: what the unconditional samples see in place of the support view, where `fold` was not told.
    """
    groups, num_query = noisy.shape[:2]
    dtype, branches = network.unet.conv_in.weight.dtype, 2 if both_branches else 1
    views = groups * num_query
    support_rows = groups if both_branches and fresh_support is not None else 0
    latents = [noisy.flatten(0, 1).to(dtype)] * branches
    steps = [timesteps[:, None].expand(-1, num_query).flatten()] * branches
    if support_rows and fresh_support is not None:
        last = network.adapter.config.num_train_timesteps - 1
        latents.insert(0, fresh_support[:, 0].to(dtype))
        steps.insert(0, torch.full_like(timesteps, last))
    rows = support_rows + branches * views
    # Which row of the constants a row of the batch takes: the last `views` rows are the conditional ones.
    branch = (torch.arange(rows, device=noisy.device) >= rows - views).long()
    folded = FoldedViews(constants, branch, branches)
    context = ViewContext(support_rows, num_query, _positional(network, rays, rows - views), folded=folded)
    predicted = _predict(network.unet, torch.cat(latents), torch.cat(steps), context)
    # In float32 at least, since the difference of two near predictions is wanted.
    predicted = predicted[support_rows:].to(torch.promote_types(noisy.dtype, torch.float32))
    return predicted.unflatten(0, (branches, groups, num_query))


def _predict(unet: Any, latents: Tensor, timesteps: Tensor, context: ViewContext) -> Tensor:
    if can_run_lean(unet):
        return predict_lean(unet, latents, timesteps, context)
    kwargs = {CONTEXT_KEY: context}
    return unet(latents, timesteps, encoder_hidden_states=None, cross_attention_kwargs=kwargs, return_dict=False)[0]


def _positional(
    network: MultiViewUNet, rays: Float[Tensor, "G n channels h w"], unconditional_rows: int
) -> dict[int, Tensor]:
    """Positional features of all rows in the network's precision; those of unconditional rows are of zero rays."""
    dtype, features = network.unet.conv_in.weight.dtype, {}
    for level, found in network.adapter.positional_features(rays.flatten(0, 1)).items():
        bias: Any = network.adapter.ray_convs[level].bias
        zeros = bias.to(dtype).expand(unconditional_rows, found.shape[1], -1)
        features[level] = torch.cat((zeros, found.to(dtype)))
    return features


def _blocks(network: MultiViewUNet) -> dict[str, NVSTransformerBlock]:
    # By the adapter's paths, which wrappers such as a compiled UNet do not change.
    found = (module for module in network.unet.modules() if isinstance(module, NVSTransformerBlock))
    return {block.block_adapter.path: block for block in found}


def _is_plain(block: NVSTransformerBlock) -> bool:
    """Whether text attention is softmax attention and a linear layer, and nothing else."""
    attention: Any = block.attn2
    return (
        isinstance(attention.processor, AttnProcessor | AttnProcessor2_0)
        and not attention.norm_cross
        and attention.group_norm is None
        and attention.spatial_norm is None
        and getattr(attention, "norm_q", None) is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
    )
