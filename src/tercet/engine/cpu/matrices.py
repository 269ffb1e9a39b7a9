"""Views of memory as numbers, and packed matrices of any form: multiplying by a block and reading a row."""

from __future__ import annotations

from typing import Any

from numba import carray, njit

from tercet.engine.cpu import table as at
from tercet.simd import caller, float_pointer, integer_pointer

BLOCK = 16  # rows of weights in a block

call5, call11 = caller(5), caller(11)


@njit
def integers(address: int, size: int) -> Any:
    """View ``size`` int64 at an address as an array."""
    return carray(integer_pointer(address), (size,))


@njit
def floats(address: int, size: int) -> Any:
    """View ``size`` float32 at an address as an array."""
    return carray(float_pointer(address), (size,))


@njit
def product(
    table: Any, matrix: int, block: int, x: int, x_stride: int, quantized: int, scales: int, sums: int, tokens: int,
    out: int, stride: int,
) -> None:  # fmt: skip
    """Multiply ``tokens`` rows of ``x`` by the 16 rows of a block, into out [tokens, 16], and add the bias.

    ``matrix`` is the address of a descriptor; the other arguments are those of the products in `tiles`.
    """
    m = integers(matrix, at.MATRIX_WIDTH)
    if m[at.ALTERNATE]:
        if block & 1:
            m = integers(m[at.NEXT], at.MATRIX_WIDTH)
        block >>= 1
    else:
        while block >= m[at.OWN_BLOCKS]:
            block -= m[at.OWN_BLOCKS]
            m = integers(m[at.NEXT], at.MATRIX_WIDTH)
    w = m[at.WEIGHTS] + block * m[at.BLOCK_BYTES]
    s = m[at.WEIGHT_SCALES] + block * m[at.SCALE_BYTES]
    call11(m[at.PRODUCT], w, s, m[at.COLUMNS], x, x_stride, quantized, scales, sums, tokens, out, stride)
    if m[at.BIAS]:
        bias = floats(m[at.BIAS] + 4 * BLOCK * block, BLOCK)
        for row in range(tokens):
            y = floats(out + row * stride, BLOCK)
            for i in range(BLOCK):
                y[i] += bias[i]


@njit
def prepare_rows(matrix: int, x: int, stride: int, buffer: Any, low: int, high: int) -> None:
    """Quantise rows low..high-1 of ``x`` into ``buffer``, if the matrix's weights are quantised.

    ``buffer`` holds the addresses of the quantised rows, their scales and their sums.
    """
    m = integers(matrix, at.MATRIX_WIDTH)
    if m[at.QUANTIZE] == 0:
        return
    k = m[at.COLUMNS]
    groups = k // at.GROUP
    for i in range(low, high):
        row = 4 * i * groups
        call5(
            m[at.QUANTIZE], x + i * stride, groups, buffer[0] + i * m[at.QUANTIZED_BYTES], buffer[1] + row,
            buffer[2] + 2 * row,
        )  # fmt: skip


@njit
def read_row(matrix: int, row: int, out: int) -> None:
    """Write one row of a matrix (an embedding) as float32 to ``out``."""
    m = integers(matrix, at.MATRIX_WIDTH)
    block = row // BLOCK
    w = m[at.WEIGHTS] + block * m[at.BLOCK_BYTES]
    s = m[at.WEIGHT_SCALES] + block * m[at.SCALE_BYTES]
    call5(m[at.ROW], w, s, m[at.COLUMNS], row % BLOCK, out)


@njit
def add(target: int, source: int, size: int) -> None:
    """Add ``size`` float32 at ``source`` to those at ``target``."""
    x, y = floats(target, size), floats(source, size)
    for i in range(size):
        x[i] += y[i]
