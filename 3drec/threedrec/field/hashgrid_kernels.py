"""Triton kernels of the hash encoding; ``hashgrid_triton`` launches them, ``hashgrid`` holds the definition.

One program handles a block of points and, in turn, a group of levels. A cell is visited edge by edge: the two ends of
an edge along x lie close together in the table, side by side in a dense level and, since the hash leaves x as it is,
mostly in the same cache line of a hashed one. Neighbouring lanes take the two ends of one point, so that one
instruction of a warp reads, or adds to, both: ``index`` says of each of the 2 BLOCK lanes which point it works for. A
tile (2 BLOCK, CHANNELS) holds a row's channels side by side.

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
def points_of_program(count, BLOCK: tl.constexpr, LANES: tl.constexpr, SPREAD: tl.constexpr = False):
    """Return (index of each lane's point, whether it exists, group of levels); neighbours share the group.

    ``SPREAD`` takes points far from each other, so that the threads of a warp seldom add to the same row.
    """
    blocks = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    block, point = (program % blocks).to(tl.int64), tl.arange(0, LANES) // (LANES // BLOCK)
    index = point * blocks + block if SPREAD else block * BLOCK + point
    return index, index < count, program // blocks


@triton.jit
def load_vector(vectors, index, inside):
    """Return the three components of (N, 3) rows."""
    x = tl.load(vectors + index * 3, mask=inside, other=0.0)
    y = tl.load(vectors + index * 3 + 1, mask=inside, other=0.0)
    z = tl.load(vectors + index * 3 + 2, mask=inside, other=0.0)
    return x, y, z


@triton.jit
def cell_along(x, scale):
    """Return the cell along one axis and the position inside it."""
    position = tl.minimum(tl.maximum(x, 0.0), 1.0) * scale + 0.5
    cell = tl.floor(position)
    return cell.to(tl.int32), position - cell


@triton.jit
def locate(points, index, inside, scale):
    """Return the cells of the points, and the positions inside them: x, y, z each."""
    x, y, z = load_vector(points, index, inside)
    cell_x, fraction_x = cell_along(x, scale)
    cell_y, fraction_y = cell_along(y, scale)
    cell_z, fraction_z = cell_along(z, scale)
    return cell_x, cell_y, cell_z, fraction_x, fraction_y, fraction_z


@triton.jit
def shape_of(numbers, level):
    """Return the five numbers of a level."""
    first = numbers + level * 5
    return tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), tl.load(first + 4)


@triton.jit
def end_row(end, cell_x, cell_y, cell_z, edge: tl.constexpr, shape):
    """Return the table row of an end (0 or 1) of a cell's edge along x; the edge's bits 0, 1 step along y, z."""
    stride_y, stride_z, size, start, hashed = shape
    x = cell_x + end
    y = (cell_y + (edge & 1)) * stride_y
    z = (cell_z + (edge >> 1)) * stride_z
    summed = x + y + z
    # Only corners beyond the last cell run over the end; tiny-cuda-nn wraps them round too.
    summed = tl.where(summed >= size, summed - size, summed)
    return start + tl.where(hashed != 0, (x ^ y ^ z) & (size - 1), summed)


@triton.jit
def load_ends(table, end, cell_x, cell_y, cell_z, edge: tl.constexpr, shape, inside, CHANNELS: tl.constexpr):
    """Return the features at the lanes' ends of an edge, (2 BLOCK, CHANNELS)."""
    row = end_row(end, cell_x, cell_y, cell_z, edge, shape)
    at = row[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tl.load(table + at, mask=inside[:, None], other=0.0)


@triton.jit
def near_far(fraction, far: tl.constexpr):
    """Return the linear weight of the far or the near end."""
    if far:
        return fraction
    return 1.0 - fraction


@triton.jit
def along_edge(end, fraction_x):
    """Return the weight along x of the lanes' ends, and the sign of its slope."""
    return tl.where(end == 1, fraction_x, 1.0 - fraction_x), tl.where(end == 1, 1.0, -1.0).to(fraction_x.dtype)


@triton.jit
def both_ends(values, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return each point's sum over its two lanes, (BLOCK, CHANNELS)."""
    return tl.sum(tl.reshape(values, [BLOCK, 2, CHANNELS]), axis=1)


@triton.jit
def across_edge(tangent_y, tangent_z, y, z, edge: tl.constexpr):
    """Return the derivative of an edge's weight y z, in cells, along a tangent of the point."""
    step_y = tangent_y if edge & 1 else -tangent_y
    step_z = tangent_z if edge >> 1 else -tangent_z
    return step_y * z + step_z * y


@triton.jit
def level_features(points, table, scales, numbers, index, inside, level, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the features of one level, (BLOCK, CHANNELS)."""
    kind: tl.constexpr = points.dtype.element_ty
    scale, shape = tl.load(scales + level).to(kind), shape_of(numbers, level)
    end = tl.arange(0, 2 * BLOCK) % 2
    cell_x, cell_y, cell_z, fraction_x, fraction_y, fraction_z = locate(points, index, inside, scale)
    weight_x = along_edge(end, fraction_x)[0]
    sums = tl.zeros([2 * BLOCK, CHANNELS], dtype=kind)
    for edge in tl.static_range(4):
        weight = weight_x * near_far(fraction_y, edge & 1) * near_far(fraction_z, edge >> 1)
        values = load_ends(table, end, cell_x, cell_y, cell_z, edge, shape, inside, CHANNELS)
        sums += weight[:, None] * values.to(kind)
    return both_ends(sums, CHANNELS, BLOCK)


@triton.jit
def level_tangent(
    points, table, tangent, scales, numbers, index, inside, level, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the derivative of one level's features along a tangent, (BLOCK, CHANNELS)."""
    kind: tl.constexpr = points.dtype.element_ty
    scale, shape = tl.load(scales + level).to(kind), shape_of(numbers, level)
    end = tl.arange(0, 2 * BLOCK) % 2
    cell_x, cell_y, cell_z, fraction_x, fraction_y, fraction_z = locate(points, index, inside, scale)
    tangent_x, tangent_y, tangent_z = tangent
    weight_x, sign = along_edge(end, fraction_x)
    sums = tl.zeros([2 * BLOCK, CHANNELS], dtype=kind)
    for edge in tl.static_range(4):
        y, z = near_far(fraction_y, edge & 1), near_far(fraction_z, edge >> 1)
        slope = sign * tangent_x * y * z + weight_x * across_edge(tangent_y, tangent_z, y, z, edge)
        values = load_ends(table, end, cell_x, cell_y, cell_z, edge, shape, inside, CHANNELS)
        sums += (scale * slope)[:, None] * values.to(kind)
    return both_ends(sums, CHANNELS, BLOCK)


@triton.jit
def put_level(tile, values, member, GROUP: tl.constexpr):
    """Return ``tile`` (BLOCK, GROUP, CHANNELS) with ``values`` (BLOCK, CHANNELS) at a member of the group."""
    return tl.where((tl.arange(0, GROUP) == member)[None, :, None], values[:, None, :], tile)


@triton.jit
def store_group(
    out, tile, count, group, LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """Write a group of levels, side by side: one write of a memory sector, not one of each of its parts."""
    index, exists, _ = points_of_program(count, BLOCK, BLOCK)
    column = group * (GROUP * CHANNELS) + tl.arange(0, GROUP * CHANNELS)[None, :]
    rows = tl.reshape(tile, [BLOCK, GROUP * CHANNELS]).to(out.dtype.element_ty)
    inside = exists[:, None] & (column < LEVELS * CHANNELS)
    tl.store(out + index[:, None] * (LEVELS * CHANNELS) + column, rows, mask=inside)


@triton.jit(do_not_specialize=["count", "opened"])
def features_kernel(
    points, table, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out`` (N, LEVELS CHANNELS): the features."""
    index, exists, group = points_of_program(count, BLOCK, 2 * BLOCK)
    tile = tl.zeros([BLOCK, GROUP, CHANNELS], dtype=points.dtype.element_ty)
    for member in range(GROUP):
        level = group * GROUP + member
        # A closed level reads nothing and writes zeros; the last group may reach beyond the levels.
        inside = exists & (level < opened)
        known = tl.minimum(level, LEVELS - 1)
        values = level_features(points, table, scales, numbers, index, inside, known, CHANNELS, BLOCK)
        tile = put_level(tile, values, member, GROUP)
    store_group(out, tile, count, group, LEVELS, CHANNELS, BLOCK, GROUP)


@triton.jit(do_not_specialize=["count", "opened"])
def tangent_kernel(
    points, table, tangents, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out`` (N, LEVELS CHANNELS): the derivative of the features along ``tangents`` (N, 3)."""
    index, exists, group = points_of_program(count, BLOCK, 2 * BLOCK)
    tangent = load_vector(tangents, index, exists)
    tile = tl.zeros([BLOCK, GROUP, CHANNELS], dtype=points.dtype.element_ty)
    for member in range(GROUP):
        level = group * GROUP + member
        inside = exists & (level < opened)
        known = tl.minimum(level, LEVELS - 1)
        values = level_tangent(points, table, tangent, scales, numbers, index, inside, known, CHANNELS, BLOCK)
        tile = put_level(tile, values, member, GROUP)
    store_group(out, tile, count, group, LEVELS, CHANNELS, BLOCK, GROUP)


@triton.jit
def point_sums(values, BLOCK: tl.constexpr):
    """Return each point's sum over its lanes and their columns, (BLOCK)."""
    return tl.sum(tl.reshape(tl.sum(values, axis=1), [BLOCK, 2]), axis=1)


@triton.jit(do_not_specialize=["count", "opened"])
def pull_kernel(
    points, table, pulls, out, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` (N, 3): J^T g, with J = d(features)/d(point) and g a row of ``pulls`` (N, LEVELS CHANNELS)."""
    index, within, _ = points_of_program(count, BLOCK, 2 * BLOCK)
    kind: tl.constexpr = points.dtype.element_ty
    channel, end = tl.arange(0, CHANNELS), tl.arange(0, 2 * BLOCK) % 2
    along_x = tl.zeros([2 * BLOCK, CHANNELS], dtype=kind)
    along_y = tl.zeros([2 * BLOCK, CHANNELS], dtype=kind)
    along_z = tl.zeros([2 * BLOCK, CHANNELS], dtype=kind)
    for level in range(LEVELS):
        inside = within & (level < opened)
        scale, shape = tl.load(scales + level).to(kind), shape_of(numbers, level)
        cell_x, cell_y, cell_z, fraction_x, fraction_y, fraction_z = locate(points, index, inside, scale)
        at = index[:, None] * (LEVELS * CHANNELS) + level * CHANNELS + channel[None, :]
        pull = tl.load(pulls + at, mask=inside[:, None], other=0.0).to(kind) * scale
        weight_x, sign = along_edge(end, fraction_x)
        for edge in tl.static_range(4):
            values = load_ends(table, end, cell_x, cell_y, cell_z, edge, shape, inside, CHANNELS).to(kind) * pull
            y, z = near_far(fraction_y, edge & 1), near_far(fraction_z, edge >> 1)
            along_x += (sign * y * z)[:, None] * values
            along_y += (weight_x * (z if edge & 1 else -z))[:, None] * values
            along_z += (weight_x * (y if edge >> 1 else -y))[:, None] * values
    index, within, _ = points_of_program(count, BLOCK, BLOCK)
    tl.store(out + index * 3, point_sums(along_x, BLOCK), mask=within)
    tl.store(out + index * 3 + 1, point_sums(along_y, BLOCK), mask=within)
    tl.store(out + index * 3 + 2, point_sums(along_z, BLOCK), mask=within)


@triton.jit
def push_of_edge(
    even, steep, tangent_y, tangent_z, fraction_y, fraction_z,
    edge: tl.constexpr, SLOPES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Return what the ends of an edge receive."""
    y, z = near_far(fraction_y, edge & 1), near_far(fraction_z, edge >> 1)
    push = (y * z)[:, None] * even
    if SLOPES:
        push += across_edge(tangent_y, tangent_z, y, z, edge)[:, None] * steep
    if FIXED:
        push = push.to(tl.int64)
    return push


@triton.jit
def pushes_of_point(
    points, grads, pulls, tangents, index, inside, level, channel, end, scale, factor,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, VALUES: tl.constexpr, SLOPES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Return the cell of each lane's point, three numbers, and what the ends of its four edges receive."""
    kind: tl.constexpr = points.dtype.element_ty
    cell_x, cell_y, cell_z, fraction_x, fraction_y, fraction_z = locate(points, index, inside, scale)
    weight_x, sign = along_edge(end, fraction_x)
    at = index[:, None] * (LEVELS * CHANNELS) + level * CHANNELS + channel
    # What the weight y z of an edge multiplies, and what its slope does.
    even = tl.zeros(channel.shape, dtype=kind)
    if VALUES:
        even += weight_x[:, None] * (tl.load(grads + at, mask=inside[:, None], other=0.0).to(kind) * factor)
    steep, tangent_y, tangent_z = even, weight_x, weight_x
    if SLOPES:
        tangent_x, tangent_y, tangent_z = load_vector(tangents, index, inside)
        pull = tl.load(pulls + at, mask=inside[:, None], other=0.0).to(kind) * (factor * scale)
        even += (sign * tangent_x)[:, None] * pull
        steep = weight_x[:, None] * pull
    push_0 = push_of_edge(even, steep, tangent_y, tangent_z, fraction_y, fraction_z, 0, SLOPES, FIXED)
    push_1 = push_of_edge(even, steep, tangent_y, tangent_z, fraction_y, fraction_z, 1, SLOPES, FIXED)
    push_2 = push_of_edge(even, steep, tangent_y, tangent_z, fraction_y, fraction_z, 2, SLOPES, FIXED)
    push_3 = push_of_edge(even, steep, tangent_y, tangent_z, fraction_y, fraction_z, 3, SLOPES, FIXED)
    return cell_x, cell_y, cell_z, push_0, push_1, push_2, push_3


@triton.jit
def add_to_edge(
    sums, end, cell_x, cell_y, cell_z, edge: tl.constexpr, shape, channel, push, mask, CHANNELS: tl.constexpr
):
    """Add to the table's rows at the lanes' ends of an edge."""
    target = end_row(end, cell_x, cell_y, cell_z, edge, shape)[:, None] * CHANNELS + channel
    tl.atomic_add(sums + target, push, mask=mask[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["count", "opened"])
def scatter_kernel(
    points, grads, pulls, tangents, unit, sums, scales, numbers, count, opened,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    VALUES: tl.constexpr, SLOPES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """``sums`` (T, CHANNELS) += what every corner receives: w ``grads`` (``VALUES``) and (w' . v) g (``SLOPES``).

    w is the corner's weight, w' its slope, v a row of ``tangents`` (N, 3), g a row of ``pulls``. ``FIXED``: sums are
    64-bit integers, in units of 1 / ``unit[0]``, and do not depend on the order of addition. A lane adds a row's
    float32 at once, of integers each lane adds one: what lies together goes out together.

    A lane works for ``RUN`` points that follow each other. Along a ray many of them share a cell of a coarse level;
    what they add to it goes out as one sum.
    """
    columns: tl.constexpr = 1 if FIXED else CHANNELS
    lanes: tl.constexpr = 2 * BLOCK * (CHANNELS // columns)
    run, _, group = points_of_program(tl.cdiv(count, RUN), BLOCK, lanes, True)
    kind: tl.constexpr = points.dtype.element_ty
    lane = tl.arange(0, lanes)
    end = lane // (CHANNELS // columns) % 2
    # A remainder would tell the compiler that channels follow each other, and it gave a thread several in turn.
    channel = (lane & (CHANNELS // columns - 1))[:, None] + tl.arange(0, columns)[None, :]
    factor = tl.load(unit).to(kind) if FIXED else 1.0
    index = run * RUN
    for member in range(GROUP):
        level = group * GROUP + member
        inside = (index < count) & (level < opened)
        known = tl.minimum(level, LEVELS - 1)
        scale, shape = tl.load(scales + known).to(kind), shape_of(numbers, known)
        x, y, z, push_0, push_1, push_2, push_3 = pushes_of_point(
            points, grads, pulls, tangents, index, inside, level, channel, end, scale, factor,
            LEVELS, CHANNELS, VALUES, SLOPES, FIXED,
        )  # fmt: skip
        for place in tl.static_range(1, RUN):
            follows = inside & (index + place < count)
            next_x, next_y, next_z, next_0, next_1, next_2, next_3 = pushes_of_point(
                points, grads, pulls, tangents, index + place, follows, level, channel, end, scale, factor,
                LEVELS, CHANNELS, VALUES, SLOPES, FIXED,
            )  # fmt: skip
            moved = follows & ((next_x != x) | (next_y != y) | (next_z != z))
            add_to_edge(sums, end, x, y, z, 0, shape, channel, push_0, moved, CHANNELS)
            add_to_edge(sums, end, x, y, z, 1, shape, channel, push_1, moved, CHANNELS)
            add_to_edge(sums, end, x, y, z, 2, shape, channel, push_2, moved, CHANNELS)
            add_to_edge(sums, end, x, y, z, 3, shape, channel, push_3, moved, CHANNELS)
            x, y, z = tl.where(moved, next_x, x), tl.where(moved, next_y, y), tl.where(moved, next_z, z)
            push_0 = tl.where(moved[:, None], next_0, push_0 + next_0)
            push_1 = tl.where(moved[:, None], next_1, push_1 + next_1)
            push_2 = tl.where(moved[:, None], next_2, push_2 + next_2)
            push_3 = tl.where(moved[:, None], next_3, push_3 + next_3)
        add_to_edge(sums, end, x, y, z, 0, shape, channel, push_0, inside, CHANNELS)
        add_to_edge(sums, end, x, y, z, 1, shape, channel, push_1, inside, CHANNELS)
        add_to_edge(sums, end, x, y, z, 2, shape, channel, push_2, inside, CHANNELS)
        add_to_edge(sums, end, x, y, z, 3, shape, channel, push_3, inside, CHANNELS)


@triton.jit(do_not_specialize=["count"])
def bound_kernel(
    grads, pulls, tangents, largest, count,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``largest`` (programs, 2): the greatest |grad| of a block of points, and the greatest |pull| |tangent|.

    The norms are that of infinity for rows of ``pulls`` and the sum for ``tangents``. Not a number if any of them is
    not finite.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    inside = index < count
    mask = inside[:, None] & (column < WIDTH)[None, :]
    places = index[:, None] * WIDTH + column[None, :]
    if VALUES:
        grad = tl.abs(tl.load(grads + places, mask=mask, other=0.0))
        tl.store(largest + tl.program_id(0) * 2, tl.max(tl.max(grad, axis=1), axis=0) + 0.0 * tl.sum(grad))
    if SLOPES:
        pull = tl.abs(tl.load(pulls + places, mask=mask, other=0.0))
        x, y, z = load_vector(tangents, index, inside)
        # A maximum passes over what is not a number, a sum does not.
        push = (tl.max(pull, axis=1) + 0.0 * tl.sum(pull, axis=1)) * (tl.abs(x) + tl.abs(y) + tl.abs(z))
        tl.store(largest + tl.program_id(0) * 2 + 1, tl.max(push, axis=0) + 0.0 * tl.sum(push))
