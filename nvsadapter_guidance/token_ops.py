"""Residual sums of transformer blocks with what follows them, in one pass over memory; for inference, in place.

A block is a chain of ``x += layer(...)``, constants that are added, and layer norms (Ba et al. 2016, arXiv
1607.06450) or positional features that make the next layer's input. Each function here does one link of it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nvsadapter_guidance.triton_support import current, has_triton

ELEMENTS = 2048
"""Of the rows that one program takes together."""

Tokens = Float[Tensor, "rows tokens dim"]


def place(x: Tokens, delta: Tokens, positional: Tokens) -> Tokens:
    """Add ``delta`` to ``x`` in place; return ``x + positional`` in the memory of ``delta``, which is used up."""
    if has_triton(x.device) and _contiguous(x, delta, positional):
        return _launch(x, delta, out=delta, positional=positional)
    x += delta
    return torch.add(x, positional, out=delta)


def normalise(
    x: Tokens,
    norm: nn.LayerNorm,
    delta: Tokens | None = None,
    vectors: Float[Tensor, "#2 dim"] | None = None,
    split: int = 0,
    factor: float = 1.0,
    bias: Float[Tensor, " dim"] | None = None,
    out: Tokens | None = None,
) -> Tokens:
    """Make ``s = factor (x + delta) + vector`` of ``x``, and return ``norm(s)``.

    Args:
        x: becomes ``s + bias`` in place; it stays as it is where nothing is added.
        vectors: one for all rows, or one for the first ``split`` of them and one for the others.
        bias: what the layer after the norm would add to its result, which is added to ``x`` by then.
        out: where to put the result.
    """
    if has_triton(x.device) and _contiguous(x, x if delta is None else delta):
        return _launch(x, delta, vectors, split * x.shape[1], factor, bias, norm, out=out)
    if delta is not None:
        x += delta
    if factor != 1.0:
        x *= factor
    if vectors is not None:
        x[:split] += vectors[0]
        x[split:] += vectors[-1]
    result = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if bias is not None:
        x += bias
    return result if out is None else out.copy_(result)


def _contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _launch(
    x: Tensor,
    delta: Tensor | None = None,
    vectors: Tensor | None = None,
    split: int = 0,
    factor: float = 1.0,
    bias: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    positional: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    from nvsadapter_guidance.token_kernels import join_kernel

    out = torch.empty_like(x) if out is None else out
    channels = x.shape[-1]
    rows = x.numel() // channels
    block = 1 << (channels - 1).bit_length()
    together = max(1, ELEMENTS // block)
    changed = delta is not None or vectors is not None or bias is not None or factor != 1.0
    vectors = None if vectors is None else vectors.contiguous()
    apart = 0 if vectors is None or len(vectors) == 1 else channels
    weight, shift, eps = (x, x, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    unused = (x if tensor is None else tensor for tensor in (delta, vectors, bias))
    with current(x.device):
        join_kernel[(-(-rows // together),)](
            x, *unused, weight, shift, x if positional is None else positional, x, out, rows, split, apart, factor, eps,
            channels, delta is not None, vectors is not None, bias is not None, norm is not None, changed,
            ROWS=together, BLOCK=block, num_warps=2,
        )  # fmt: skip
    return out
