"""Triton kernels of a small ReLU network: forward with the derivative along the inputs, and the backward of both.

Between the layers nothing goes through memory: the backward pass computes the hidden layers again. Shapes: ``x``
(N, IN); ``first`` (WIDTH, IN), ``second`` (WIDTH, WIDTH, only if ``DEEP``), ``last`` (16, WIDTH), of which OUT rows
count and the rest are zero: a matrix product has at least sixteen columns.
"""

# Triton gives the types of a kernel's arguments at its launch.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def matrix(weights, rows: tl.constexpr, columns: tl.constexpr):
    """Return a weight matrix as it lies in memory."""
    return tl.load(weights + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :])


@triton.jit
def block_of(rows, block, count, WIDTH: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to a block of rows of REAL numbers, in WIDTH columns, and which of them exist."""
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    exists = (index < count)[:, None] & (column < REAL)[None, :]
    return rows + index[:, None] * REAL + column[None, :], exists


@triton.jit
def relu(x):
    """Return max(x, 0), and for what is no number the same."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit(do_not_specialize=["count"])
def forward_kernel(
    x, first, second, last, y, slope, count,
    IN: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, DEEP: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y`` (N, OUT): the outputs; with ``SLOPE`` (and OUT = 1) ``slope`` (N, IN): their derivative along ``x``."""
    block = tl.program_id(0)
    at, exists = block_of(x, block, count, IN, IN, BLOCK)
    rows = tl.load(at, mask=exists, other=0.0)
    first_weights, last_weights = matrix(first, WIDTH, IN), matrix(last, 16, WIDTH)
    hidden = relu(tl.dot(rows, tl.trans(first_weights), input_precision=PRECISION))
    if DEEP:
        hidden = relu(tl.dot(hidden, tl.trans(matrix(second, WIDTH, WIDTH)), input_precision=PRECISION))
    outputs = tl.dot(hidden, tl.trans(last_weights), input_precision=PRECISION)
    at, exists = block_of(y, block, count, 16, OUT, BLOCK)
    tl.store(at, outputs, mask=exists)
    if SLOPE:
        lit = tl.load(last + tl.arange(0, WIDTH))[None, :] * (hidden > 0.0).to(hidden.dtype)
        at, exists = block_of(slope, block, count, IN, IN, BLOCK)
        tl.store(at, tl.dot(lit, first_weights, input_precision=PRECISION), mask=exists)


@triton.jit(do_not_specialize=["count"])
def backward_kernel(
    x, first, second, last, grad_y, grad_slope, grad_x, grad_first, grad_second, grad_last, count,
    IN: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, DEEP: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``grad_x`` (N, IN), and the weights' gradients of each program: one more axis in front, to be summed.

    With m = [hidden > 0] and s = m last, the slope is g = first^T s; so ``grad_slope`` adds s (x) grad_slope to the
    gradient of the first layer and m (first grad_slope) to that of the last, and nothing to ``grad_x``.
    """
    first_weights, last_weights = matrix(first, WIDTH, IN), matrix(last, 16, WIDTH)
    second_weights = matrix(second, WIDTH, WIDTH) if DEEP else 0.0
    kind: tl.constexpr = x.dtype.element_ty
    to_first, to_last = tl.zeros([WIDTH, IN], dtype=kind), tl.zeros([16, WIDTH], dtype=kind)
    to_second = tl.zeros([WIDTH, WIDTH], dtype=kind) if DEEP else 0.0
    to_lit = tl.zeros([WIDTH], dtype=kind)
    program = tl.program_id(0)
    block = program
    while block < tl.cdiv(count, BLOCK):
        at, exists = block_of(x, block, count, IN, IN, BLOCK)
        rows = tl.load(at, mask=exists, other=0.0)
        hidden = relu(tl.dot(rows, tl.trans(first_weights), input_precision=PRECISION))
        before = hidden
        if DEEP:
            hidden = relu(tl.dot(before, tl.trans(second_weights), input_precision=PRECISION))
        at, exists = block_of(grad_y, block, count, 16, OUT, BLOCK)
        grad = tl.load(at, mask=exists, other=0.0)
        to_last += tl.dot(tl.trans(grad), hidden, input_precision=PRECISION)
        back = tl.dot(grad, last_weights, input_precision=PRECISION)
        back = tl.where(hidden > 0.0, back, 0.0)
        if DEEP:
            to_second += tl.dot(tl.trans(back), before, input_precision=PRECISION)
            back = tl.dot(back, second_weights, input_precision=PRECISION)
            back = tl.where(before > 0.0, back, 0.0)
        to_first += tl.dot(tl.trans(back), rows, input_precision=PRECISION)
        if SLOPE:
            at, exists = block_of(grad_slope, block, count, IN, IN, BLOCK)
            pull = tl.load(at, mask=exists, other=0.0)
            lit = tl.load(last + tl.arange(0, WIDTH))[None, :] * (hidden > 0.0).to(kind)
            to_first += tl.dot(tl.trans(lit), pull, input_precision=PRECISION)
            across = tl.dot(pull, tl.trans(first_weights), input_precision=PRECISION)
            to_lit += tl.sum(tl.where(hidden > 0.0, across, 0.0), axis=0)
        at, exists = block_of(grad_x, block, count, IN, IN, BLOCK)
        tl.store(at, tl.dot(back, first_weights, input_precision=PRECISION), mask=exists)
        block += tl.num_programs(0)
    row, column, neuron = tl.arange(0, 16), tl.arange(0, IN), tl.arange(0, WIDTH)
    tl.store(grad_first + (program * WIDTH + neuron[:, None]) * IN + column[None, :], to_first)
    to_last += tl.where(row[:, None] == 0, to_lit[None, :], 0.0)
    tl.store(grad_last + (program * 16 + row[:, None]) * WIDTH + neuron[None, :], to_last)
    if DEEP:
        tl.store(grad_second + (program * WIDTH + neuron[:, None]) * WIDTH + neuron[None, :], to_second)
