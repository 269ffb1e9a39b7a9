"""Views of memory as numbers, and packed matrices of any form: multiplying by a block and reading a row."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    table: Any, matrix: int, block: int, x: int, x_stride: int, quantized: int, scales: int, zeros: int, tokens: int,
    out: int, stride: int,
) -> None:  # fmt: skip
    """Multiply ``tokens`` rows of ``x`` by the 16 rows of a block, into out [tokens, 16], and add the bias.

    ``matrix`` is the address of a descriptor; the other arguments are those of the products in `tiles`.
    """
    m = integers(matrix, at.MATRIX_WIDTH)
    w = m[at.WEIGHTS] + block * m[at.BLOCK_BYTES]
    s = m[at.WEIGHT_SCALES] + block * m[at.SCALE_BYTES]
    call11(m[at.PRODUCT], w, s, m[at.COLUMNS], x, x_stride, quantized, scales, zeros, tokens, out, stride)
    if m[at.BIAS]:
        bias = floats(m[at.BIAS] + 4 * BLOCK * block, BLOCK)
        for row in range(tokens):
            y = floats(out + row * stride, BLOCK)
            for i in range(BLOCK):
                y[i] += bias[i]


@njit
def prepare_rows(matrix: int, x: int, stride: int, buffer: Any, low: int, high: int) -> None:
    """Quantise rows low..high-1 of ``x`` into ``buffer``, if the matrix's weights are quantised.

    ``buffer`` holds the addresses of the quantised rows, their scales and their zeros.
    """
    m = integers(matrix, at.MATRIX_WIDTH)
    if m[at.QUANTIZE] == 0:
        return
    k = m[at.COLUMNS]
    groups = k // m[at.GROUP]
    for i in range(low, high):
        row = 4 * i * groups
        call5(m[at.QUANTIZE], x + i * stride, groups, buffer[0] + i * k, buffer[1] + row, buffer[2] + row)


@njit
def read_row(matrix: int, row: int, out: int) -> None:
    """Write one row of a matrix (an embedding) as float32 to ``out``."""
    m = integers(matrix, at.MATRIX_WIDTH)
    kind, k = m[at.KIND], m[at.COLUMNS]
    block, lane = row // BLOCK, row % BLOCK
    y = floats(out, k)
    if kind == at.FLOAT32:
        weights = floats(m[at.WEIGHTS] + block * BLOCK * k * 4, BLOCK * k)
        for i in range(k):
            y[i] = weights[i * BLOCK + lane]
        return
    # Bytes are read through 64-bit words, so that one kind of view is enough.
    if kind == at.BFLOAT16:
        for i in range(k):
            y[i] = bfloat(m[at.WEIGHTS], block * BLOCK * k + i * BLOCK + lane)
    elif kind == at.INT8:
        groups = k // at.GROUP8
        for i in range(k):
            value = byte(m[at.WEIGHTS], block * BLOCK * k + (i // 4) * 64 + lane * 4 + i % 4) - 128
            scale = bfloat(m[at.WEIGHT_SCALES], (block * groups + i // at.GROUP8) * BLOCK + lane)
            y[i] = np.float32(value) * scale
    else:
        groups = k // at.GROUP4
        for i in range(k):
            packed = byte(m[at.WEIGHTS], block * BLOCK // 2 * k + (i // 8) * 64 + lane * 4 + i % 4)
            value = packed >> 4 if i % 8 >= 4 else packed & 15
            group = (block * groups + i // at.GROUP4) * 2 * BLOCK + lane
            scale, minimum = bfloat(m[at.WEIGHT_SCALES], group), bfloat(m[at.WEIGHT_SCALES], group + BLOCK)
            y[i] = np.float32(value) * scale + minimum


@njit
def byte(address: int, index: int) -> int:
    """Return byte ``index`` after an address, unsigned."""
    word = integers(address, 1 << 40)[index >> 3]
    return int((word >> (8 * (index & 7))) & 255)


@njit
def bfloat(address: int, index: int) -> Any:
    """Return bfloat16 number ``index`` after an address, as float32."""
    word = integers(address, 1 << 40)[index >> 2]
    return np.int32(((word >> (16 * (index & 3))) & 0xFFFF) << 16).view(np.float32)


@njit
def add(target: int, source: int, size: int) -> None:
    """Add ``size`` float32 at ``source`` to those at ``target``."""
    x, y = floats(target, size), floats(source, size)
    for i in range(size):
        x[i] += y[i]
