"""The heads of attention in a step: queries and keys are normed and rotated, keys and values stored, tiles attended."""

from __future__ import annotations

from typing import Any

from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.attention import BEGIN, FINISH
from tercet.engine.cpu.matrices import floats, integers
from tercet.engine.cpu.rows import rms_norm
from tercet.simd import caller

begin1, begin4, finish1, finish4 = BEGIN[1], BEGIN[4], FINISH[1], FINISH[4]
call6, call10 = caller(6), caller(10)


@njit
def rotate(x: int, cosines: int, sines: int, half: int) -> None:
    """Rotate each pair (i, i + half) of a head in place (RoPE, Su et al. 2021, arXiv:2104.09864)."""
    v, c, s = floats(x, 2 * half), floats(cosines, half), floats(sines, half)
    for i in range(half):
        first, second = v[i], v[i + half]
        v[i] = first * c[i] - second * s[i]
        v[i + half] = second * c[i] + first * s[i]


@njit
def norm_projections(table: Any, layer: Any, low: int, high: int) -> None:
    """Norm the whole projections of rows low..high-1, all heads together, as OLMo 2 does."""
    heads, kv_heads, dim = table[at.HEADS], table[at.KV_HEADS], table[at.DIM]
    size, eps = table[at.DIM_SIZE], table[at.EPS]
    for row in range(low, high):
        q = table[at.QKV] + row * 4 * (heads + 2 * kv_heads) * dim
        k = q + 4 * heads * dim
        rms_norm(q, layer[at.Q_NORM], heads * dim // 16, heads * size, eps, q)
        rms_norm(k, layer[at.K_NORM], kv_heads * dim // 16, kv_heads * size, eps, k)


@njit
def place_heads(table: Any, index: int, layer: Any, low: int, high: int) -> None:
    """Norm and rotate queries and keys, and store keys and values in their pages.

    Heads low..high-1 are counted over all rows, those of a row together: queries first, then keys, each
    with its values. ``index`` is the layer's number.
    """
    heads, kv_heads, dim = table[at.HEADS], table[at.KV_HEADS], table[at.DIM]
    chunks = integers(table[at.CHUNKS], 1 << 40)
    positions = integers(table[at.POSITIONS], table[at.TOKENS])
    chunk_of = integers(table[at.CHUNK_OF], table[at.TOKENS])
    units, width = heads + kv_heads, (heads + 2 * kv_heads) * dim * 4
    half = table[at.ROTARY_HALF]
    scale = floats(table[at.FLOATS], 3)[0]
    for unit in range(low, high):
        row, head = unit // units, unit % units
        position = positions[row]
        x = table[at.QKV] + row * width + head * dim * 4
        if table[at.QK_NORM] == 1:
            weight = layer[at.Q_NORM] if head < heads else layer[at.K_NORM]
            rms_norm(x, weight, dim // 16, table[at.DIM_SIZE], table[at.EPS], x)
        if layer[at.COSINES]:
            offset = 4 * half * position
            rotate(x, layer[at.COSINES] + offset, layer[at.SINES] + offset, half)
        if head < heads:
            q = floats(x, dim)
            for i in range(dim):
                q[i] *= scale
            continue
        pages = integers(chunks[chunk_of[row] * 3 + 2], 1 << 40)
        head -= heads
        plane = table[at.PLANE_BYTES]
        keys = (
            table[at.KEYS_VALUES]
            + pages[position // at.PAGE] * table[at.PAGE_BYTES]
            + (index * kv_heads + head) * 2 * plane
        )
        call6(table[at.STORE], x, x + kv_heads * dim * 4, dim, keys, keys + plane, position % at.PAGE)


@njit
def attend_tile(table: Any, index: int, window: int, tile: int, head: int, state: int) -> None:
    """Compute one head's attention for the queries of a tile (see `attention`).

    Args:
        table: Describes the step.
        index: The layer's number.
        window: Positions that a query sees, itself included.
        tile: Number of the tile.
        head: Number of the query head.
        state: Address of scratch for a tile (`table.state_bytes`).
    """
    tile_row = integers(table[at.TILE_TABLE] + 24 * tile, 3)
    chunk, first, queries = tile_row[0], tile_row[1], tile_row[2]
    chunk_row = integers(table[at.CHUNKS] + 24 * chunk, 3)
    row, position = chunk_row[0] + first, chunk_row[1] + first
    pages = integers(chunk_row[2], 1 << 40)
    heads, kv_heads, dim, plane = (
        table[at.HEADS],
        table[at.KV_HEADS],
        table[at.DIM],
        table[at.PLANE_BYTES],
    )
    stride = (heads + 2 * kv_heads) * dim * 4
    q = table[at.QKV] + row * stride + head * dim * 4
    out_stride = table[at.ATTENTION_WIDTH] * 4
    out = table[at.ATTENDED] + row * out_stride + head * dim * 4
    offset = (index * kv_heads + head // (heads // kv_heads)) * 2 * plane
    four = queries == 4
    attend = table[at.ATTEND_FOUR] if four else table[at.ATTEND_ONE]
    if four:
        begin4(state, dim)
    else:
        begin1(state, dim)
    nearest = max(0, position + 1 - window) // at.PAGE
    for number in range(nearest, (position + queries - 1) // at.PAGE + 1):
        keys = table[at.KEYS_VALUES] + pages[number] * table[at.PAGE_BYTES] + offset
        visible, values, cap = position + 1 - number * at.PAGE, keys + plane, table[at.ATTENTION_CAP]
        call10(attend, q, stride, keys, values, dim, visible, 1, window, cap, state)
    if four:
        finish4(state, dim, out, out_stride)
    else:
        finish1(state, dim, out, out_stride)
