"""The folded transformer block in as few products and passes over memory as it takes, for inference.

The same modules as `NVSTransformerBlock`, which is its twin. Products that read the same tokens are one product of
weights side by side (`merge`); what lies between products is one pass (`token_ops`); the last product adds to the
residual stream itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

from nvsadapter_guidance.attention import MultiHeadAttention
from nvsadapter_guidance.blocks import BlockAdapter, FoldedViews, NVSTransformerBlock, ViewContext
from nvsadapter_guidance.composer import LearnableTokenComposer, joint_views
from nvsadapter_guidance.feed_forward import gate
from nvsadapter_guidance.merged import keep_merged
from nvsadapter_guidance.token_ops import normalise, place

Tokens = Float[Tensor, "rows tokens dim"]


def can_run_lean_block(block: NVSTransformerBlock) -> bool:
    """Whether `lean_block` computes what the block computes: plain layers without a LoRA, say, and not in training."""
    adapter, first, forward = block.block_adapter, block.attn1, block.ff
    attentions = [module for module in adapter.modules() if isinstance(module, MultiHeadAttention)]
    layers = [
        first.to_q,
        first.to_k,
        first.to_v,
        first.to_out[0],
        forward.net[2],
        getattr(forward.net[0], "proj", None),
    ]
    layers += [layer for attention in attentions for layer in attention.children()]
    return (
        not block.training
        and is_plain_attention(first)
        and isinstance(forward.net[0], GEGLU)
        and len(forward.net) == 3
        and all(type(layer) is nn.Linear for layer in layers)
        and all(layer.bias is None for layer in (first.to_q, first.to_k, first.to_v))
        and forward.net[2].bias is not None
        and all(
            type(norm) is nn.LayerNorm and norm.bias is not None for norm in (block.norm1, block.norm2, block.norm3)
        )
    )


def is_plain_attention(attention: Any) -> bool:
    """Whether an attention of diffusers is softmax attention and a linear layer, and nothing else."""
    return (
        isinstance(attention.processor, AttnProcessor | AttnProcessor2_0)
        and not attention.norm_cross
        and attention.group_norm is None
        and attention.spatial_norm is None
        and getattr(attention, "norm_q", None) is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
    )


def merge(block: NVSTransformerBlock) -> None:
    """Bring the block's merged weights up to date; they are not part of its state, and stay where they lie.

    Nothing is done for a block that `can_run_lean_block` refuses.
    """
    if can_run_lean_block(block):
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be written later
            keep_merged(block, _merged(block))


def _merged(block: Any) -> dict[str, Tensor]:
    """Weights side by side, and what the composer's tokens ask."""
    attention, view, composer = block.attn1, block.block_adapter.view_attn, block.block_adapter.composer
    made = {
        "self": _side_by_side(attention.to_q, attention.to_k, attention.to_v),
        "view": _side_by_side(view.to_q, view.to_k, view.to_v),
    }
    if isinstance(composer, LearnableTokenComposer):
        gather, spread = composer.gather, composer.spread
        made["compose"] = _side_by_side(gather.to_k, gather.to_v, spread.to_q)
        made["spread"] = _side_by_side(spread.to_k, spread.to_v)
        made["learned"] = gather.to_q(composer.tokens)
    return made


@torch.no_grad()
def lean_block(block: Any, x: Tokens, views: ViewContext, folded: FoldedViews) -> Tokens:
    """The residual stream after a block whose weights are merged; ``x`` is changed."""
    adapter: BlockAdapter = block.block_adapter
    rows, path, heads = views.support_rows, adapter.path, adapter.view_attn.heads
    positional = views.positional[adapter.level]

    x = x.contiguous()
    queries, keys, values = F.linear(normalise(x, block.norm1), block.merged_self).chunk(3, dim=-1)
    attended = attend(queries, keys, values, block.attn1.heads, block.attn1.scale)
    placed = place(x, block.attn1.to_out[0](attended), positional)
    query = placed[rows:]
    if adapter.composer is not None:
        composed = _composed(block, query, views.num_query)
        if composed is not None:
            query = place(x[rows:], composed, positional[rows:])

    deltas = _view_deltas(block, placed[:rows], query, folded, heads)
    vectors, texted = _vectors(block, folded, path), f"{path}.text" not in folded.constants
    norm = block.norm2 if texted else block.norm3
    bias = None if texted else block.ff.net[2].bias
    hidden = _join(adapter, x, rows, folded, deltas, vectors, norm, bias)
    if texted:
        added = block.attend_text(hidden, folded)
        hidden = normalise(x, block.norm3, added, bias=block.ff.net[2].bias)
    inner = gate(block.ff.net[0].proj(hidden)).flatten(0, 1)
    x.flatten(0, 1).addmm_(inner, block.ff.net[2].weight.t())
    return x


def attend(
    queries: Float[Tensor, "batch queries inner"],
    keys: Float[Tensor, "batch tokens inner"],
    values: Float[Tensor, "batch tokens inner"],
    heads: int,
    scale: float | None = None,
) -> Float[Tensor, "batch queries inner"]:
    """Softmax attention (Vaswani et al. 2017, section 3.2.2), heads side by side."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def _side_by_side(*layers: nn.Linear) -> Tensor:
    return torch.cat([layer.weight for layer in layers])


def _composed(block: Any, query: Tokens, num_query: int) -> Tokens | None:
    """What the composer adds to the query rows."""
    composer = block.block_adapter.composer
    if not isinstance(composer, LearnableTokenComposer):
        return composer(query, num_query)
    gather, spread = composer.gather, composer.spread
    keys, values, queries = F.linear(joint_views(query, num_query), block.merged_compose).chunk(3, dim=-1)
    learned = block.merged_learned.expand(len(keys), -1, -1)
    gathered = gather.to_out(attend(learned, keys, values, gather.heads))
    keys, values = F.linear(gathered, block.merged_spread).chunk(2, dim=-1)
    return spread.to_out(attend(queries, keys, values, spread.heads)).view_as(query)


def _view_deltas(
    block: Any, support: Tokens, query: Tokens, folded: FoldedViews, heads: int
) -> tuple[Tokens | None, Tokens]:
    """What view attention adds to support and query rows."""
    adapter: BlockAdapter = block.block_adapter
    view, known, added = adapter.view_attn, folded.constants[f"{adapter.path}.support"], None
    known = known if folded.branches > 1 else known[-1:]
    if len(support):
        live = F.linear(support, block.merged_view)
        inner = live.shape[-1] // 3
        if adapter.config.view_attn_mode != "support_skip":
            queries, keys, values = live.chunk(3, dim=-1)
            added = view.to_out(attend(queries, keys, values, heads))
        live = live[..., inner:]
        known = torch.cat((live, known.expand_as(live)))
    # Samples that share keys and values are one sequence.
    queries = view.to_q(query).view(len(known), -1, known.shape[-1] // 2)
    keys, values = known.chunk(2, dim=-1)
    return added, view.to_out(attend(queries, keys, values, heads)).view_as(query)


def _vectors(block: Any, folded: FoldedViews, path: str) -> tuple[Tensor | None, Tensor | None]:
    """Constant vectors of image attention, and of text attention where the text is one token; rows by branch."""
    found = (folded.constants.get(f"{path}.{name}") for name in ("image", "text"))
    image, text = (None if vectors is None else vectors[-folded.branches :, 0] for vectors in found)
    return image, text


def _join(
    adapter: BlockAdapter,
    x: Tokens,
    rows: int,
    folded: FoldedViews,
    deltas: tuple[Tokens | None, Tokens],
    vectors: tuple[Tensor | None, Tensor | None],
    norm: nn.LayerNorm,
    bias: Tensor | None,
) -> Tokens:
    """Add what view, image and one-token text attention make, and normalise."""
    image, text = vectors
    both = text if image is None else image if text is None else image + text
    hidden = torch.empty_like(x)
    if rows:
        query_only = adapter.config.image_attn_mode == "query_only" and not adapter.config.imgemb_to_text
        first = text if query_only else both
        first = None if first is None else first[:1]
        factor = 2.0 if query_only else 1.0  # as released, see `BlockAdapter.image_deltas`
        normalise(x[:rows], norm, deltas[0], first, 0, factor, bias, out=hidden[:rows])
    unconditional = (len(x) - rows) * (folded.branches - 1) // folded.branches
    normalise(x[rows:], norm, deltas[1], both, unconditional, bias=bias, out=hidden[rows:])
    return hidden
