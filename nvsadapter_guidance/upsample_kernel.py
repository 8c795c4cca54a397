"""Triton kernel that doubles the side of channels-last images."""
# Arguments of kernels are what the launch makes of them: pointers, numbers, compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels", "width"])
def double_kernel(x, out, pixels, width, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` (N, 2 h, 2 w, C): each of the ``pixels`` (N h w) of ``x`` four times; ``width`` is that of ``x``."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    pixel = pixel.to(tl.int64)
    value = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=mask)
    # Row r of all images, column c: its copies begin at pixel 4 r w + 2 c, the lower ones a row of 2 w further.
    first = 4 * (pixel // width) * width + 2 * (pixel % width)
    for copy in tl.static_range(4):
        place = (first + (copy // 2) * 2 * width + copy % 2)[:, None] * channels + channel[None, :]
        tl.store(out + place, value, mask=mask)
