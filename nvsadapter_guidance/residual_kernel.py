"""Triton kernel of a sum of two channels-last tensors and a bias: one pass, where torch takes two."""
# Arguments of kernels are what the launch makes of them: pointers, numbers, compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(first, second, bias, out, rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` = first + second + bias, all seen as (rows, C) except the bias (C,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    places = row.to(tl.int64)[:, None] * channels + channel[None, :]
    total = tl.load(first + places, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(second + places, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)
