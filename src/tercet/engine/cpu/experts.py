"""A mixture of experts in a step: each row is routed to a few experts, whose outputs are summed by weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.matrices import BLOCK, floats, integers, product
from tercet.engine.cpu.products import BLOCK_ROW, call3, finish, prepare
from tercet.engine.cpu.threads import barrier, draw


@njit
def route(table: Any, router: int, x: int, row: int, scratch: int) -> None:
    """Choose a row's experts and their weights: a softmax over all experts, then the largest."""
    experts, count = table[at.EXPERTS], table[at.EXPERTS_PER_TOKEN]
    blocks = integers(router, at.MATRIX_WIDTH)[at.BLOCKS]
    for block in range(blocks):
        product(table, router, block, x, 0, 0, 0, 0, 1, scratch + BLOCK_ROW * block, 0)
    scores = floats(scratch, experts)
    highest = scores[0]
    for expert in range(experts):
        highest = max(highest, scores[expert])
    total = np.float32(0.0)
    for expert in range(experts):
        scores[expert] = np.exp(scores[expert] - highest)
        total += scores[expert]
    chosen = integers(table[at.ROUTES] + 8 * row * count, count)
    weights = floats(table[at.ROUTE_WEIGHTS] + 4 * row * count, count)
    best_scores = floats(scratch + BLOCK_ROW * blocks, count)
    chosen_total = np.float32(0.0)
    for slot in range(count):
        best = 0
        for expert in range(experts):
            if scores[expert] > scores[best]:
                best = expert
        chosen[slot], best_scores[slot] = best, scores[best] / total
        chosen_total += best_scores[slot]
        scores[best] = np.float32(-1.0)
    for slot in range(count):
        # Written once: where every thread routes all rows, another may be writing the same here.
        weights[slot] = best_scores[slot] / chosen_total if table[at.NORMALIZE] else best_scores[slot]


@njit
def expert_product(
    part: Any, matrices: int, expert: int, block: int, x: int, x_stride: int, row: int, out: int
) -> None:
    """Multiply row ``row`` of ``x`` by a block of one expert's matrix, into the 16 floats at ``out``."""
    matrix = matrices + 8 * at.MATRIX_WIDTH * expert
    descriptor = integers(matrix, at.MATRIX_WIDTH)
    columns = descriptor[at.COLUMNS]
    groups = 4 * row * (columns // at.GROUP)
    product(
        part.table, matrix, block, x + row * x_stride, x_stride, part.quantized + row * descriptor[at.QUANTIZED_BYTES],
        part.scales + groups, part.sums + 2 * groups, 1, out, BLOCK_ROW,
    )  # fmt: skip


@njit
def experts_gate_up(part: Any, index: int, layer: Any, x: int, passed: int) -> int:
    """Route the rows ``x`` and compute the inner rows of their experts; return the barriers passed."""
    table, count = part.table, part.table[at.EXPERTS_PER_TOKEN]
    stride = 4 * table[at.HIDDEN]
    # Where all threads prepare all rows, all write the same routes.
    for row in range(part.first, part.last):
        route(table, layer[at.ROUTER], x + row * stride, row, part.private)
    passed = prepare(part, layer[at.GATE_UP], x, stride, 1, passed)
    chosen = integers(table[at.ROUTES], part.rows * count)
    halves = 2 if table[at.GATED] else 1
    blocks = integers(layer[at.GATE_UP], at.MATRIX_WIDTH)[at.BLOCKS] // halves
    phase = at.PHASES * index + at.GATE_UP_PRODUCT
    block = draw(table, phase, blocks, part.thread, -1)
    while block < blocks:
        for entry in range(part.rows * count):
            for half in range(halves):
                out = part.private + half * BLOCK_ROW
                expert_product(
                    part, layer[at.GATE_UP], chosen[entry], halves * block + half, x, stride, entry // count, out
                )  # fmt: skip
            inner = table[at.INNER_ROWS] + 4 * entry * table[at.INNER] + BLOCK_ROW * block
            call3(table[at.GATE], part.private, part.private + BLOCK_ROW, inner)
        block = draw(table, phase, blocks, part.thread, block)
    return int(barrier(table, passed, part.thread))


@njit
def experts_down(part: Any, index: int, layer: Any, passed: int) -> int:
    """Sum the weighted outputs of each row's experts; return the number of barriers passed."""
    table, count = part.table, part.table[at.EXPERTS_PER_TOKEN]
    x, stride = table[at.INNER_ROWS], 4 * table[at.INNER]
    passed = prepare(part, layer[at.DOWN], x, stride, count, passed)
    chosen = integers(table[at.ROUTES], part.rows * count)
    weights = floats(table[at.ROUTE_WEIGHTS], part.rows * count)
    scratch = part.private + part.rows * BLOCK_ROW  # behind the rows' sums
    expert_output = floats(scratch, BLOCK)
    blocks = integers(layer[at.DOWN], at.MATRIX_WIDTH)[at.BLOCKS]
    phase = at.PHASES * index + at.DOWN_PRODUCT
    block = draw(table, phase, blocks, part.thread, -1)
    while block < blocks:
        for entry in range(part.rows * count):
            expert_product(part, layer[at.DOWN], chosen[entry], block, x, stride, entry, scratch)
            total = floats(part.private + entry // count * BLOCK_ROW, BLOCK)
            for i in range(BLOCK):
                before = total[i] if entry % count else np.float32(0.0)
                total[i] = weights[entry] * expert_output[i] + before
        finish(part, at.DOWN_PRODUCT, block, blocks)
        block = draw(table, phase, blocks, part.thread, block)
    return int(barrier(table, passed, part.thread))
