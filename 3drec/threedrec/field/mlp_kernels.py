"""Triton kernels of a small ReLU network: forward and backward, alone and with the derivative along the inputs.

Between the layers nothing goes through memory: the backward pass computes the hidden layers again. Shapes: ``x``
(N, IN); ``first`` (WIDTH, IN), ``second`` (WIDTH, WIDTH, read only if ``DEEP``), ``last`` (OUT, WIDTH).

``PRECISION`` is that of matrix products: "ieee", "tf32x3" or "tf32" as in ``tl.dot``, or "float16", which rounds both
factors to as many digits as "tf32" does. Sums are of the type of ``x``. Gradients are scaled to their block's largest
before they become float16, so that small ones do not vanish.
"""

# Triton gives the types of a kernel's arguments at its launch.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return the matrix product."""
    if PRECISION == "float16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:  # What follows a return is compiled too.
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matrix(weights, rows: tl.constexpr, columns: tl.constexpr, REAL: tl.constexpr):
    """Return a weight matrix of REAL rows, followed by rows of zeros: a product has at least sixteen of them."""
    row, column = tl.arange(0, rows)[:, None], tl.arange(0, columns)[None, :]
    return tl.load(weights + row * columns + column, mask=row < REAL, other=0.0)


@triton.jit
def block_of(rows, block, count, WIDTH: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to a block of rows of REAL numbers, in WIDTH columns, and which of them exist."""
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    exists = (index < count)[:, None] & (column < REAL)[None, :]
    return rows + index[:, None] * REAL + column[None, :], exists


@triton.jit
def load_block(rows, block, count, WIDTH: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of rows, (BLOCK, WIDTH), with zeros for what does not exist."""
    at, exists = block_of(rows, block, count, WIDTH, REAL, BLOCK)
    return tl.load(at, mask=exists, other=0.0)


@triton.jit
def store_block(rows, values, block, count, WIDTH: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Write what exists of a block of rows."""
    at, exists = block_of(rows, block, count, WIDTH, REAL, BLOCK)
    tl.store(at, values, mask=exists)


@triton.jit
def relu(x):
    """Return max(x, 0), and for what is no number the same."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def layers(rows, first_weights, second_weights, DEEP: tl.constexpr, PRECISION: tl.constexpr):
    """Return what leaves the first and the last ReLU; without a second hidden layer they are the same."""
    before = relu(product(rows, tl.trans(first_weights), PRECISION))
    hidden = before
    if DEEP:
        hidden = relu(product(before, tl.trans(second_weights), PRECISION))
    return before, hidden


@triton.jit
def size_of(gradient, PRECISION: tl.constexpr):
    """Return what to divide a block of gradients by before it becomes float16."""
    if PRECISION == "float16":
        largest = tl.max(tl.max(tl.abs(gradient), axis=1), axis=0)
        return tl.where(largest > 0.0, largest, 1.0)
    else:  # What follows a return is compiled too.
        return 1.0


@triton.jit
def store_sums(sums, values, rows: tl.constexpr, columns: tl.constexpr, REAL: tl.constexpr):
    """Write the first REAL rows of a matrix."""
    row, column = tl.arange(0, rows)[:, None], tl.arange(0, columns)[None, :]
    tl.store(sums + row * columns + column, values, mask=row < REAL)


@triton.jit(do_not_specialize=["count"])
def value_kernel(
    x, first, second, last, y, count,
    IN: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, DEEP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y`` (N, OUT): the outputs."""
    first_weights, last_weights = matrix(first, WIDTH, IN, WIDTH), matrix(last, 16, WIDTH, OUT)
    second_weights = matrix(second, WIDTH, WIDTH, WIDTH) if DEEP else 0.0
    block = tl.program_id(0)
    while block < tl.cdiv(count, BLOCK):
        rows = load_block(x, block, count, IN, IN, BLOCK)
        hidden = layers(rows, first_weights, second_weights, DEEP, PRECISION)[1]
        store_block(y, product(hidden, tl.trans(last_weights), PRECISION), block, count, 16, OUT, BLOCK)
        block += tl.num_programs(0)


@triton.jit(do_not_specialize=["count"])
def value_backward_kernel(
    x, first, second, last, grad_y, grad_x, sums, count,
    IN: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, DEEP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``grad_x`` (N, IN), and the gradients of all weights, one after another, of each program: a row of ``sums``."""
    first_weights, last_weights = matrix(first, WIDTH, IN, WIDTH), matrix(last, 16, WIDTH, OUT)
    second_weights = matrix(second, WIDTH, WIDTH, WIDTH) if DEEP else 0.0
    kind: tl.constexpr = x.dtype.element_ty
    to_first, to_last = tl.zeros([WIDTH, IN], dtype=kind), tl.zeros([16, WIDTH], dtype=kind)
    to_second = tl.zeros([WIDTH, WIDTH], dtype=kind) if DEEP else 0.0
    program = tl.program_id(0)
    block = program
    while block < tl.cdiv(count, BLOCK):
        rows = load_block(x, block, count, IN, IN, BLOCK)
        before, hidden = layers(rows, first_weights, second_weights, DEEP, PRECISION)
        grad = load_block(grad_y, block, count, 16, OUT, BLOCK)
        size = size_of(grad, PRECISION)
        grad = grad / size
        to_last += size * product(tl.trans(grad), hidden, PRECISION)
        back = tl.where(hidden > 0.0, product(grad, last_weights, PRECISION), 0.0)
        if DEEP:
            to_second += size * product(tl.trans(back), before, PRECISION)
            back = tl.where(before > 0.0, product(back, second_weights, PRECISION), 0.0)
        to_first += size * product(tl.trans(back), rows, PRECISION)
        store_block(grad_x, size * product(back, first_weights, PRECISION), block, count, IN, IN, BLOCK)
        block += tl.num_programs(0)
    sums += program * (WIDTH * IN + (WIDTH * WIDTH if DEEP else 0) + OUT * WIDTH)
    store_sums(sums, to_first, WIDTH, IN, WIDTH)
    if DEEP:
        store_sums(sums + WIDTH * IN, to_second, WIDTH, WIDTH, WIDTH)
    store_sums(sums + WIDTH * IN + (WIDTH * WIDTH if DEEP else 0), to_last, 16, WIDTH, OUT)


@triton.jit
def slopes(hidden, before, second_weights, last_row, DEEP: tl.constexpr, PRECISION: tl.constexpr):
    """Return the output's derivative along what enters the last and the first ReLU."""
    upper = tl.where(hidden > 0.0, last_row, 0.0)
    lower = upper
    if DEEP:
        lower = tl.where(before > 0.0, product(upper, second_weights, PRECISION), 0.0)
    return upper, lower


@triton.jit(do_not_specialize=["count"])
def slope_kernel(
    x, first, second, last, y, slope, count,
    IN: tl.constexpr, WIDTH: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y`` (N, 1): the output of a network with one; ``slope`` (N, IN): its derivative along ``x``."""
    first_weights, last_row = matrix(first, WIDTH, IN, WIDTH), tl.load(last + tl.arange(0, WIDTH))[None, :]
    second_weights = matrix(second, WIDTH, WIDTH, WIDTH) if DEEP else 0.0
    block = tl.program_id(0)
    while block < tl.cdiv(count, BLOCK):
        rows = load_block(x, block, count, IN, IN, BLOCK)
        before, hidden = layers(rows, first_weights, second_weights, DEEP, PRECISION)
        lower = slopes(hidden, before, second_weights, last_row, DEEP, PRECISION)[1]
        store_block(slope, product(lower, first_weights, PRECISION), block, count, IN, IN, BLOCK)
        index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + index, tl.sum(hidden * last_row, axis=1), mask=index < count)
        block += tl.num_programs(0)


@triton.jit(do_not_specialize=["count"])
def slope_backward_kernel(
    x, first, second, last, slope, grad_y, grad_slope, grad_x, sums, count,
    IN: tl.constexpr, WIDTH: tl.constexpr, DEEP: tl.constexpr, VALUES: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``grad_x`` (N, IN, if ``VALUES``), and a row of ``sums``: the weights' gradients of each program.

    Let A, B, c be the weights, M and N the diagonal masks of the first and the second ReLU (0 or 1, locally constant:
    they have no derivative). A point's output is y = c N B M A x, its slope is (c N B M A)^T; with a and v the
    loss's derivatives along both, the loss changes as

        a dy + v . dslope = d(c N B M A) z,    z = a x + v,

    where z is held fixed. So with the slopes s2 = N c and s1 = M B^T s2 of the two layers, and z carried forward as
    z1 = M A z and z2 = N B z1, the gradients are A: s1 z^T, B: s2 z1^T, c: z2^T, and x: a slope, without a second
    derivative anywhere. ``VALUES`` and ``SLOPES`` say whether a and v exist; what is left out counts as zero.
    """
    first_weights, last_row = matrix(first, WIDTH, IN, WIDTH), tl.load(last + tl.arange(0, WIDTH))[None, :]
    second_weights = matrix(second, WIDTH, WIDTH, WIDTH) if DEEP else 0.0
    kind: tl.constexpr = x.dtype.element_ty
    to_first, to_last = tl.zeros([WIDTH, IN], dtype=kind), tl.zeros([WIDTH], dtype=kind)
    to_second = tl.zeros([WIDTH, WIDTH], dtype=kind) if DEEP else 0.0
    program = tl.program_id(0)
    block = program
    while block < tl.cdiv(count, BLOCK):
        index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        rows = load_block(x, block, count, IN, IN, BLOCK)
        before, hidden = layers(rows, first_weights, second_weights, DEEP, PRECISION)
        upper, lower = slopes(hidden, before, second_weights, last_row, DEEP, PRECISION)
        move = tl.zeros([BLOCK, IN], dtype=kind)
        if SLOPES:
            move += load_block(grad_slope, block, count, IN, IN, BLOCK)
        if VALUES:
            grad = tl.load(grad_y + index, mask=index < count, other=0.0)[:, None]
            move += grad * rows
            across = grad * load_block(slope, block, count, IN, IN, BLOCK)
            store_block(grad_x, across, block, count, IN, IN, BLOCK)
        size = size_of(move, PRECISION)
        move = move / size
        to_first += size * product(tl.trans(lower), move, PRECISION)
        carried = tl.where(before > 0.0, product(move, tl.trans(first_weights), PRECISION), 0.0)
        if DEEP:
            to_second += size * product(tl.trans(upper), carried, PRECISION)
            carried = tl.where(hidden > 0.0, product(carried, tl.trans(second_weights), PRECISION), 0.0)
        to_last += size * tl.sum(carried, axis=0)
        block += tl.num_programs(0)
    sums += program * (WIDTH * IN + (WIDTH * WIDTH if DEEP else 0) + WIDTH)
    store_sums(sums, to_first, WIDTH, IN, WIDTH)
    if DEEP:
        store_sums(sums + WIDTH * IN, to_second, WIDTH, WIDTH, WIDTH)
    tl.store(sums + WIDTH * IN + (WIDTH * WIDTH if DEEP else 0) + tl.arange(0, WIDTH), to_last)
