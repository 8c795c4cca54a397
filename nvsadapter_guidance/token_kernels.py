"""Triton kernel of what lies between the products of a transformer block: residual sums, constants, and a norm."""
# Arguments of kernels are what the launch makes of them: pointers, numbers, compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def channel_vector(source, channel, inside):
    """Read a vector over channels as (1, C)."""
    return tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows", "split", "apart"])
def join_kernel(
    x, delta, vectors, bias, weight, shift, positional, joined, out, rows, split, apart, factor, eps,
    channels: tl.constexpr, DELTA: tl.constexpr, VECTORS: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``s = factor (x + delta) + vector``; ``joined = s + bias``; ``out`` is ``norm(s)``, or else ``s + positional``.

    All are (rows, C); the vector of the first ``split`` rows is the first of two, ``apart`` elements before the other.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    mask = (row < rows)[:, None] & inside[None, :]
    places = row.to(tl.int64)[:, None] * channels + channel[None, :]
    total = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if DELTA:
        total += tl.load(delta + places, mask=mask, other=0.0).to(tl.float32)
    total *= factor
    if VECTORS:
        first = channel_vector(vectors, channel, inside)
        second = channel_vector(vectors + apart, channel, inside)
        total += tl.where((row < split)[:, None], first, second)
    if WRITE:
        kept = total
        if BIAS:
            kept = total + channel_vector(bias, channel, inside)
        tl.store(joined + places, kept.to(joined.dtype.element_ty), mask=mask)
    if NORM:
        mean = tl.sum(tl.where(mask, total, 0.0), axis=1) / channels
        centred = tl.where(mask, total - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
        total = centred * inverse[:, None] * channel_vector(weight, channel, inside)
        total += channel_vector(shift, channel, inside)
    else:
        total += tl.load(positional + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)
