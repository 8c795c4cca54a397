"""Triton kernel of the gate of a GEGLU layer (Shazeer 2020, arXiv 2002.05202): one pass, where torch takes two."""
# Arguments of kernels are what the launch makes of them: pointers, numbers, compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def gated_kernel(projected, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` (rows, width) = a GELU(b) of ``projected`` (rows, 2 width), which holds a and b side by side."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    start = projected + row.to(tl.int64)[:, None] * 2 * width + column[None, :]
    value = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(start + width, mask=mask, other=0.0).to(tl.float32)
    result = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    places = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=mask)
