"""The network call on views of one object with everything constant taken out of it.

Views of one object share their text, their image token and their support view. What every transformer block makes of
these is computed once (`fold`): keys and values of the text or, where there is a single text token, the vector that it
adds; the vector that the image token adds; keys and values of the support view. Rays are embedded once for both
branches of classifier-free guidance: the unconditional branch sees zeros, of which a convolution makes its bias.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.blocks import CONTEXT_KEY, FoldedViews, NVSTransformerBlock, ViewContext
from nvsadapter_guidance.cuda_graphs import Beside
from nvsadapter_guidance.lean_block import is_plain_attention, merge
from nvsadapter_guidance.lean_unet import can_run_lean, merge_time, predict_lean
from nvsadapter_guidance.ray_patches import positional_features
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
    return network.adapter.config.support_is_independent and all(
        is_plain_attention(block.attn2) for block in _blocks(network).values()
    )


@torch.no_grad()
def fold(
    network: MultiViewUNet,
    text: Float[Tensor, "1 tokens dim"],
    image: Float[Tensor, "1 1 image_dim"],
    conditional: SupportCache,
    unconditional: SupportCache | None,
) -> Constants:
    """Everything that blocks need to know of an object; weights that blocks merge are brought up to date on the way.

    Args:
        conditional, unconditional: of the support view; None where unconditional samples see fresh noise.
    """
    dtype = network.unet.conv_in.weight.dtype
    text, image = text.to(dtype), image.to(dtype)
    tokens = torch.cat((torch.zeros_like(image), image))
    support = conditional if unconditional is None else SupportCache.cat((unconditional, conditional))
    constants: Constants = {}
    lean = can_run_lean(network.unet)
    if lean:
        merge_time(network.unet)
    for path, block in _blocks(network).items():
        if lean:
            merge(block)
        adapter, attention = block.block_adapter, block.attn2
        constants[f"{path}.support"] = torch.cat(support.entries[path], dim=-1)
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
    rays: Callable[[], Float[Tensor, "G n channels h w"]],
    constants: Mapping[str, Tensor],
    both_branches: bool = True,
    fresh_support: Float[Tensor, "G 1 c h w"] | None = None,
) -> Float[Tensor, "branches G n c h w"]:
    """The UNet's predictions, unconditional before conditional; the latter alone without ``both_branches``.

    Equal to `MultiViewUNet.forward` on the same conditions.

    Args:
        rays: makes those of the query views, relative to the support view; beside the first layers in a CUDA graph.
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
    positional = _Positional(Beside(lambda: _positional(network, rays(), rows - views)))
    context = ViewContext(support_rows, num_query, positional, folded=folded)
    predicted = _predict(network, torch.cat(latents), torch.cat(steps), context)
    # In float32 at least, since the difference of two near predictions is wanted.
    predicted = predicted[support_rows:].to(torch.promote_types(noisy.dtype, torch.float32))
    return predicted.unflatten(0, (branches, groups, num_query))


class _Positional(Mapping[int, Tensor]):
    """Positional features by level, waited for when the first is asked for."""

    def __init__(self, features: Beside) -> None:
        self._features = features

    def __getitem__(self, level: int) -> Tensor:
        return self._features()[level]

    def __iter__(self) -> Iterator[int]:
        return iter(self._features())

    def __len__(self) -> int:
        return len(self._features())


def _predict(network: MultiViewUNet, latents: Tensor, timesteps: Tensor, context: ViewContext) -> Tensor:
    unet: Any = network.unet
    if can_run_lean(unet):
        return predict_lean(unet, latents, timesteps, context)
    kwargs = {CONTEXT_KEY: context}
    return unet(latents, timesteps, encoder_hidden_states=None, cross_attention_kwargs=kwargs, return_dict=False)[0]


def _positional(
    network: MultiViewUNet, rays: Float[Tensor, "G n channels h w"], unconditional_rows: int
) -> dict[int, Tensor]:
    """Positional features of all rows in the network's precision; those of unconditional rows are of zero rays."""
    dtype, adapter, features = network.unet.conv_in.weight.dtype, network.adapter, {}
    for level, found in positional_features(adapter, rays.flatten(0, 1), dtype).items():
        bias: Any = adapter.ray_convs[level].bias
        all_rows = found.new_empty(unconditional_rows + len(found), *found.shape[1:], dtype=dtype)
        all_rows[:unconditional_rows] = bias
        all_rows[unconditional_rows:] = found
        features[level] = all_rows
    return features


def _blocks(network: MultiViewUNet) -> dict[str, NVSTransformerBlock]:
    # By the adapter's paths, which wrappers such as a compiled UNet do not change.
    found = (module for module in network.unet.modules() if isinstance(module, NVSTransformerBlock))
    return {block.block_adapter.path: block for block in found}
