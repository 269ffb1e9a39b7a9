"""Matrix products, a tile at a time: 16 rows of weights times a few tokens.

Weights are stored in blocks of 16 rows, so that each lane of a vector belongs to one row: sums never cross
lanes, and a loaded weight serves every token of the tile. Float weights are [blocks, K, 16]: for each column
those of the 16 rows. `block_tiles` has the products with block formats.

Every output is summed in the same order in every tile, so that a token's result does not depend on what is
computed beside it.

A product takes eleven integers: the addresses of a block's weights and scales; K; the address and stride of
float32 x; the addresses of its quantised rows, their scales and their sums; the number of tokens; and the
address and stride of out [tokens, 16]. Strides are in bytes. A row of quantised values has K bytes; it has a
float32 scale for each 32 of them, and an int32 sum for each 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tercet.engine.cpu.instructions import Instructions
from tercet.simd import F32, I32, I64, VECTOR, Vectors, kernel

# Tokens of a tile: as many as the registers hold, and smaller tiles for the rest.
TILES: dict[Instructions, tuple[int, ...]] = {"vnni": (8, 4, 1), "avx2": (4, 1), "portable": (4, 1)}
FLOAT_TILES = (8, 4, 1)
Tile = Callable[..., None]


def make_product(tile: Tile, tiles: tuple[int, ...]) -> Any:
    """Build the kernel that multiplies a block by any number of tokens, in tiles."""

    @kernel(11)
    def product(
        v: Vectors, w: Any, scales: Any, k: Any, x: Any, x_stride: Any, q: Any, q_scales: Any, q_sums: Any,
        tokens: Any, out: Any, out_stride: Any,
    ) -> None:  # fmt: skip
        b = v.b
        done = I64(0)
        left = tokens
        for size in tiles:
            count = b.udiv(left, I64(size))
            with v.loop(count) as number:
                t = b.add(done, b.mul(number, I64(size)))
                tile(v, size, t, w, scales, k, x, x_stride, q, q_scales, q_sums, out, out_stride)
            done = b.add(done, b.mul(count, I64(size)))
            left = b.urem(left, I64(size))

    return product


LOADS: dict[str, tuple[int, Callable[[Vectors, Any], Any]]] = {
    "float32": (4, Vectors.floats),
    "bfloat16": (2, Vectors.bfloats),
    "float16": (2, Vectors.halves),
}


def _tile(kind: str) -> Tile:
    """Build a tile of float weights.

    Two sums for each token, over even and odd columns, hide the latency of adding.
    """
    size, load = LOADS[kind]

    def tile(
        v: Vectors, tokens: int, t0: Any, w: Any, scales: Any, k: Any, x: Any, x_stride: Any, q: Any,
        q_scales: Any, q_sums: Any, out: Any, out_stride: Any,
    ) -> None:  # fmt: skip
        b = v.b
        rows = [v.address(x, b.mul(x_stride, b.add(t0, I64(t)))) for t in range(tokens)]
        sums = [[v.variable(VECTOR, v.constant(0.0)) for _ in range(2)] for _ in range(tokens)]
        with v.loop(b.lshr(k, I64(1))) as pair:
            for half in range(2):
                column = v.address(w, b.add(b.mul(pair, I64(32 * size)), I64(16 * size * half)))
                weights = load(v, column)
                for t in range(tokens):
                    place = v.address(rows[t], b.add(b.mul(pair, I64(8)), I64(4 * half)))
                    value = v.splat(v.load(place, F32, 4))
                    b.store(v.fma(weights, value, b.load(sums[t][half])), sums[t][half])
        for t in range(tokens):
            total = b.fadd(b.load(sums[t][0]), b.load(sums[t][1]))
            v.store(total, v.address(out, b.mul(out_stride, b.add(t0, I64(t)))), 4)

    return tile


def _row(kind: str) -> Any:
    """Build the kernel (weights, scales, K, lane, out) that writes row ``lane`` of a block as float32."""
    size, load = LOADS[kind]

    @kernel(5)
    def row(v: Vectors, w: Any, scales: Any, k: Any, lane: Any, out: Any) -> None:
        b = v.b
        with v.loop(k) as column:
            values = load(v, v.address(w, b.mul(column, I64(16 * size))))
            value = b.extract_element(values, b.trunc(lane, I32))
            v.store(value, v.address(out, b.mul(column, I64(4))), 4)

    return row


PRODUCTS = {kind: make_product(_tile(kind), FLOAT_TILES) for kind in LOADS}
ROWS = {kind: _row(kind) for kind in LOADS}
