"""Triton kernels of sums of channels-last tensors: one pass, where torch takes two.

An image may have a border of one row and one column at its far ends: pixel ``p`` of images of ``width`` by ``height``
then lies ``p // width`` pixels further for the columns before it, and ``width + 1`` further for every image before it.
"""
# Arguments of kernels are what the launch makes of them: pointers, numbers, compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def inside_border(pixel, width, height):
    """Return where pixels lie in images with a border."""
    return pixel + pixel // width + pixel // (width * height) * (width + 1)


@triton.jit(do_not_specialize=["rows", "width", "height"])
def sum_kernel(
    first, second, bias, out, rows, width, height, channels, BORDER: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` = first + second + bias, all seen as (rows, C) except the bias (C,); where wanted, inside a border."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    pixel = row.to(tl.int64)
    places = pixel[:, None] * channels + channel[None, :]
    total = tl.load(first + places, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(second + places, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if BORDER:
        places = inside_border(pixel, width, height)[:, None] * channels + channel[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "width", "height"])
def crop_kernel(x, out, rows, width, height, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` (rows, C): the pixels of ``x`` without its border."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    pixel = row.to(tl.int64)
    source = inside_border(pixel, width, height)[:, None] * channels + channel[None, :]
    tl.store(out + pixel[:, None] * channels + channel[None, :], tl.load(x + source, mask=mask), mask=mask)
