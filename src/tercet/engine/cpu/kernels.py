"""A step of the network as one compiled program that a few threads run side by side.

Each thread runs `forward` from beginning to end. Work is divided into phases; in a phase threads
take blocks of rows, heads or tokens, and at its end they wait for each other. About five phases a
layer, half a microsecond each, are all that a token costs beyond its arithmetic and memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.attention import BEGIN, FINISH
from tercet.engine.cpu.lowrank import adapt, lower
from tercet.engine.cpu.matrices import BLOCK, add, floats, integers, prepare_rows, product, read_row
from tercet.engine.cpu.meetings import draw, meet, share
from tercet.engine.cpu.rows import rms_norm, soft_cap
from tercet.simd import atomic_add, atomic_load, caller, pause

FAST = {"reassoc", "nsz", "arcp", "contract"}

begin1, begin4, finish1, finish4 = BEGIN[1], BEGIN[4], FINISH[1], FINISH[4]
call3, call6, call10 = caller(3), caller(6), caller(10)


# Rows


@njit(fastmath=FAST)
def layer_norm(x: Any, weight: Any, bias: Any, size: int, eps: float, out: Any) -> None:
    mean = np.float32(0.0)
    for i in range(size):
        mean += x[i]
    mean /= np.float32(size)
    variance = np.float32(0.0)
    for i in range(size):
        variance += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1.0) / np.sqrt(variance / np.float32(size) + eps)
    for i in range(size):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@njit
def norm(t: Any, x: int, weight: int, bias: int, out: int) -> None:
    """The model's norm of one row."""
    if t[at.LAYER_NORM]:
        width = t[at.HIDDEN]
        eps = floats(t[at.FLOATS], 3)[2]
        layer_norm(
            floats(x, width),
            floats(weight, width),
            floats(bias, width),
            t[at.HIDDEN_SIZE],
            eps,
            floats(out, width),
        )
    else:
        rms_norm(x, weight, t[at.HIDDEN] // 16, t[at.HIDDEN_SIZE], t[at.EPS], out)


@njit
def rotate(x: int, cosines: int, sines: int, half: int) -> None:
    """Turn each pair (i, i + half) of a head."""
    v, c, s = floats(x, 2 * half), floats(cosines, half), floats(sines, half)
    for i in range(half):
        first, second = v[i], v[i + half]
        v[i] = first * c[i] - second * s[i]
        v[i + half] = second * c[i] + first * s[i]


# Phases


@njit
def embed(t: Any, low: int, high: int) -> None:
    width = t[at.HIDDEN]
    ids, positions = integers(t[at.IDS], t[at.TOKENS]), integers(t[at.POSITIONS], t[at.TOKENS])
    scale = floats(t[at.FLOATS], 3)[1]
    for row in range(low, high):
        place = t[at.X] + 4 * row * width
        read_row(t[at.EMBEDDING], ids[row], place)
        x = floats(place, width)
        if scale != 1:
            for i in range(width):
                x[i] *= scale
        if t[at.LEARNED_POSITIONS]:
            add(place, t[at.LEARNED_POSITIONS] + 4 * width * positions[row], width)


@njit
def place_heads(t: Any, layer: int, l: Any, low: int, high: int) -> None:  # noqa: E741
    """Norm and rotate queries and keys of rows' heads, and put keys and values into their pages."""
    heads, kv_heads, dim = t[at.HEADS], t[at.KV_HEADS], t[at.DIM]
    chunks = integers(t[at.CHUNKS], 1 << 40)
    positions, rows = integers(t[at.POSITIONS], t[at.TOKENS]), integers(t[at.CHUNK_OF], t[at.TOKENS])
    units, width = heads + kv_heads, (heads + 2 * kv_heads) * dim * 4
    half = t[at.ROTARY_HALF]
    scale = floats(t[at.FLOATS], 3)[0]
    for unit in range(low, high):
        row, head = unit // units, unit % units
        position = positions[row]
        x = t[at.QKV] + row * width + head * dim * 4
        if t[at.QK_NORM] == 1:
            rms_norm(
                x, l[at.Q_NORM] if head < heads else l[at.K_NORM], dim // 16, t[at.DIM_SIZE], t[at.EPS], x
            )
        if l[at.COSINES]:
            rotate(x, l[at.COSINES] + 4 * half * position, l[at.SINES] + 4 * half * position, half)
        if head < heads:
            q = floats(x, dim)
            for i in range(dim):
                q[i] *= scale
            continue
        pages = integers(chunks[rows[row] * 3 + 2], 1 << 40)
        head -= heads
        plane = t[at.PLANE_BYTES]
        keys = (
            t[at.KEYS_VALUES]
            + pages[position // at.PAGE] * t[at.PAGE_BYTES]
            + (layer * kv_heads + head) * 2 * plane
        )
        call6(t[at.STORE], x, x + kv_heads * dim * 4, dim, keys, keys + plane, position % at.PAGE)


@njit
def attend_tile(t: Any, layer: int, window: int, tile: int, head: int, state: int) -> None:
    """Attention of a tile's queries in one head."""
    tiles_at = integers(t[at.TILE_TABLE] + 24 * tile, 3)
    chunk, first, queries = tiles_at[0], tiles_at[1], tiles_at[2]
    c = integers(t[at.CHUNKS] + 24 * chunk, 3)
    row, position = c[0] + first, c[1] + first
    pages = integers(c[2], 1 << 40)
    heads, kv_heads, dim, plane = t[at.HEADS], t[at.KV_HEADS], t[at.DIM], t[at.PLANE_BYTES]
    stride = (heads + 2 * kv_heads) * dim * 4
    q = t[at.QKV] + row * stride + head * dim * 4
    out_stride = t[at.ATTENTION_WIDTH] * 4
    out = t[at.ATTENDED] + row * out_stride + head * dim * 4
    offset = (layer * kv_heads + head // (heads // kv_heads)) * 2 * plane
    four = queries == 4
    attend = t[at.ATTEND_FOUR] if four else t[at.ATTEND_ONE]
    if four:
        begin4(state, dim)
    else:
        begin1(state, dim)
    nearest = max(0, position + 1 - window) // at.PAGE
    for index in range(nearest, (position + queries - 1) // at.PAGE + 1):
        keys = t[at.KEYS_VALUES] + pages[index] * t[at.PAGE_BYTES] + offset
        seen, values, cap = position + 1 - index * at.PAGE, keys + plane, t[at.ATTENTION_CAP]
        call10(attend, q, stride, keys, values, dim, seen, 1, window, cap, state)
    if four:
        finish4(state, dim, out, out_stride)
    else:
        finish1(state, dim, out, out_stride)


@njit
def route(t: Any, router: int, x: int, row: int, scratch: int) -> None:
    """The experts of a row and their weights: softmax over all, then the largest."""
    experts, count = t[at.EXPERTS], t[at.EXPERTS_PER_TOKEN]
    blocks = integers(router, at.MATRIX_WIDTH)[at.BLOCKS]
    for block in range(blocks):
        product(t, router, block, x, 0, 0, 0, 0, 1, scratch + 4 * BLOCK * block, 0)
    scores = floats(scratch, experts)
    most = scores[0]
    for e in range(experts):
        most = max(most, scores[e])
    total = np.float32(0.0)
    for e in range(experts):
        scores[e] = np.exp(scores[e] - most)
        total += scores[e]
    chosen = integers(t[at.ROUTES] + 8 * row * count, count)
    weights = floats(t[at.ROUTE_WEIGHTS] + 4 * row * count, count)
    best_scores = floats(scratch + 4 * BLOCK * blocks, count)
    kept = np.float32(0.0)
    for slot in range(count):
        best = 0
        for e in range(experts):
            if scores[e] > scores[best]:
                best = e
        chosen[slot], best_scores[slot] = best, scores[best] / total
        kept += best_scores[slot]
        scores[best] = np.float32(-1.0)
    for slot in range(count):
        # Written once: where every thread routes all rows, another may be writing the same here.
        weights[slot] = best_scores[slot] / kept if t[at.NORMALIZE] else best_scores[slot]


@njit
def forward(t: Any, thread: int) -> None:
    """One step: what the table describes, as thread ``thread`` of ``t[THREADS]``.

    After the last meeting nothing of the table may be read: it may describe the next step already.
    """
    rows, threads, width = t[at.TOKENS], t[at.THREADS], t[at.HIDDEN]
    row_bytes = 4 * width
    private = t[at.PRIVATE] + thread * t[at.PRIVATE_BYTES]
    small = rows <= at.SMALL
    meetings, phase = 0, 0
    low, high = share(rows, thread, threads)
    layers, wanted = 0 if t[at.HEAD_ONLY] else t[at.LAYERS], t[at.WANTED]
    if layers:
        embed(t, low, high)
        meetings = meet(t, meetings, thread)
    # Few rows: every thread prepares all of them in a buffer of its own, which is faster than waiting.
    widest = max(t[at.HIDDEN], t[at.INNER], t[at.ATTENTION_WIDTH])
    first, last = (0, rows) if small else (low, high)
    mine = at.SMALL * thread if small else 0
    normed = t[at.NORMED] + mine * row_bytes
    per = t[at.EXPERTS_PER_TOKEN] if t[at.EXPERTS] else 1
    buffer = (
        t[at.QUANTIZED] + mine * per * widest,
        t[at.SCALES] + mine * per * (widest // 8),
        t[at.ZEROS] + mine * per * (widest // 8),
    )
    qkv_stride = 4 * (t[at.HEADS] + 2 * t[at.KV_HEADS]) * t[at.DIM]
    attended_stride, inner_stride = 4 * t[at.ATTENTION_WIDTH], 4 * t[at.INNER]
    adapted = t[at.RUNS] != 0
    low_rank = private + 2 * rows * 4 * BLOCK  # scratch behind what products are put into
    aside = t[at.POST_NORM] != 0 or t[at.PARALLEL] != 0  # attention's output is not added at once

    for layer in range(layers):
        l = integers(t[at.LAYER_TABLE] + 8 * at.LAYER_WIDTH * layer, at.LAYER_WIDTH)  # noqa: E741
        # Queries, keys and values.
        source = t[at.X]
        if t[at.PRE_NORM]:
            source = normed
            for row in range(first, last):
                norm(
                    t,
                    t[at.X] + row * row_bytes,
                    l[at.INPUT_NORM],
                    l[at.INPUT_NORM_BIAS],
                    normed + row * row_bytes,
                )
        prepare_rows(l[at.QKV_MATRIX], source, row_bytes, buffer, first, last)
        if not small:
            meetings = meet(t, meetings, thread)
        if adapted:
            meetings = lower(t, layer, at.QKV_CHANGE, source, row_bytes, thread, meetings)
        blocks = integers(l[at.QKV_MATRIX], at.MATRIX_WIDTH)[at.BLOCKS]
        block = draw(t, phase, blocks, thread, -1)
        while block < blocks:
            product(
                t, l[at.QKV_MATRIX], block, source, row_bytes, buffer[0], buffer[1], buffer[2], rows,
                t[at.QKV] + 4 * BLOCK * block, qkv_stride,
            )  # fmt: skip
            if adapted:
                adapt(t, layer, at.QKV_CHANGE, block, t[at.QKV] + 4 * BLOCK * block, qkv_stride, low_rank)
            block = draw(t, phase, blocks, thread, block)
        phase += 1
        meetings = meet(t, meetings, thread)
        if t[at.QK_NORM] == 2:
            q_size, k_size = t[at.HEADS] * t[at.DIM], t[at.KV_HEADS] * t[at.DIM]
            for row in range(low, high):
                q = t[at.QKV] + row * qkv_stride
                k = q + 4 * q_size
                rms_norm(q, l[at.Q_NORM], q_size // 16, t[at.HEADS] * t[at.DIM_SIZE], t[at.EPS], q)
                rms_norm(k, l[at.K_NORM], k_size // 16, t[at.KV_HEADS] * t[at.DIM_SIZE], t[at.EPS], k)
            meetings = meet(t, meetings, thread)
        units = rows * (t[at.HEADS] + t[at.KV_HEADS])
        begin, end = share(units, thread, threads)
        place_heads(t, layer, l, begin, end)
        meetings = meet(t, meetings, thread)

        # Attention.
        units = t[at.TILES] * t[at.HEADS]
        unit = draw(t, phase, units, thread, -1)
        while unit < units:
            attend_tile(t, layer, l[at.WINDOW], unit // t[at.HEADS], unit % t[at.HEADS], private)
            unit = draw(t, phase, units, thread, unit)
        phase += 1
        meetings = meet(t, meetings, thread)
        prepare_rows(l[at.O_MATRIX], t[at.ATTENDED], attended_stride, buffer, first, last)
        if t[at.PARALLEL]:  # the feed-forward layer reads what attention read
            for row in range(first, last):
                norm(
                    t,
                    t[at.X] + row * row_bytes,
                    l[at.MLP_NORM],
                    l[at.MLP_NORM_BIAS],
                    normed + row * row_bytes,
                )
        if not small:
            meetings = meet(t, meetings, thread)
        if adapted:
            meetings = lower(t, layer, at.O_CHANGE, t[at.ATTENDED], attended_stride, thread, meetings)
        blocks = integers(l[at.O_MATRIX], at.MATRIX_WIDTH)[at.BLOCKS]
        block = draw(t, phase, blocks, thread, -1)
        while block < blocks:
            place = 4 * BLOCK * block
            target = t[at.OUTPUT] + place if aside else private
            stride = row_bytes if aside else 4 * BLOCK
            product(
                t, l[at.O_MATRIX], block, t[at.ATTENDED], attended_stride, buffer[0], buffer[1], buffer[2], rows,
                target, stride,
            )  # fmt: skip
            if adapted:
                adapt(t, layer, at.O_CHANGE, block, target, stride, low_rank)
            if not aside:
                for row in range(rows):
                    add(t[at.X] + row * row_bytes + place, private + row * stride, BLOCK)
            block = draw(t, phase, blocks, thread, block)
        phase += 1
        meetings = meet(t, meetings, thread)
        if t[at.POST_NORM]:
            for row in range(low, high):
                place = t[at.OUTPUT] + row * row_bytes
                norm(t, place, l[at.ATTENTION_OUTPUT_NORM], 0, place)
                add(t[at.X] + row * row_bytes, place, width)
            meetings = meet(t, meetings, thread)

        # Feed-forward.
        source = t[at.X]
        if t[at.PRE_NORM]:
            source = normed
            if not t[at.PARALLEL]:
                for row in range(first, last):
                    norm(
                        t,
                        t[at.X] + row * row_bytes,
                        l[at.MLP_NORM],
                        l[at.MLP_NORM_BIAS],
                        normed + row * row_bytes,
                    )
        elif t[at.PARALLEL]:
            source = normed
        routed = l[at.ROUTER] != 0
        prepare_rows(l[at.GATE_UP], source, row_bytes, buffer, first, last)
        if routed:
            # Where all threads prepare all rows, all write the same routes.
            for row in range(first, last):
                route(t, l[at.ROUTER], source + row * row_bytes, row, private)
        if not small:
            meetings = meet(t, meetings, thread)
        if adapted and not routed:
            meetings = lower(t, layer, at.GATE_UP_CHANGE, source, row_bytes, thread, meetings)
        up = integers(l[at.GATE_UP], at.MATRIX_WIDTH)
        halves = 2 if t[at.GATED] else 1
        blocks = up[at.BLOCKS] // halves
        k = up[at.COLUMNS]
        group_row = 4 * (k // up[at.GROUP])
        if not routed:
            block = draw(t, phase, blocks, thread, -1)
            while block < blocks:
                for half in range(halves):
                    product(
                        t, l[at.GATE_UP], halves * block + half, source, row_bytes, buffer[0], buffer[1], buffer[2],
                        rows, private + half * rows * 4 * BLOCK, 4 * BLOCK,
                    )  # fmt: skip
                    if adapted:
                        adapt(
                            t, layer, at.GATE_UP_CHANGE, halves * block + half, private + half * rows * 4 * BLOCK,
                            4 * BLOCK, low_rank,
                        )  # fmt: skip
                for row in range(rows):
                    one = private + row * 4 * BLOCK
                    call3(
                        t[at.GATE],
                        one,
                        one + (halves - 1) * rows * 4 * BLOCK,
                        t[at.INNER_ROWS] + row * inner_stride + 4 * BLOCK * block,
                    )
                block = draw(t, phase, blocks, thread, block)
        else:
            choices = integers(t[at.ROUTES], rows * per)
            block = draw(t, phase, blocks, thread, -1)
            while block < blocks:
                for entry in range(rows * per):
                    row = entry // per
                    matrix = l[at.GATE_UP] + 8 * at.MATRIX_WIDTH * choices[entry]
                    for half in range(halves):
                        product(
                            t, matrix, halves * block + half, source + row * row_bytes, row_bytes,
                            buffer[0] + row * k, buffer[1] + row * group_row, buffer[2] + row * group_row, 1,
                            private + half * 4 * BLOCK, 4 * BLOCK,
                        )  # fmt: skip
                    call3(
                        t[at.GATE],
                        private,
                        private + 4 * BLOCK,
                        t[at.INNER_ROWS] + entry * inner_stride + 4 * BLOCK * block,
                    )
                block = draw(t, phase, blocks, thread, block)
        phase += 1
        meetings = meet(t, meetings, thread)
        if small:
            prepare_rows(l[at.DOWN], t[at.INNER_ROWS], inner_stride, buffer, 0, rows * (per if routed else 1))
        else:
            many = per if routed else 1
            prepare_rows(l[at.DOWN], t[at.INNER_ROWS], inner_stride, buffer, low * many, high * many)
            meetings = meet(t, meetings, thread)
        if adapted and not routed:
            meetings = lower(t, layer, at.DOWN_CHANGE, t[at.INNER_ROWS], inner_stride, thread, meetings)
        down = integers(l[at.DOWN], at.MATRIX_WIDTH)
        blocks, k = down[at.BLOCKS], down[at.COLUMNS]
        group_row = 4 * (k // down[at.GROUP])
        block = draw(t, phase, blocks, thread, -1)
        while block < blocks:
            place = 4 * BLOCK * block
            if not routed:
                product(
                    t, l[at.DOWN], block, t[at.INNER_ROWS], inner_stride, buffer[0], buffer[1], buffer[2], rows,
                    private, 4 * BLOCK,
                )  # fmt: skip
                if adapted:
                    adapt(t, layer, at.DOWN_CHANGE, block, private, 4 * BLOCK, low_rank)
            else:
                choices = integers(t[at.ROUTES], rows * per)
                weights = floats(t[at.ROUTE_WEIGHTS], rows * per)
                scratch = private + rows * 4 * BLOCK
                one = floats(scratch, BLOCK)
                for entry in range(rows * per):
                    y = floats(private + (entry // per) * 4 * BLOCK, BLOCK)
                    product(
                        t, l[at.DOWN] + 8 * at.MATRIX_WIDTH * choices[entry], block,
                        t[at.INNER_ROWS] + entry * inner_stride, inner_stride, buffer[0] + entry * k,
                        buffer[1] + entry * group_row, buffer[2] + entry * group_row, 1, scratch, 4 * BLOCK,
                    )  # fmt: skip
                    for i in range(BLOCK):
                        y[i] = weights[entry] * one[i] + (y[i] if entry % per else np.float32(0.0))
            for row in range(rows):
                if t[at.POST_NORM]:
                    y = floats(t[at.OUTPUT] + row * row_bytes + place, BLOCK)
                    z = floats(private + row * 4 * BLOCK, BLOCK)
                    for i in range(BLOCK):
                        y[i] = z[i]
                else:
                    if t[at.PARALLEL]:
                        add(private + row * 4 * BLOCK, t[at.OUTPUT] + row * row_bytes + place, BLOCK)
                    add(t[at.X] + row * row_bytes + place, private + row * 4 * BLOCK, BLOCK)
            block = draw(t, phase, blocks, thread, block)
        phase += 1
        meetings = meet(t, meetings, thread)
        if t[at.POST_NORM]:
            for row in range(low, high):
                place = t[at.OUTPUT] + row * row_bytes
                norm(t, place, l[at.MLP_OUTPUT_NORM], 0, place)
                add(t[at.X] + row * row_bytes, place, width)
            meetings = meet(t, meetings, thread)

    # The head, for the rows that are asked for.
    if wanted == 0:
        return
    chosen = integers(t[at.WANTED_ROWS], wanted)
    low, high = share(wanted, thread, threads)
    if t[at.STATES_ONLY]:
        for i in range(low, high):
            norm(
                t,
                t[at.X] + chosen[i] * row_bytes,
                t[at.FINAL_NORM],
                t[at.FINAL_NORM_BIAS],
                t[at.NORMED] + i * row_bytes,
            )
        meetings = meet(t, meetings, thread)
        return
    small = wanted <= at.SMALL
    first, last = (0, wanted) if small else (low, high)
    mine = at.SMALL * thread if small else 0
    normed = t[at.NORMED] + mine * row_bytes
    buffer = (
        t[at.QUANTIZED] + mine * per * widest,
        t[at.SCALES] + mine * per * (widest // 8),
        t[at.ZEROS] + mine * per * (widest // 8),
    )
    for i in range(first, last):
        norm(
            t,
            t[at.X] + chosen[i] * row_bytes,
            t[at.FINAL_NORM],
            t[at.FINAL_NORM_BIAS],
            normed + i * row_bytes,
        )
    prepare_rows(t[at.HEAD], normed, row_bytes, buffer, first, last)
    if not small:
        meetings = meet(t, meetings, thread)
    blocks = integers(t[at.HEAD], at.MATRIX_WIDTH)[at.BLOCKS]
    block = draw(t, phase, blocks, thread, -1)
    while block < blocks:
        place = t[at.LOGITS] + 4 * BLOCK * block
        product(
            t, t[at.HEAD], block, normed, row_bytes, buffer[0], buffer[1], buffer[2], wanted, place, 4 * BLOCK * blocks
        )  # fmt: skip
        if t[at.LOGIT_CAP]:
            for i in range(wanted):
                soft_cap(place + 4 * BLOCK * blocks * i, 1, t[at.LOGIT_CAP])
        block = draw(t, phase, blocks, thread, block)
    meetings = meet(t, meetings, thread)


def run(control: int, thread: int, seen: int, patience: int) -> int:
    """Thread 0 runs the step that the control block points to, -1 announces it by adding ``seen`` to the
    generation. Others wait and run steps.

    -2 waits ``patience`` turns, to see how long one takes.

    A thread that has waited ``patience`` turns says in the control block that it is parked, and
    returns the last generation it has seen.
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
        # Only for a thread that takes part is the table sure to stay as it is until it has read it.
        if thread < seen % at.CREW:
            forward(integers(atomic_load(control + at.STEP_TABLE), at.SIZE), thread)
            turns = 0
