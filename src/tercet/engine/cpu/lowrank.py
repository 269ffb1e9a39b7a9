"""LoRA beside a product: B (A x) is added to the rows of the sequences that use an adapter (arXiv:2106.09685).

Consecutive rows with the same adapter are a run. Both products are the float32 one of `tiles`, so the bits
of a row do not depend on what is computed beside it.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.matrices import BLOCK, add, call11, integers
from tercet.engine.cpu.threads import barrier, share

ROWS = 8  # rows of A x that a thread computes at a time: the largest tile of the product


@njit
def change(run: Any, layer: int, matrix: int) -> Any:
    """Return the row of CHANGE_WIDTH integers that describes a run's adapter in one matrix of a layer."""
    place = (layer * at.CHANGES + matrix) * at.CHANGE_WIDTH
    return integers(run[at.RUN_ADAPTER] + 8 * place, at.CHANGE_WIDTH)


@njit
def lower(table: Any, layer: int, matrix: int, x: int, x_stride: int, thread: int, passed: int) -> int:
    """Compute A x for every run, into LOW_ROWS; return the number of barriers passed."""
    stride = 4 * table[at.LOW_WIDTH]
    for number in range(table[at.RUNS]):
        run = integers(table[at.RUN_TABLE] + 8 * at.RUN_WIDTH * number, at.RUN_WIDTH)
        c = change(run, layer, matrix)
        groups = (run[at.RUN_ROWS] + ROWS - 1) // ROWS
        begin, end = share(c[at.LOW_BLOCKS] * groups, thread, table[at.THREADS])
        for unit in range(begin, end):
            block, first = unit // groups, unit % groups * ROWS
            rows = min(ROWS, run[at.RUN_ROWS] - first)
            row = run[at.RUN_BEGIN] + first
            columns = c[at.LOW_COLUMNS]
            weights = c[at.LOW_WEIGHTS] + 4 * BLOCK * columns * block
            out = table[at.LOW_ROWS] + row * stride + 4 * BLOCK * block
            inputs = x + row * x_stride
            call11(table[at.LOW_PRODUCT], weights, 0, columns, inputs, x_stride, 0, 0, 0, rows, out, stride)
    return int(barrier(table, passed, thread))


@njit
def adapt(table: Any, layer: int, matrix: int, block: int, out: int, out_stride: int, scratch: int) -> None:
    """Add B (A x) to the 16 outputs of a block; ``scratch`` is the address of [rows, 16] floats."""
    stride = 4 * table[at.LOW_WIDTH]
    for number in range(table[at.RUNS]):
        run = integers(table[at.RUN_TABLE] + 8 * at.RUN_WIDTH * number, at.RUN_WIDTH)
        c = change(run, layer, matrix)
        if c[at.LOW_BLOCKS] == 0:
            continue
        high = integers(c[at.HIGH_TABLE] + 8 * at.HIGH_WIDTH * block, at.HIGH_WIDTH)
        if high[at.HIGH_WEIGHTS] == 0:
            continue
        first, rows = run[at.RUN_BEGIN], run[at.RUN_ROWS]
        x = table[at.LOW_ROWS] + first * stride + 4 * high[at.HIGH_BEGIN]
        call11(
            table[at.LOW_PRODUCT], high[at.HIGH_WEIGHTS], 0, high[at.HIGH_COLUMNS], x, stride, 0, 0, 0, rows,
            scratch, 4 * BLOCK,
        )  # fmt: skip
        for row in range(rows):
            add(out + (first + row) * out_stride, scratch + 4 * BLOCK * row, BLOCK)
