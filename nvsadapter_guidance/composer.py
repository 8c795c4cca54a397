"""The composer: how the query views of one sample see each other."""

from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nvsadapter_guidance.attention import MultiHeadAttention


def joint_views(tokens: Float[Tensor, "rows tokens dim"], num_query: int) -> Float[Tensor, "batch view_tokens dim"]:
    """Tokens of the `num_query` views of each sample side by side in one sequence."""
    return tokens.unflatten(0, (-1, num_query)).flatten(1, 2)


class LearnableTokenComposer(nn.Module):
    """Views exchange information through learned tokens (NVS-Adapter, section 3.2).

    The tokens gather from all query tokens of a sample, and the query tokens read the result back; the cost is
    linear in the number of views.
    """

    def __init__(self, dim: int, heads: int, inner_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, num_tokens, dim))
        self.gather = MultiHeadAttention(dim, heads, inner_dim, dim)
        self.spread = MultiHeadAttention(dim, heads, inner_dim, dim)

    @property
    def out(self) -> MultiHeadAttention:
        """The attention whose output joins the residual stream."""
        return self.spread

    def forward(self, query: Float[Tensor, "rows tokens dim"], num_query: int) -> Float[Tensor, "rows tokens dim"]:
        """What is added to the query tokens."""
        views = joint_views(query, num_query)
        gathered = self.gather.attend(self.tokens, *self.gather.keys_values(views))
        return self.spread(views, gathered).reshape(query.shape)


class JointComposer(nn.Module):
    """All query tokens of a sample attend to each other; quadratic in the number of views.

    With `active` off it holds the parameters of the released "all_to_all" mode, whose forward pass never uses them.
    """

    def __init__(self, dim: int, heads: int, inner_dim: int, active: bool) -> None:
        super().__init__()
        self.joint = MultiHeadAttention(dim, heads, inner_dim, dim)
        self.active = active

    @property
    def out(self) -> MultiHeadAttention:
        """The attention whose output joins the residual stream."""
        return self.joint

    def forward(
        self, query: Float[Tensor, "rows tokens dim"], num_query: int
    ) -> Optional[Float[Tensor, "rows tokens dim"]]:
        """What is added to the query tokens; None in the released no-op mode."""
        if not self.active:
            return None
        views = joint_views(query, num_query)
        return self.joint(views, views).reshape(query.shape)
