"""Multi-head attention of the adapter, with keys and values that can be computed apart and kept."""

from typing import Tuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Softmax attention (Vaswani et al. 2017, section 3.2.2) without biases except on the output."""

    def __init__(self, dim: int, heads: int, inner_dim: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim)

    def keys_values(
        self, context: Float[Tensor, "batch tokens context_dim"]
    ) -> Tuple[Float[Tensor, "batch tokens inner"], Float[Tensor, "batch tokens inner"]]:
        """Keys and values of a context."""
        return self.to_k(context), self.to_v(context)

    def attend(
        self,
        x: Float[Tensor, "#batch queries dim"],
        keys: Float[Tensor, "batch tokens inner"],
        values: Float[Tensor, "batch tokens inner"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Output for `x` attending to keys and values; an `x` of batch 1 does so in every one of their batch."""
        queries = self.to_q(x).expand(keys.shape[0], -1, -1)
        split = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        out = F.scaled_dot_product_attention(*split)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def forward(
        self, x: Float[Tensor, "batch queries dim"], context: Float[Tensor, "batch tokens context_dim"]
    ) -> Float[Tensor, "batch queries dim"]:
        """Output for `x` attending to `context`.

        A single context token has softmax weight 1 whatever the query is, so the output is one constant vector per
        batch element and queries and keys are not computed (`to_q` and `to_k` then get no gradient either).
        """
        if context.shape[1] == 1:
            return self.to_out(self.to_v(context)).expand(-1, x.shape[1], -1)
        return self.attend(x, *self.keys_values(context))
