"""Triton kernels of group normalisation with SiLU on channels-last tensors, seen as (N, rows, C).

Three passes each way: moments of tiles, their union per group, and the elementwise result. Moments are a tile's own
mean and sum of squared differences from it, united by Chan et al. 1979, so that no digits are lost where the mean is
large. Every sum is in float32. Wherever a value is read, ``offset`` is added: the bias of the layer before, and the
time embedding. Its samples are ``apart`` elements from each other, 0 where all have the same.
"""
# Arguments of kernels are what the launch makes of them: pointers, numbers, compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def tile_of(pixels, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's (sample, tile, channel numbers, inside, places, mask), places counted in elements."""
    sample, tile = tl.program_id(0), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    mask = (row < pixels)[:, None] & inside[None, :]
    places = (sample.to(tl.int64) * pixels + row)[:, None] * channels + channel[None, :]
    return sample, tile, channel, inside, places, mask


@triton.jit
def normalised(x, offset, apart, stats, sample, channels, channel, inside):
    """Return (x + offset - mean) / deviation."""
    mean = tl.load(stats + sample * 2 * channels + channel, mask=inside, other=0.0)
    inverse = tl.load(stats + (sample * 2 + 1) * channels + channel, mask=inside, other=0.0)
    shift = tl.load(offset + sample * apart + channel, mask=inside, other=0.0).to(tl.float32)
    return (x + (shift - mean)[None, :]) * inverse[None, :]


@triton.jit
def affine(hat, weight, bias, channel, inside):
    """Return hat weight + bias, and the weight."""
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    return hat * factor[None, :] + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :], factor


@triton.jit(do_not_specialize=["apart", "pixels"])
def moments_kernel(x, offset, apart, out, pixels, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` (N, tiles, 2, C): mean and summed squared difference of every channel in a tile of ``ROWS`` rows."""
    sample, tile, channel, inside, places, mask = tile_of(pixels, channels, ROWS, BLOCK)
    count = tl.minimum(ROWS, pixels - tile * ROWS).to(tl.float32)
    values = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / count
    difference = tl.where(mask, values - mean[None, :], 0.0)
    shift = tl.load(offset + sample * apart + channel, mask=inside, other=0.0).to(tl.float32)
    place = out + ((sample * tl.num_programs(1) + tile) * 2) * channels + channel
    tl.store(place, mean + shift, mask=inside)
    tl.store(place + channels, tl.sum(difference * difference, axis=0), mask=inside)


@triton.jit
def tiles_of_group(pixels, channels, tiles, start, size, ROWS: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr):
    """Return (places of the first of two numbers a tile and channel, their mask, rows of the tiles)."""
    sample, group = tl.program_id(0), tl.program_id(1)
    tile, member = start + tl.arange(0, TILES), tl.arange(0, PADDED)
    mask = (tile < tiles)[:, None] & (member < size)[None, :]
    places = (sample * tiles + tile)[:, None] * 2 * channels + (group * size + member)[None, :]
    return places, mask, tl.where(mask, tl.minimum(ROWS, pixels - tile * ROWS)[:, None], 0).to(tl.float32)


@triton.jit
def store_for_group(target, first, second, channels, size, PADDED: tl.constexpr):
    """Write two numbers to every channel of the group in ``target`` (N, 2, C)."""
    member = tl.arange(0, PADDED)
    place = target + tl.program_id(0) * 2 * channels + tl.program_id(1) * size + member
    tl.store(place, tl.zeros([PADDED], tl.float32) + first, mask=member < size)
    tl.store(place + channels, tl.zeros([PADDED], tl.float32) + second, mask=member < size)


@triton.jit(do_not_specialize=["pixels", "tiles", "size"])
def union_kernel(
    moments, stats, pixels, channels, tiles, size, eps,
    ROWS: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``stats`` (N, 2, C): mean and inverse deviation of the group, of ``size`` channels, of every channel."""
    total = pixels * size * 1.0
    sums = tl.zeros([PADDED], tl.float32)
    for chunk in range(CHUNKS):
        places, mask, count = tiles_of_group(pixels, channels, tiles, chunk * TILES, size, ROWS, PADDED, TILES)
        sums += tl.sum(tl.load(moments + places, mask=mask, other=0.0) * count, axis=0)
    mean = tl.sum(sums, axis=0) / total
    squares = tl.zeros([PADDED], tl.float32)
    for chunk in range(CHUNKS):
        places, mask, count = tiles_of_group(pixels, channels, tiles, chunk * TILES, size, ROWS, PADDED, TILES)
        apart = tl.load(moments + places, mask=mask, other=0.0) - mean
        squares += tl.sum(tl.load(moments + places + channels, mask=mask, other=0.0) + count * apart * apart, axis=0)
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / total + eps)
    store_for_group(stats, mean, inverse, channels, size, PADDED)


@triton.jit(do_not_specialize=["apart", "pixels"])
def apply_kernel(
    x,
    offset,
    apart,
    stats,
    weight,
    bias,
    out,
    pixels,
    channels,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out``: normalised, scaled and shifted, and through SiLU where wanted."""
    sample, _, channel, inside, places, mask = tile_of(pixels, channels, ROWS, BLOCK)
    values = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    hat = normalised(values, offset, apart, stats, sample, channels, channel, inside)
    result, _ = affine(hat, weight, bias, channel, inside)
    if SILU:
        result = result * tl.sigmoid(result)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def before_silu(gradient, inner, SILU: tl.constexpr):
    """Return the gradient on what SiLU was given."""
    if SILU:
        gate = tl.sigmoid(inner)
        gradient = gradient * gate * (1.0 + inner * (1.0 - gate))
    return gradient


@triton.jit(do_not_specialize=["apart", "pixels"])
def sums_kernel(
    x, offset, apart, stats, weight, bias, gradient, out, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` (N, tiles, 2, C): sums over a tile of the gradient g on the normalised values, and of g times these."""
    sample, tile, channel, inside, places, mask = tile_of(pixels, channels, ROWS, BLOCK)
    values = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    hat = normalised(values, offset, apart, stats, sample, channels, channel, inside)
    inner, factor = affine(hat, weight, bias, channel, inside)
    above = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
    below = before_silu(above, inner, SILU) * factor[None, :]
    place = out + ((sample * tl.num_programs(1) + tile) * 2) * channels + channel
    tl.store(place, tl.sum(below, axis=0), mask=inside)
    tl.store(place + channels, tl.sum(below * hat, axis=0), mask=inside)


@triton.jit(do_not_specialize=["pixels", "tiles", "size"])
def means_kernel(
    sums, means, pixels, channels, tiles, size,
    ROWS: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``means`` (N, 2, C): of `sums_kernel`'s sums over the group of every channel."""
    first, second = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    for chunk in range(CHUNKS):
        places, mask, _ = tiles_of_group(pixels, channels, tiles, chunk * TILES, size, ROWS, PADDED, TILES)
        first += tl.sum(tl.load(sums + places, mask=mask, other=0.0), axis=0)
        second += tl.sum(tl.load(sums + places + channels, mask=mask, other=0.0), axis=0)
    total = pixels * size * 1.0
    store_for_group(means, tl.sum(first, axis=0) / total, tl.sum(second, axis=0) / total, channels, size, PADDED)


@triton.jit(do_not_specialize=["apart", "pixels"])
def gradient_kernel(
    x, offset, apart, stats, weight, bias, gradient, other, means, out, pixels, channels,
    SILU: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out``: (g - mean(g) - hat mean(g hat)) / deviation, the gradient on ``x``, plus the other one where wanted."""
    sample, _, channel, inside, places, mask = tile_of(pixels, channels, ROWS, BLOCK)
    values = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    hat = normalised(values, offset, apart, stats, sample, channels, channel, inside)
    inner, factor = affine(hat, weight, bias, channel, inside)
    above = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
    below = before_silu(above, inner, SILU) * factor[None, :]
    first = tl.load(means + sample * 2 * channels + channel, mask=inside, other=0.0)
    second = tl.load(means + (sample * 2 + 1) * channels + channel, mask=inside, other=0.0)
    inverse = tl.load(stats + (sample * 2 + 1) * channels + channel, mask=inside, other=0.0)
    result = (below - first[None, :] - hat * second[None, :]) * inverse[None, :]
    if ADD:
        result += tl.load(other + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=mask)
