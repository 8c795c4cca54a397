"""The feed-forward layer of diffusers' transformer blocks, its gate in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.triton_support import current, has_triton

ROWS, BLOCK = 8, 256
"""Of the tile of one program; usual widths are multiples of the latter."""


def feed_forward(layer: Any, x: Float[Tensor, "rows tokens dim"]) -> Float[Tensor, "rows tokens dim"]:
    """What ``layer(x)`` is, without a gradient; of kinds other than gated ones the layer itself is called."""
    if torch.is_grad_enabled() or layer.training or not isinstance(layer.net[0], GEGLU) or not has_triton(x.device):
        return layer(x)
    return layer.net[2](fused_gate(layer.net[0].proj(x)))


def gate(projected: Float[Tensor, "*rows twice"]) -> Float[Tensor, "*rows width"]:
    """``a GELU(b)`` where ``projected`` holds a and b side by side, without a gradient where there are kernels."""
    if has_triton(projected.device):
        return fused_gate(projected)
    value, at = projected.chunk(2, dim=-1)
    return value * F.gelu(at)


def fused_gate(projected: Float[Tensor, "*rows twice"]) -> Float[Tensor, "*rows width"]:
    """``a GELU(b)`` where ``projected`` holds a and b side by side, by the kernel of `gated_kernel`, no gradient."""
    from nvsadapter_guidance.gated_kernel import gated_kernel

    projected = projected.contiguous()
    width = projected.shape[-1] // 2
    out = projected.new_empty(*projected.shape[:-1], width)
    rows = out.numel() // width
    with current(projected.device):
        gated_kernel[(-(-rows // ROWS), -(-width // BLOCK))](projected, out, rows, width, ROWS=ROWS, BLOCK=BLOCK)
    return out
