"""The products of a step: the threads draw a matrix's blocks, and each finishes the blocks that it computed."""

from __future__ import annotations

from typing import Any

from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.lowrank import adapt, lower
from tercet.engine.cpu.matrices import BLOCK, add, floats, integers, prepare_rows, product
from tercet.engine.cpu.rows import soft_cap
from tercet.engine.cpu.threads import barrier, draw
from tercet.simd import caller

BLOCK_ROW = 4 * BLOCK  # bytes of one row of a block's outputs

call3 = caller(3)


@njit
def prepare(part: Any, matrix: int, x: int, x_stride: int, copies: int, passed: int) -> int:
    """Quantise the rows ``x`` where a matrix needs it, and return the number of barriers passed.

    ``copies`` rows of ``x`` belong to each row of the step.
    """
    buffer = (part.quantized, part.scales, part.sums)
    prepare_rows(matrix, x, x_stride, buffer, part.first * copies, part.last * copies)
    return passed if part.small else int(barrier(part.table, passed, part.thread))


@njit
def added_at_once(table: Any) -> bool:
    """Whether attention's output goes to the residual stream at once: no norm or parallel layer needs it alone."""
    return bool(table[at.POST_NORM] == 0 and table[at.PARALLEL] == 0)


@njit
def output(part: Any, kind: int, blocks: int) -> tuple[int, int, int]:
    """Return where a product of ``blocks`` blocks goes: address, bytes from row to row and from block to block.

    It goes to the rows that the next phase reads, or, from block to block 0, to the thread's scratch, from
    where `finish` takes it.
    """
    table = part.table
    if kind == at.QKV_PRODUCT:
        return table[at.QKV], 4 * (table[at.HEADS] + 2 * table[at.KV_HEADS]) * table[at.DIM], BLOCK_ROW
    if kind == at.HEAD_PRODUCT:
        return table[at.LOGITS], BLOCK_ROW * blocks, BLOCK_ROW
    if kind == at.O_PRODUCT and not added_at_once(table):
        return table[at.OUTPUT], 4 * table[at.HIDDEN], BLOCK_ROW
    return part.private, BLOCK_ROW, 0


@njit
def multiply(part: Any, index: int, kind: int, matrix: int, x: int, x_stride: int, passed: int) -> int:
    """Multiply a step's rows ``x`` by a matrix, the adapters' updates included.

    Args:
        part: This thread's part of the work.
        index: The layer's number; the number of layers for the head.
        kind: Which of the products of `table` this is.
        matrix: Address of the matrix's descriptor.
        x: Address of the rows.
        x_stride: Bytes from one row to the next.
        passed: Barriers passed so far.

    Returns:
        The number of barriers passed.
    """
    table, rows = part.table, part.rows
    adapted = table[at.RUNS] != 0 and kind != at.HEAD_PRODUCT
    passed = prepare(part, matrix, x, x_stride, 1, passed)
    if adapted:
        passed = lower(table, index, kind, x, x_stride, part.thread, passed)
    # A block of the gate and the block of values that it multiplies follow each other.
    halves = 2 if kind == at.GATE_UP_PRODUCT and table[at.GATED] else 1
    blocks = integers(matrix, at.MATRIX_WIDTH)[at.BLOCKS] // halves
    out, out_stride, step = output(part, kind, blocks)
    phase = at.PHASES * index + kind
    block = draw(table, phase, blocks, part.thread, -1)
    while block < blocks:
        for half in range(halves):
            number = halves * block + half
            place = out + step * block + half * rows * BLOCK_ROW
            product(
                table, matrix, number, x, x_stride, part.quantized, part.scales, part.sums, rows, place, out_stride
            )  # fmt: skip
            if adapted:
                scratch = part.private + 2 * rows * BLOCK_ROW  # behind the outputs
                adapt(table, index, kind, number, place, out_stride, scratch)
        finish(part, kind, block, blocks)
        block = draw(table, phase, blocks, part.thread, block)
    return int(barrier(table, passed, part.thread))


@njit
def finish(part: Any, kind: int, block: int, blocks: int) -> None:
    """Apply what follows a product to the block just computed, while the cache holds it."""
    table, rows, private = part.table, part.rows, part.private
    row_bytes, place = 4 * table[at.HIDDEN], BLOCK_ROW * block
    if kind == at.O_PRODUCT:
        if added_at_once(table):
            for row in range(rows):
                add(table[at.X] + row * row_bytes + place, private + row * BLOCK_ROW, BLOCK)
    elif kind == at.GATE_UP_PRODUCT:
        values = rows * BLOCK_ROW if table[at.GATED] else 0
        for row in range(rows):
            gate = private + row * BLOCK_ROW
            inner = table[at.INNER_ROWS] + 4 * row * table[at.INNER] + place
            call3(table[at.GATE], gate, gate + values, inner)
    elif kind == at.DOWN_PRODUCT:
        for row in range(rows):
            update, out = private + row * BLOCK_ROW, table[at.OUTPUT] + row * row_bytes + place
            if table[at.POST_NORM]:
                source, target = floats(update, BLOCK), floats(out, BLOCK)
                for i in range(BLOCK):
                    target[i] = source[i]
            else:
                if table[at.PARALLEL]:
                    add(update, out, BLOCK)
                add(table[at.X] + row * row_bytes + place, update, BLOCK)
    elif kind == at.HEAD_PRODUCT and table[at.LOGIT_CAP]:
        for row in range(rows):
            soft_cap(table[at.LOGITS] + place + BLOCK_ROW * blocks * row, 1, table[at.LOGIT_CAP])
