"""LoRA beside a product: B (A x) is added to the rows of the sequences that asked for an adapter.

Rows of one adapter that follow each other are a run. Both products are the float32 one of `tiles`, so
a row gets the same bits whatever is computed beside it.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.matrices import BLOCK, add, call11, integers
from tercet.engine.cpu.threads import barrier, share

ROWS = 8  # of A x that a thread computes at a time: what the product's largest tile takes


@njit
def change(run: Any, layer: int, matrix: int) -> Any:
    """What the adapter of a run changes in one matrix of a layer."""
    place = (layer * at.CHANGES + matrix) * at.CHANGE_WIDTH
    return integers(run[at.RUN_ADAPTER] + 8 * place, at.CHANGE_WIDTH)


@njit
def lower(t: Any, layer: int, matrix: int, x: int, x_stride: int, thread: int, passed: int) -> int:
    """A x for every run, into LOW_ROWS; the number of barriers passed so far."""
    stride = 4 * t[at.LOW_WIDTH]
    for number in range(t[at.RUNS]):
        run = integers(t[at.RUN_TABLE] + 8 * at.RUN_WIDTH * number, at.RUN_WIDTH)
        c = change(run, layer, matrix)
        groups = (run[at.RUN_ROWS] + ROWS - 1) // ROWS
        begin, end = share(c[at.LOW_BLOCKS] * groups, thread, t[at.THREADS])
        for unit in range(begin, end):
            block, first = unit // groups, unit % groups * ROWS
            rows = min(ROWS, run[at.RUN_ROWS] - first)
            row = run[at.RUN_BEGIN] + first
            weights = c[at.LOW_WEIGHTS] + 4 * BLOCK * c[at.LOW_COLUMNS] * block
            out = t[at.LOW_ROWS] + row * stride + 4 * BLOCK * block
            call11(
                t[at.LOW_PRODUCT], weights, 0, c[at.LOW_COLUMNS], x + row * x_stride, x_stride, 0, 0, 0, rows, out, stride
            )  # fmt: skip
    return int(barrier(t, passed, thread))


@njit
def adapt(t: Any, layer: int, matrix: int, block: int, out: int, out_stride: int, scratch: int) -> None:
    """Add B (A x) to a block's 16 outputs; ``scratch``: [rows, 16]."""
    stride = 4 * t[at.LOW_WIDTH]
    for number in range(t[at.RUNS]):
        run = integers(t[at.RUN_TABLE] + 8 * at.RUN_WIDTH * number, at.RUN_WIDTH)
        c = change(run, layer, matrix)
        if c[at.LOW_BLOCKS] == 0:
            continue
        high = integers(c[at.HIGH_TABLE] + 8 * at.HIGH_WIDTH * block, at.HIGH_WIDTH)
        if high[at.HIGH_WEIGHTS] == 0:
            continue
        first, rows = run[at.RUN_BEGIN], run[at.RUN_ROWS]
        x = t[at.LOW_ROWS] + first * stride + 4 * high[at.HIGH_BEGIN]
        call11(
            t[at.LOW_PRODUCT], high[at.HIGH_WEIGHTS], 0, high[at.HIGH_COLUMNS], x, stride, 0, 0, 0, rows,
            scratch, 4 * BLOCK,
        )  # fmt: skip
        for row in range(rows):
            add(out + (first + row) * out_stride, scratch + 4 * BLOCK * row, BLOCK)
