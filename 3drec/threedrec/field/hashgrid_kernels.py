"""Triton kernels of the hash encoding; ``hashgrid_triton`` launches them, ``hashgrid`` holds the definition.

One program handles a block of points and, in turn, a group of levels: features of four neighbours, two each, fill a
memory sector of 32 bytes. Where the result sums over levels the group is all of them. A tile (BLOCK, CHANNELS) holds a
row's channels side by side, so that one instruction reads, or adds to, a whole row.

Arguments shared by all kernels: ``points`` (N, 3) in [0, 1]; ``table`` (T, CHANNELS); ``scales`` (L,) float64;
``numbers`` (L, 5) int32: strides along y and z, rows, first row, 1 if hashed; ``count`` = N; ``opened``: levels from
there on count as zero. Arithmetic happens in the type of the points.
"""

# Triton gives the types of a kernel's arguments at its launch.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def points_of_program(count, BLOCK: tl.constexpr):
    """Return (indices of the points, which of them exist, group of levels); neighbours share the group."""
    blocks = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    index = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return index, index < count, program // blocks


@triton.jit
def locate(points, index, inside, axis: tl.constexpr, scale):
    """Return the cell along one axis and the position inside it."""
    x = tl.load(points + index * 3 + axis, mask=inside, other=0.0)
    position = tl.minimum(tl.maximum(x, 0.0), 1.0) * scale + 0.5
    cell = tl.floor(position)
    return cell.to(tl.int32), position - cell


@triton.jit
def shape_of(numbers, level):
    """Return the five numbers of a level."""
    first = numbers + level * 5
    return tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), tl.load(first + 4)


@triton.jit
def corner_row(cell_x, cell_y, cell_z, corner: tl.constexpr, shape):
    """Return the table row of a cell's corner; its bits 0, 1, 2 step along x, y, z."""
    stride_y, stride_z, size, start, hashed = shape
    x = cell_x + (corner & 1)
    y = (cell_y + (corner >> 1 & 1)) * stride_y
    z = (cell_z + (corner >> 2)) * stride_z
    summed = x + y + z
    # Only corners beyond the last cell run over the end; tiny-cuda-nn wraps them round too.
    summed = tl.where(summed >= size, summed - size, summed)
    return start + tl.where(hashed != 0, (x ^ y ^ z) & (size - 1), summed)


@triton.jit
def near_far(fraction, far: tl.constexpr):
    """Return the linear weight of the far or the near end."""
    if far:
        return fraction
    return 1.0 - fraction


@triton.jit
def slope_along(tangent_x, tangent_y, tangent_z, x, y, z, scale, corner: tl.constexpr):
    """Return the derivative of a corner's weight x y z along a tangent of the point."""
    step_x = scale if corner & 1 else -scale
    step_y = scale if corner >> 1 & 1 else -scale
    step_z = scale if corner >> 2 else -scale
    return tangent_x * step_x * y * z + tangent_y * step_y * x * z + tangent_z * step_z * x * y


@triton.jit
def load_vector(vectors, index, inside):
    """Return the three components of (N, 3) rows."""
    x = tl.load(vectors + index * 3, mask=inside, other=0.0)
    y = tl.load(vectors + index * 3 + 1, mask=inside, other=0.0)
    z = tl.load(vectors + index * 3 + 2, mask=inside, other=0.0)
    return x, y, z


@triton.jit
def level_features(points, table, scales, numbers, index, inside, level, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the features of one level, (BLOCK, CHANNELS)."""
    kind: tl.constexpr = points.dtype.element_ty
    scale, shape = tl.load(scales + level).to(kind), shape_of(numbers, level)
    channel = tl.arange(0, CHANNELS)
    cell_x, fraction_x = locate(points, index, inside, 0, scale)
    cell_y, fraction_y = locate(points, index, inside, 1, scale)
    cell_z, fraction_z = locate(points, index, inside, 2, scale)
    sums = tl.zeros([BLOCK, CHANNELS], dtype=kind)
    for corner in tl.static_range(8):
        row = corner_row(cell_x, cell_y, cell_z, corner, shape)
        weight = near_far(fraction_x, corner & 1) * near_far(fraction_y, corner >> 1 & 1)
        weight = weight * near_far(fraction_z, corner >> 2)
        values = tl.load(table + row[:, None] * CHANNELS + channel[None, :], mask=inside[:, None], other=0.0)
        sums += weight[:, None] * values.to(kind)
    return sums


@triton.jit(do_not_specialize=["count", "opened"])
def features_kernel(
    points, table, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out`` (N, LEVELS CHANNELS): the features."""
    index, exists, group = points_of_program(count, BLOCK)
    for member in range(GROUP):
        level = group * GROUP + member
        # A closed level reads nothing and writes zeros; the last group may reach beyond the levels.
        inside = exists & (level < opened)
        known = tl.minimum(level, LEVELS - 1)
        sums = level_features(points, table, scales, numbers, index, inside, known, CHANNELS, BLOCK)
        at = index[:, None] * (LEVELS * CHANNELS) + level * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=(exists & (level < LEVELS))[:, None])


@triton.jit(do_not_specialize=["count", "opened"])
def tangent_kernel(
    points, table, tangents, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out`` (N, LEVELS CHANNELS): the derivative of the features along ``tangents`` (N, 3)."""
    index, exists, group = points_of_program(count, BLOCK)
    kind: tl.constexpr = points.dtype.element_ty
    channel = tl.arange(0, CHANNELS)
    tangent_x, tangent_y, tangent_z = load_vector(tangents, index, exists)
    for member in range(GROUP):
        level = group * GROUP + member
        inside = exists & (level < opened)
        known = tl.minimum(level, LEVELS - 1)
        scale, shape = tl.load(scales + known).to(kind), shape_of(numbers, known)
        cell_x, fraction_x = locate(points, index, inside, 0, scale)
        cell_y, fraction_y = locate(points, index, inside, 1, scale)
        cell_z, fraction_z = locate(points, index, inside, 2, scale)
        sums = tl.zeros([BLOCK, CHANNELS], dtype=kind)
        for corner in tl.static_range(8):
            row = corner_row(cell_x, cell_y, cell_z, corner, shape)
            x, y = near_far(fraction_x, corner & 1), near_far(fraction_y, corner >> 1 & 1)
            z = near_far(fraction_z, corner >> 2)
            slope = slope_along(tangent_x, tangent_y, tangent_z, x, y, z, scale, corner)
            values = tl.load(table + row[:, None] * CHANNELS + channel[None, :], mask=inside[:, None], other=0.0)
            sums += slope[:, None] * values.to(kind)
        at = index[:, None] * (LEVELS * CHANNELS) + level * CHANNELS + channel[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=(exists & (level < LEVELS))[:, None])


@triton.jit(do_not_specialize=["count", "opened"])
def pull_kernel(
    points, table, pulls, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` (N, 3): J^T g, with J = d(features)/d(point) and g a row of ``pulls`` (N, LEVELS CHANNELS)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = index < count
    kind: tl.constexpr = points.dtype.element_ty
    channel = tl.arange(0, CHANNELS)
    along_x = tl.zeros([BLOCK], dtype=kind)
    along_y = tl.zeros([BLOCK], dtype=kind)
    along_z = tl.zeros([BLOCK], dtype=kind)
    for level in range(LEVELS):
        inside = within & (level < opened)
        scale, shape = tl.load(scales + level).to(kind), shape_of(numbers, level)
        cell_x, fraction_x = locate(points, index, inside, 0, scale)
        cell_y, fraction_y = locate(points, index, inside, 1, scale)
        cell_z, fraction_z = locate(points, index, inside, 2, scale)
        at = index[:, None] * (LEVELS * CHANNELS) + level * CHANNELS + channel[None, :]
        pull = tl.load(pulls + at, mask=inside[:, None], other=0.0).to(kind) * scale
        for corner in tl.static_range(8):
            row = corner_row(cell_x, cell_y, cell_z, corner, shape)
            values = tl.load(table + row[:, None] * CHANNELS + channel[None, :], mask=inside[:, None], other=0.0)
            value = tl.sum(values.to(kind) * pull, axis=1)
            x, y = near_far(fraction_x, corner & 1), near_far(fraction_y, corner >> 1 & 1)
            z = near_far(fraction_z, corner >> 2)
            along_x += value * y * z if corner & 1 else -value * y * z
            along_y += value * x * z if corner >> 1 & 1 else -value * x * z
            along_z += value * x * y if corner >> 2 else -value * x * y
    tl.store(out + index * 3, along_x, mask=within)
    tl.store(out + index * 3 + 1, along_y, mask=within)
    tl.store(out + index * 3 + 2, along_z, mask=within)


@triton.jit(do_not_specialize=["count", "opened"])
def scatter_kernel(
    points, grads, pulls, tangents, unit, sums, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    VALUES: tl.constexpr, SLOPES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """``sums`` (T, CHANNELS) += what every corner receives: w ``grads`` (``VALUES``) and (w' . v) g (``SLOPES``).

    w is the corner's weight, w' its slope, v a row of ``tangents`` (N, 3), g a row of ``pulls``. ``FIXED``: sums are
    64-bit integers, in units of 1 / ``unit[0]``, and do not depend on the order of addition.
    """
    index, exists, group = points_of_program(count, BLOCK)
    kind: tl.constexpr = points.dtype.element_ty
    channel = tl.arange(0, CHANNELS)
    factor = tl.load(unit).to(kind) if FIXED else 1.0
    if SLOPES:
        tangent_x, tangent_y, tangent_z = load_vector(tangents, index, exists)
    for member in range(GROUP):
        level = group * GROUP + member
        inside = exists & (level < opened)
        known = tl.minimum(level, LEVELS - 1)
        scale, shape = tl.load(scales + known).to(kind), shape_of(numbers, known)
        cell_x, fraction_x = locate(points, index, inside, 0, scale)
        cell_y, fraction_y = locate(points, index, inside, 1, scale)
        cell_z, fraction_z = locate(points, index, inside, 2, scale)
        at = index[:, None] * (LEVELS * CHANNELS) + level * CHANNELS + channel[None, :]
        if VALUES:
            grad = tl.load(grads + at, mask=inside[:, None], other=0.0).to(kind) * factor
        if SLOPES:
            pull = tl.load(pulls + at, mask=inside[:, None], other=0.0).to(kind) * factor
        for corner in tl.static_range(8):
            row = corner_row(cell_x, cell_y, cell_z, corner, shape)
            x, y = near_far(fraction_x, corner & 1), near_far(fraction_y, corner >> 1 & 1)
            z = near_far(fraction_z, corner >> 2)
            push = tl.zeros([BLOCK, CHANNELS], dtype=kind)
            if VALUES:
                push += (x * y * z)[:, None] * grad
            if SLOPES:
                push += slope_along(tangent_x, tangent_y, tangent_z, x, y, z, scale, corner)[:, None] * pull
            target = sums + row[:, None] * CHANNELS + channel[None, :]
            if FIXED:
                tl.atomic_add(target, push.to(tl.int64), mask=inside[:, None], sem="relaxed")
            else:
                tl.atomic_add(target, push, mask=inside[:, None], sem="relaxed")
