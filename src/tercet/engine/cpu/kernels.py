"""A step of the network as one compiled program that a few threads run side by side.

Each thread runs `forward` from beginning to end. The work is divided into phases: in a phase the threads
take blocks of rows, heads or tokens, and at its end they wait for each other at a barrier. About five
phases a layer, half a microsecond each, are all that a token costs beyond its arithmetic and memory.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.experts import experts_down, experts_gate_up
from tercet.engine.cpu.heads import attend_tile, norm_projections, place_heads
from tercet.engine.cpu.matrices import add, floats, integers, read_row
from tercet.engine.cpu.products import multiply
from tercet.engine.cpu.rows import norm
from tercet.engine.cpu.threads import barrier, draw, part_of, share
from tercet.simd import atomic_add, atomic_load, pause


@njit
def embed(table: Any, low: int, high: int) -> None:
    """Put the embeddings of tokens low..high-1 into the residual stream."""
    width = table[at.HIDDEN]
    ids = integers(table[at.IDS], table[at.TOKENS])
    positions = integers(table[at.POSITIONS], table[at.TOKENS])
    scale = floats(table[at.FLOATS], 3)[1]
    for row in range(low, high):
        place = table[at.X] + 4 * row * width
        read_row(table[at.EMBEDDING], ids[row], place)
        x = floats(place, width)
        if scale != 1:
            for i in range(width):
                x[i] *= scale
        if table[at.LEARNED_POSITIONS]:
            add(place, table[at.LEARNED_POSITIONS] + 4 * width * positions[row], width)


@njit
def norm_rows(part: Any, weight: int, bias: int) -> None:
    """Norm the residual stream's rows that this thread prepares for a product, into its buffer."""
    stride = 4 * part.table[at.HIDDEN]
    for row in range(part.first, part.last):
        norm(part.table, part.table[at.X] + row * stride, weight, bias, part.normed + row * stride)


@njit
def add_normed_output(part: Any, weight: int, passed: int) -> int:
    """Add the norm of a sublayer's output to the residual stream; return the number of barriers passed."""
    table, width = part.table, part.table[at.HIDDEN]
    for row in range(part.low, part.high):
        place = table[at.OUTPUT] + 4 * row * width
        norm(table, place, weight, 0, place)
        add(table[at.X] + 4 * row * width, place, width)
    return int(barrier(table, passed, part.thread))


@njit
def attention(part: Any, index: int, layer: Any, passed: int) -> int:
    """Run a layer's attention; return the number of barriers passed.

    Args:
        part: This thread's part of the work.
        index: The layer's number.
        layer: The layer's row of the layer table.
        passed: Barriers passed so far.
    """
    table, thread, stride = part.table, part.thread, 4 * part.table[at.HIDDEN]
    x = table[at.X]
    if table[at.PRE_NORM]:
        norm_rows(part, layer[at.INPUT_NORM], layer[at.INPUT_NORM_BIAS])
        x = part.normed
    passed = multiply(part, index, at.QKV_PRODUCT, layer[at.QKV_MATRIX], x, stride, passed)
    if table[at.QK_NORM] == 2:
        norm_projections(table, layer, part.low, part.high)
        passed = barrier(table, passed, thread)
    units = part.rows * (table[at.HEADS] + table[at.KV_HEADS])
    begin, end = share(units, thread, table[at.THREADS])
    place_heads(table, index, layer, begin, end)
    passed = barrier(table, passed, thread)
    heads = table[at.HEADS]
    units = table[at.TILES] * heads
    phase = at.PHASES * index + at.ATTENTION_PHASE
    unit = draw(table, phase, units, thread, -1)
    while unit < units:
        attend_tile(table, index, layer[at.WINDOW], unit // heads, unit % heads, part.private)
        unit = draw(table, phase, units, thread, unit)
    passed = barrier(table, passed, thread)
    if table[at.PARALLEL]:  # the feed-forward layer reads what attention read
        norm_rows(part, layer[at.MLP_NORM], layer[at.MLP_NORM_BIAS])
    attended, attended_stride = table[at.ATTENDED], 4 * table[at.ATTENTION_WIDTH]
    passed = multiply(part, index, at.O_PRODUCT, layer[at.O_MATRIX], attended, attended_stride, passed)
    if table[at.POST_NORM]:
        passed = add_normed_output(part, layer[at.ATTENTION_OUTPUT_NORM], passed)
    return int(passed)


@njit
def feed_forward(part: Any, index: int, layer: Any, passed: int) -> int:
    """Run a layer's feed-forward network; arguments and result as for `attention`."""
    table, stride = part.table, 4 * part.table[at.HIDDEN]
    post_norm = table[at.POST_NORM]  # read now: behind the step's last barrier the table may be gone
    x = table[at.X]
    if table[at.PARALLEL]:
        x = part.normed  # as `attention` left it
    elif table[at.PRE_NORM]:
        norm_rows(part, layer[at.MLP_NORM], layer[at.MLP_NORM_BIAS])
        x = part.normed
    if layer[at.ROUTER]:
        passed = experts_gate_up(part, index, layer, x, passed)
        passed = experts_down(part, index, layer, passed)
    else:
        passed = multiply(part, index, at.GATE_UP_PRODUCT, layer[at.GATE_UP], x, stride, passed)
        inner, inner_stride = table[at.INNER_ROWS], 4 * table[at.INNER]
        passed = multiply(part, index, at.DOWN_PRODUCT, layer[at.DOWN], inner, inner_stride, passed)
    if post_norm:
        passed = add_normed_output(part, layer[at.MLP_OUTPUT_NORM], passed)
    return int(passed)


@njit
def head(part: Any, layers: int, passed: int) -> None:
    """Compute the logits of the selected rows, or only the final norm of their states."""
    table, stride = part.table, 4 * part.table[at.HIDDEN]
    selected = integers(table[at.SELECTED_ROWS], part.rows)
    only_states = table[at.STATES_ONLY]
    begin, end = (part.low, part.high) if only_states else (part.first, part.last)
    normed = table[at.NORMED] if only_states else part.normed
    for row in range(begin, end):
        x = table[at.X] + selected[row] * stride
        norm(table, x, table[at.FINAL_NORM], table[at.FINAL_NORM_BIAS], normed + row * stride)
    if only_states:
        barrier(table, passed, part.thread)
    else:
        multiply(part, layers, at.HEAD_PRODUCT, table[at.HEAD], normed, stride, passed)


@njit
def forward(table: Any, thread: int) -> None:
    """Run the step that the table describes, as thread ``thread`` of ``table[THREADS]``.

    Nothing of the table may be read after the last barrier: it may describe the next step already.
    """
    layers = 0 if table[at.HEAD_ONLY] else table[at.LAYERS]
    selected = table[at.SELECTED]
    layer_table = table[at.LAYER_TABLE]
    passed = 0
    if layers:
        part = part_of(table, thread, table[at.TOKENS])
        embed(table, part.low, part.high)
        passed = barrier(table, passed, thread)
        for index in range(layers):
            layer = integers(layer_table + 8 * at.LAYER_WIDTH * index, at.LAYER_WIDTH)
            passed = attention(part, index, layer, passed)
            passed = feed_forward(part, index, layer, passed)
    if selected:
        head(part_of(table, thread, selected), layers, passed)


def run(control: int, thread: int, seen: int, patience: int) -> int:
    """Run steps as one thread of a pool, or serve the pool in one of two other ways.

    Thread 0 runs the step that the control block points to, once. Thread -1 announces that step by adding
    ``seen`` to the generation. Thread -2 spins for ``patience`` turns, to measure how long a turn takes.
    Any other thread waits for steps and runs them; when it has waited ``patience`` turns it marks itself in
    the control block as parked.

    Args:
        control: Address of the pool's control block (see `table`).
        thread: Number of the thread, or -1 or -2.
        seen: The last generation that the thread has seen; for -1 the number to add.
        patience: Turns of waiting.

    Returns:
        The last generation that a parked thread has seen, otherwise 0.
    """
    if thread == -2:
        for _ in range(patience):
            pause()
        return 0
    if thread == -1:
        atomic_add(control + at.GENERATION, seen)
        return 0
    if thread == 0:
        forward(integers(integers(control, 2)[1], at.SIZE), 0)
        return 0
    parked = control + at.PARKED + 64 * thread
    turns = 0
    while True:
        while atomic_load(control + at.GENERATION) == seen:
            pause()
            turns += 1
            if turns > patience:
                atomic_add(parked, 1)
                if atomic_load(control + at.GENERATION) == seen:
                    return seen
                atomic_add(parked, -1)
        seen = atomic_load(control + at.GENERATION)
        # Only for a thread that takes part does the table stay as it is until the thread has read it.
        if thread < seen % at.CREW:
            forward(integers(atomic_load(control + at.STEP_TABLE), at.SIZE), thread)
            turns = 0
