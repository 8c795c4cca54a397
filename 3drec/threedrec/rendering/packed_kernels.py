"""Triton kernels of the renderer; ``packed_triton`` launches them, ``marching`` and ``compositing`` define them.

One program follows one ray, a block of steps or samples at a time. ``offsets`` (R + 1,) int64 says where a ray's
samples begin in the packed tensors; the last entry is their number.
"""

# Triton gives the types of a kernel's arguments at its launch.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def slab(origin, direction, low, high):
    """Return the distances at which a ray enters and leaves the space between two planes."""
    # A direction component of exactly 0 would give 0 * inf = nan for an origin on the plane.
    safe = tl.where(tl.abs(direction) < 1e-12, 1e-12, direction)
    first, second = (low - origin) / safe, (high - origin) / safe
    return tl.minimum(first, second), tl.maximum(first, second)


@triton.jit
def cell_along(origin, direction, distances, radius, resolution):
    """Return the index of the occupancy cell along one axis, of a block of points on a ray."""
    scale = resolution / (2.0 * radius)
    index = ((origin + radius) * scale + distances * (direction * scale)).to(tl.int32)
    return tl.minimum(tl.maximum(index, 0), resolution - 1)


@triton.jit
def march_kernel(
    rays_o, rays_d, jitter, bounds, binary, offsets, counts, starts, points,
    radius, step, near, far, resolution,
    SKIP: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the segments of each ray (``counts``), or with ``WRITE`` store their ``starts`` and middle ``points``."""
    ray = tl.program_id(0).to(tl.int64)
    ox, oy, oz = tl.load(rays_o + ray * 3), tl.load(rays_o + ray * 3 + 1), tl.load(rays_o + ray * 3 + 2)
    dx, dy, dz = tl.load(rays_d + ray * 3), tl.load(rays_d + ray * 3 + 1), tl.load(rays_d + ray * 3 + 2)
    in_x, out_x = slab(ox, dx, -radius, radius)
    in_y, out_y = slab(oy, dy, -radius, radius)
    in_z, out_z = slab(oz, dz, -radius, radius)
    anchor = tl.maximum(tl.maximum(tl.maximum(in_x, in_y), tl.maximum(in_z, 0.0)), near)
    if SKIP:
        in_x, out_x = slab(ox, dx, tl.load(bounds), tl.load(bounds + 3))
        in_y, out_y = slab(oy, dy, tl.load(bounds + 1), tl.load(bounds + 4))
        in_z, out_z = slab(oz, dz, tl.load(bounds + 2), tl.load(bounds + 5))
    entry = tl.maximum(tl.maximum(tl.maximum(in_x, in_y), tl.maximum(in_z, 0.0)), anchor)
    leave = tl.minimum(tl.minimum(tl.minimum(out_x, out_y), out_z), far)
    base = anchor + (tl.floor((entry - anchor) / step) - tl.load(jitter + ray)) * step
    steps = tl.where(leave > entry, tl.ceil((leave - base) / step) + 1.0, 0.0).to(tl.int32)
    number = tl.load(offsets + ray)
    first = 0
    while first < steps:
        start = base + (first + tl.arange(0, BLOCK)).to(base.dtype) * step
        middle = start + 0.5 * step
        keep = (middle >= entry) & (middle < leave)
        if SKIP:
            cell = cell_along(ox, dx, middle, radius, resolution)
            cell = cell * resolution + cell_along(oy, dy, middle, radius, resolution)
            cell = cell * resolution + cell_along(oz, dz, middle, radius, resolution)
            keep = keep & (tl.load(binary + cell, mask=keep, other=0) != 0)
        kept = keep.to(tl.int32)
        if WRITE:
            at = number + tl.cumsum(kept, 0) - 1
            tl.store(starts + at, start, mask=keep)
            tl.store(points + at * 3, ox + middle * dx, mask=keep)
            tl.store(points + at * 3 + 1, oy + middle * dy, mask=keep)
            tl.store(points + at * 3 + 2, oz + middle * dz, mask=keep)
        number += tl.sum(kept, 0)
        first += BLOCK
    if not WRITE:
        tl.store(counts + ray, number)


@triton.jit
def opacity_of(optical_depth):
    """Return 1 - exp(-x), exact for small x as well."""
    series = optical_depth * (1.0 - optical_depth / 2.0 * (1.0 - optical_depth / 3.0 * (1.0 - optical_depth / 4.0)))
    return tl.where(optical_depth < 0.02, series, 1.0 - tl.exp(-optical_depth))


@triton.jit
def segment(density, begin, end, at, length, most, BLOCK: tl.constexpr):
    """Return optical depths of the samples ``at`` and what lies before each of them since ``begin`` of the block."""
    inside = (at >= begin) & (at < end)
    depth = tl.minimum(tl.load(density + at, mask=inside, other=0.0) * length, most)
    # The sum of the others, not the sum minus oneself: that would lose a faint sample before an opaque one.
    earlier = tl.load(density + at - 1, mask=inside & (at > begin), other=0.0) * length
    return depth, tl.cumsum(tl.minimum(earlier, most), 0)


@triton.jit
def visible_kernel(
    density, starts, offsets, kept_offsets, counts, rays, kept_starts,
    length, most, min_transmittance, min_opacity, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the samples of each ray that can matter, or with ``WRITE`` store their rays and starts."""
    ray = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    number = tl.load(kept_offsets + ray)
    before = tl.sum(tl.zeros([BLOCK], dtype=density.dtype.element_ty), 0)
    begin = first
    while begin < last:
        at = begin + tl.arange(0, BLOCK)
        depth, earlier = segment(density, begin, last, at, length, most, BLOCK)
        keep = (tl.exp(-(before + earlier)) >= min_transmittance) & (opacity_of(depth) >= min_opacity) & (at < last)
        before += tl.sum(depth, 0)
        kept = keep.to(tl.int32)
        if WRITE:
            to = number + tl.cumsum(kept, 0) - 1
            tl.store(rays + to, ray, mask=keep)
            tl.store(kept_starts + to, tl.load(starts + at, mask=keep, other=0.0), mask=keep)
        number += tl.sum(kept, 0)
        begin += BLOCK
    if not WRITE:
        tl.store(counts + ray, number)


@triton.jit
def composite_kernel(
    density, distances, colors, normals, offsets, weights, through, sums, length, most,
    NORMALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store ``weights`` and transmittances ``through`` (N,), and ``sums`` (R, 8): 1, distance, colour, normal."""
    ray = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    nothing = tl.zeros([BLOCK], dtype=density.dtype.element_ty)
    before, opacity, distance = tl.sum(nothing, 0), tl.sum(nothing, 0), tl.sum(nothing, 0)
    red, green, blue = tl.sum(nothing, 0), tl.sum(nothing, 0), tl.sum(nothing, 0)
    x, y, z = tl.sum(nothing, 0), tl.sum(nothing, 0), tl.sum(nothing, 0)
    begin = first
    while begin < last:
        at = begin + tl.arange(0, BLOCK)
        inside = at < last
        depth, earlier = segment(density, begin, last, at, length, most, BLOCK)
        light = tl.exp(-(before + earlier))
        weight = tl.where(inside, light * opacity_of(depth), 0.0)
        before += tl.sum(depth, 0)
        tl.store(weights + at, weight, mask=inside)
        tl.store(through + at, light, mask=inside)
        opacity += tl.sum(weight, 0)
        distance += tl.sum(weight * tl.load(distances + at, mask=inside, other=0.0), 0)
        red += tl.sum(weight * tl.load(colors + at * 3, mask=inside, other=0.0), 0)
        green += tl.sum(weight * tl.load(colors + at * 3 + 1, mask=inside, other=0.0), 0)
        blue += tl.sum(weight * tl.load(colors + at * 3 + 2, mask=inside, other=0.0), 0)
        if NORMALS:
            x += tl.sum(weight * tl.load(normals + at * 3, mask=inside, other=0.0), 0)
            y += tl.sum(weight * tl.load(normals + at * 3 + 1, mask=inside, other=0.0), 0)
            z += tl.sum(weight * tl.load(normals + at * 3 + 2, mask=inside, other=0.0), 0)
        begin += BLOCK
    out = sums + ray * 8
    tl.store(out, opacity)
    tl.store(out + 1, distance)
    tl.store(out + 2, red)
    tl.store(out + 3, green)
    tl.store(out + 4, blue)
    tl.store(out + 5, x)
    tl.store(out + 6, y)
    tl.store(out + 7, z)


@triton.jit
def composite_backward_kernel(
    density, distances, colors, normals, offsets, weights, through, grad_weights, grad_sums,
    grad_density, grad_colors, grad_normals, length, most, NORMALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of densities, colours and normals, from the last sample of each ray to its first.

    With g = dL/dw, dL/d(optical depth) = g_i T_i (1 - alpha_i) - sum_{j > i} g_j w_j.
    """
    ray = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    into = grad_sums + ray * 8
    opacity, distance = tl.load(into), tl.load(into + 1)
    red, green, blue = tl.load(into + 2), tl.load(into + 3), tl.load(into + 4)
    x, y, z = tl.load(into + 5), tl.load(into + 6), tl.load(into + 7)
    behind = tl.sum(tl.zeros([BLOCK], dtype=density.dtype.element_ty), 0)
    end = last
    while end > first:
        at = end - BLOCK + tl.arange(0, BLOCK)
        inside = at >= first
        weight = tl.load(weights + at, mask=inside, other=0.0)
        light = tl.load(through + at, mask=inside, other=0.0)
        pull = tl.load(grad_weights + at, mask=inside, other=0.0) + opacity
        pull += distance * tl.load(distances + at, mask=inside, other=0.0)
        pull += red * tl.load(colors + at * 3, mask=inside, other=0.0)
        pull += green * tl.load(colors + at * 3 + 1, mask=inside, other=0.0)
        pull += blue * tl.load(colors + at * 3 + 2, mask=inside, other=0.0)
        tl.store(grad_colors + at * 3, weight * red, mask=inside)
        tl.store(grad_colors + at * 3 + 1, weight * green, mask=inside)
        tl.store(grad_colors + at * 3 + 2, weight * blue, mask=inside)
        if NORMALS:
            pull += x * tl.load(normals + at * 3, mask=inside, other=0.0)
            pull += y * tl.load(normals + at * 3 + 1, mask=inside, other=0.0)
            pull += z * tl.load(normals + at * 3 + 2, mask=inside, other=0.0)
            tl.store(grad_normals + at * 3, weight * x, mask=inside)
            tl.store(grad_normals + at * 3 + 1, weight * y, mask=inside)
            tl.store(grad_normals + at * 3 + 2, weight * z, mask=inside)
        pulled = tl.where(inside, pull * weight, 0.0)
        total = tl.sum(pulled, 0)
        after = behind + total - tl.cumsum(pulled, 0)
        behind += total
        depth = tl.load(density + at, mask=inside, other=0.0) * length
        grad = tl.where(depth <= most, (pull * (light - weight) - after) * length, 0.0)
        tl.store(grad_density + at, grad, mask=inside)
        end -= BLOCK
