"""The transformer block with the adapter's attentions, and the per-call context that it works in.

Order in a block: self-attention, composer, view attention, image attention, text attention, feed-forward. Rows of
every batch are ordered: the support rows of all samples first, then the query rows, sample by sample.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.attention import MultiHeadAttention
from nvsadapter_guidance.composer import JointComposer, LearnableTokenComposer, joint_views
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.feed_forward import feed_forward
from nvsadapter_guidance.merged import register_merged

CONTEXT_KEY = "nvs_views"
"""Name of the `ViewContext` in `cross_attention_kwargs`."""

MERGED = ("self", "view", "compose", "spread", "learned")
"""Names of the buffers ``merged_<name>`` of a block, which `lean_block` fills."""

KeyValues = Tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FoldedViews:
    """What blocks know of views whose conditions are constant, see `folded.fold`.

    Rows are ordered: support rows of unconditional samples if any, unconditional query rows if any, conditional ones.
    """

    constants: Mapping[str, Tensor]
    branch: Tensor
    """[rows]: the row of two-row constants that a row of the batch takes, 1 where it is conditional, else 0."""
    branches: int
    """Number of branches among the query rows."""


@dataclass(frozen=True)
class ViewContext:
    """What the blocks of one network call need to know about its views."""

    support_rows: int
    """Rows of the support stream at the start of the batch; 0 when its keys and values come from a cache."""
    num_query: int
    """Query views per sample; 0 when the support stream runs alone."""
    positional: Mapping[int, Tensor]
    """Positional features by level: [rows, tokens, channels]."""
    image_tokens: Optional[Tensor] = None
    """[rows, 1, image_context_dim]."""
    cached: Optional[Dict[str, KeyValues]] = None
    """Support keys and values of view attention by block path, instead of support rows."""
    record: Optional[Dict[str, KeyValues]] = None
    """Receives the same when the support stream runs alone."""
    folded: Optional[FoldedViews] = None
    """Instead of image tokens, text and cached keys and values."""


class BlockAdapter(nn.Module):
    """The adapter's layers of one transformer block: composer, view attention, image attention."""

    def __init__(self, config: NVSAdapterConfig, path: str, level: int, dim: int, heads: int, inner_dim: int) -> None:
        super().__init__()
        self.config = config
        self.path = path
        self.level = level
        self.composer = _build_composer(config, level, dim, heads, inner_dim)
        self.view_attn = MultiHeadAttention(dim, heads, inner_dim, dim)
        self.image_attn: Optional[MultiHeadAttention] = None
        if config.image_attn_mode is not None:
            self.image_attn = MultiHeadAttention(dim, heads, inner_dim, config.image_context_dim)

    def forward(self, x: Float[Tensor, "rows tokens dim"], views: ViewContext) -> Float[Tensor, "rows tokens dim"]:
        """The residual stream after composer, view attention and image attention."""
        positional = views.positional[self.level]
        support, query = x[: views.support_rows], x[views.support_rows :]
        support_pos, query_pos = positional[: views.support_rows], positional[views.support_rows :]
        composed = self.composer_delta(query + query_pos, views)
        if composed is not None:
            query = query + composed
        support_delta, query_delta = self.view_deltas(support + support_pos, query + query_pos, views)
        support, query = _add(support, support_delta), _add(query, query_delta)
        support_delta, query_delta = self.image_deltas(support, query, views)
        support, query = _add(support, support_delta), _add(query, query_delta)
        if views.support_rows == 0:
            return query
        return support if views.num_query == 0 else torch.cat((support, query))

    def forward_folded(
        self, x: Float[Tensor, "rows tokens dim"], views: ViewContext, folded: FoldedViews
    ) -> Float[Tensor, "rows tokens dim"]:
        """The same with constants, for inference; changes `x` itself, and spares copies of it by that."""
        rows, path = views.support_rows, self.path
        placed = x + views.positional[self.level]
        composed = self.composer_delta(placed[rows:], views)
        if composed is not None:
            x[rows:] += composed
            placed[rows:] += composed
        keys, values = folded.constants[f"{path}.support"].chunk(2, dim=-1)
        if folded.branches == 1:
            keys, values = keys[-1:], values[-1:]
        if rows:
            live = self.view_attn.keys_values(placed[:rows])
            if self.config.view_attn_mode != "support_skip":
                x[:rows] += self.view_attn.attend(placed[:rows], *live)
            keys, values = (torch.cat((a, b.expand_as(a))) for a, b in zip(live, (keys, values), strict=True))
        # Samples that share keys and values are one sequence.
        joint = placed[rows:].reshape(keys.shape[0], -1, x.shape[-1])
        x[rows:] += self.view_attn.attend(joint, keys, values).view_as(x[rows:])
        if rows and self.config.image_attn_mode == "query_only" and not self.config.imgemb_to_text:
            x[:rows] *= 2.0  # as released, see `image_deltas`
        image = folded.constants.get(f"{path}.image")
        if image is not None:
            first = rows if self.config.image_attn_mode == "query_only" else 0
            x[first:] += image[folded.branch[first:]]
        return x

    def composer_delta(self, query: Tensor, views: ViewContext) -> Optional[Tensor]:
        """What the composer adds to the query rows; None for nothing."""
        if self.composer is None or views.num_query == 0:
            return None
        return self.composer(query, views.num_query)

    def view_deltas(
        self, support: Tensor, query: Tensor, views: ViewContext
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """What view attention adds to support and query rows (inputs hold positional features); None for nothing.

        Query rows of a sample share their support, so they attend to it as one sequence of all their tokens.
        """
        if views.cached is not None:
            keys, values = views.cached[self.path]
            return None, self._attend_joint(query, keys, values, views.num_query)
        keys, values = self.view_attn.keys_values(support)
        if views.record is not None:
            views.record[self.path] = (keys, values)
        support_delta = None
        if self.config.view_attn_mode == "support_xattn":
            support_delta = self.view_attn(support, joint_views(query, views.num_query))
        elif self.config.view_attn_mode != "support_skip":
            support_delta = self.view_attn.attend(support, keys, values)
        if views.num_query == 0:
            return support_delta, None
        return support_delta, self._attend_joint(query, keys, values, views.num_query)

    def image_deltas(
        self, support: Tensor, query: Tensor, views: ViewContext
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """What image attention adds to support and query rows; None for nothing.

        In "query_only" the released model adds the support stream to itself, which doubles it in every block.
        """
        if self.image_attn is None or self.config.imgemb_to_text or views.image_tokens is None:
            return None, None
        support_tokens = views.image_tokens[: views.support_rows]
        query_tokens = views.image_tokens[views.support_rows :]
        support_delta = support if self.config.image_attn_mode == "query_only" else None
        if views.support_rows > 0 and self.config.image_attn_mode == "support_query":
            support_delta = self.image_attn(support, support_tokens)
        return support_delta, self.image_attn(query, query_tokens) if views.num_query > 0 else None

    def _attend_joint(self, query: Tensor, keys: Tensor, values: Tensor, num_query: int) -> Tensor:
        return self.view_attn.attend(joint_views(query, num_query), keys, values).reshape(query.shape)


class NVSTransformerBlock(nn.Module):
    """A diffusers transformer block that hands its residual stream to a `BlockAdapter` after self-attention.

    It takes over the modules of the block it replaces under the same names, so module paths and state dicts of the
    base model stay as they were. The adapter's layers are linked, not registered: they belong to the `NVSAdapter`.
    Called without a `ViewContext` it computes what the base block computes.
    """

    def __init__(self, base: BasicTransformerBlock, adapter: BlockAdapter) -> None:
        super().__init__()
        self.norm1, self.attn1 = base.norm1, base.attn1
        self.norm2, self.attn2 = base.norm2, base.attn2
        self.norm3, self.ff = base.norm3, base.ff
        self.__dict__["adapter"] = adapter
        register_merged(self, MERGED)
        self.train(base.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "rows tokens dim"],
        attention_mask: Optional[Tensor] = None,
        encoder_hidden_states: Optional[Tensor] = None,
        encoder_attention_mask: Optional[Tensor] = None,
        timestep: Optional[Tensor] = None,
        cross_attention_kwargs: Optional[Dict[str, Any]] = None,
        class_labels: Optional[Tensor] = None,
        added_cond_kwargs: Optional[Dict[str, Tensor]] = None,
    ) -> Float[Tensor, "rows tokens dim"]:
        """Same signature as the block it replaces; `cross_attention_kwargs` may hold the `ViewContext`."""
        kwargs = dict(cross_attention_kwargs or {})
        views = kwargs.pop(CONTEXT_KEY, None)
        x = hidden_states
        x = self.attn1(self.norm1(x), attention_mask=attention_mask, **kwargs) + x
        if views is not None and views.folded is not None:
            x = self.block_adapter.forward_folded(x, views, views.folded)
            x += self._folded_text(x, views.folded)
            return feed_forward(self.ff, self.norm3(x)) + x
        text = encoder_hidden_states
        if views is not None:
            x = self.block_adapter(x, views)
            text = views.image_tokens if self.block_adapter.config.imgemb_to_text else text
        x = self._text_attention(x, text, encoder_attention_mask, kwargs) + x
        return self.ff(self.norm3(x)) + x

    @property
    def block_adapter(self) -> BlockAdapter:
        """The adapter's part of the block."""
        return self.__dict__["adapter"]

    def _folded_text(self, x: Tensor, folded: FoldedViews) -> Tensor:
        """What text attention adds: a vector a branch for one token, else attention of all rows as one sequence."""
        vectors = folded.constants.get(f"{self.block_adapter.path}.text")
        if vectors is not None:
            return vectors if len(vectors) == 1 else vectors[folded.branch]
        return self.attend_text(self.norm2(x), folded)

    def attend_text(self, hidden: Tensor, folded: FoldedViews) -> Tensor:
        """Text attention of all rows, normalised already, as one sequence."""
        path, attention = self.block_adapter.path, self.attn2
        queries = attention.to_q(hidden).flatten(0, 1)[None]
        keys, values = (folded.constants[f"{path}.{name}"] for name in ("text_keys", "text_values"))
        q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        return attention.to_out[0](attended.transpose(1, 2).flatten(2)).view_as(hidden)

    def _text_attention(
        self, x: Tensor, text: Optional[Tensor], mask: Optional[Tensor], kwargs: Dict[str, Any]
    ) -> Tensor:
        # A context of one token has softmax weight 1; only outside training, where to_q and to_k get no gradient.
        plain = isinstance(self.attn2.processor, (AttnProcessor, AttnProcessor2_0)) and mask is None and not kwargs
        if text is not None and text.shape[1] == 1 and plain and not torch.is_grad_enabled():
            return self.attn2.to_out[0](self.attn2.to_v(text))
        return self.attn2(self.norm2(x), encoder_hidden_states=text, attention_mask=mask, **kwargs)


def check_supported(block: BasicTransformerBlock, path: str) -> None:
    """Raise unless the adapter can work inside `block`.

    Raises:
        InputError: the block is not the layer-normed self-attention, text attention, feed-forward block of
            Stable Diffusion 1 and 2.
    """
    plain = block.norm_type == "layer_norm" and block.pos_embed is None and not hasattr(block, "fuser")
    if not plain or block.attn2 is None or block.only_cross_attention or block.double_self_attention:
        raise InputError(f"unet: block '{path}' is of a kind the adapter does not support; use a SD 1.x or 2.x UNet")


def _build_composer(config: NVSAdapterConfig, level: int, dim: int, heads: int, inner_dim: int) -> Optional[nn.Module]:
    if config.query_composer_mode is None:
        return None
    if config.query_composer_mode == "learnable_emb":
        side = config.latent_resolution // 2**level
        num_tokens = max(1, int(side * side * config.query_emb_scale))
        return LearnableTokenComposer(dim, heads, inner_dim, num_tokens)
    return JointComposer(dim, heads, inner_dim, active=config.query_composer_mode == "all_to_all_attention")


def _add(stream: Tensor, delta: Optional[Tensor]) -> Tensor:
    return stream if delta is None else stream + delta
