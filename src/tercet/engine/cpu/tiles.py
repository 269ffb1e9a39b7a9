"""Matrix products, a tile at a time: 16 rows of weights times 1, 4 or 8 tokens.

Weights are stored in blocks of 16 rows, so that each lane of a vector belongs to one row: sums never cross
lanes, and a loaded weight serves every token of the tile.

float32, bfloat16   [blocks, K, 16]: for each column the weights of the 16 rows.
int8    [blocks, K / 4, 16, 4] unsigned (w + 128), and scales [blocks, K / GROUP8, 16] bfloat16.
int4    [blocks, K / 8, 16, 4]: a byte holds the quantised weights 0..15 of two columns that are four apart, the
        lower nibble first; scales and offsets [blocks, K / GROUP4, 2, 16] bfloat16.

For int8 and int4, activations are quantised to int8 with a scale for each group. Every output is summed in
the same order in every tile, so that a token's result does not depend on what is computed beside it.

A product takes eleven integers: the addresses of a block's weights and scales; K; the address and stride of
float32 x; the addresses of its quantised rows, their scales and their zeros; the number of tokens; and the
address and stride of out [tokens, 16]. Strides are in bytes. A row of quantised values has K bytes, a row of
scales or zeros 4 bytes for each group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tercet.engine.cpu.table import GROUP4, GROUP8
from tercet.simd import F32, I32, I64, INTEGERS, VECTOR, Vectors, kernel

TILES = (8, 4, 1)  # tokens: as many as the registers hold, and smaller tiles for the rest
Tile = Callable[..., None]


def _product(tile: Tile) -> Any:
    """Build the kernel that multiplies a block by any number of tokens, in tiles."""

    @kernel(11)
    def product(
        v: Vectors, w: Any, scales: Any, k: Any, x: Any, x_stride: Any, q: Any, q_scales: Any, q_zeros: Any,
        tokens: Any, out: Any, out_stride: Any,
    ) -> None:  # fmt: skip
        b = v.b
        done = I64(0)
        left = tokens
        for size in TILES:
            count = b.udiv(left, I64(size))
            with v.loop(count) as number:
                t = b.add(done, b.mul(number, I64(size)))
                tile(v, size, t, w, scales, k, x, x_stride, q, q_scales, q_zeros, out, out_stride)
            done = b.add(done, b.mul(count, I64(size)))
            left = b.urem(left, I64(size))

    return product


def _float_tile(bfloat: bool) -> Tile:
    """Build a tile of float32 or bfloat16 weights.

    Two sums for each token, over even and odd columns, hide the latency of adding.
    """
    size = 2 if bfloat else 4

    def tile(
        v: Vectors, tokens: int, t0: Any, w: Any, scales: Any, k: Any, x: Any, x_stride: Any, q: Any,
        q_scales: Any, q_zeros: Any, out: Any, out_stride: Any,
    ) -> None:  # fmt: skip
        b = v.b
        rows = [v.address(x, b.mul(x_stride, b.add(t0, I64(t)))) for t in range(tokens)]
        sums = [[v.variable(VECTOR, v.constant(0.0)) for _ in range(2)] for _ in range(tokens)]
        with v.loop(b.lshr(k, I64(1))) as pair:
            for half in range(2):
                column = v.address(w, b.add(b.mul(pair, I64(32 * size)), I64(16 * size * half)))
                weights = v.bfloats(column) if bfloat else v.floats(column)
                for t in range(tokens):
                    place = v.address(rows[t], b.add(b.mul(pair, I64(8)), I64(4 * half)))
                    value = v.splat(v.load(place, F32, 4))
                    b.store(v.fma(weights, value, b.load(sums[t][half])), sums[t][half])
        for t in range(tokens):
            total = b.fadd(b.load(sums[t][0]), b.load(sums[t][1]))
            v.store(total, v.address(out, b.mul(out_stride, b.add(t0, I64(t)))), 4)

    return tile


def _integer_tile(int4: bool, vnni: bool) -> Tile:
    """Build a tile of int8 or int4 weights; ``vnni``: with one instruction for four products, where there is one.

    int8: the zeros of x are int32, -128 times a group's sum, which cancels the 128 added to stored weights.
    int4: they are float32, scale times a group's sum, which the offsets are multiplied by.
    """
    group_size = GROUP4 if int4 else GROUP8
    group_bytes = group_size * 16 // (2 if int4 else 1)

    def tile(
        v: Vectors, tokens: int, t0: Any, w: Any, scales: Any, k: Any, x: Any, x_stride: Any, q: Any,
        q_scales: Any, q_zeros: Any, out: Any, out_stride: Any,
    ) -> None:  # fmt: skip
        b = v.b
        groups = b.udiv(k, I64(group_size))
        places = [b.add(t0, I64(t)) for t in range(tokens)]
        rows = [v.address(q, b.mul(k, place)) for place in places]
        firsts = [b.mul(b.mul(groups, I64(4)), place) for place in places]
        row_scales = [v.address(q_scales, first) for first in firsts]
        row_zeros = [v.address(q_zeros, first) for first in firsts]
        sums = [v.variable(VECTOR, v.constant(0.0)) for _ in range(tokens)]
        with v.loop(groups) as group:
            offset = b.mul(group, I64(4))
            block = v.address(w, b.mul(group, I64(group_bytes)))
            starts = [v.address(row, b.mul(group, I64(group_size))) for row in rows]
            zeros = [v.load(v.address(zero, offset), F32 if int4 else I32, 4) for zero in row_zeros]
            dots = [v.integers(0) if int4 else v.splat(zero) for zero in zeros]
            quad = 0
            for line in range(0, group_bytes, 64):
                raw = v.load(v.address(block, line), INTEGERS, 64)
                for weights in _nibbles(v, raw) if int4 else [raw]:
                    for t in range(tokens):
                        four = v.splat(v.load(v.address(starts[t], 4 * quad), I32, 4))
                        dots[t] = v.dot4(dots[t], weights, four, vnni)
                    quad += 1
            group_scales = v.address(scales, b.mul(group, I64(64 if int4 else 32)))
            scale = v.bfloats(group_scales)
            minimum = v.bfloats(v.address(group_scales, 32)) if int4 else None
            for t in range(tokens):
                factor = b.fmul(scale, v.splat(v.load(v.address(row_scales[t], offset), F32, 4)))
                value = v.fma(b.sitofp(dots[t], VECTOR), factor, b.load(sums[t]))
                if minimum is not None:
                    value = v.fma(minimum, v.splat(zeros[t]), value)
                b.store(value, sums[t])
        for t in range(tokens):
            v.store(b.load(sums[t]), v.address(out, b.mul(out_stride, places[t])), 4)

    return tile


def _nibbles(v: Vectors, raw: Any) -> list[Any]:
    """Emit the lower and the upper four bits of each byte."""
    mask = v.integers(0x0F0F0F0F)
    return [v.b.and_(raw, mask), v.b.and_(v.b.lshr(raw, v.integers(4)), mask)]


float32_product, bfloat16_product = _product(_float_tile(False)), _product(_float_tile(True))
int8_product, int8_portable_product = (_product(_integer_tile(False, vnni)) for vnni in (True, False))
int4_product, int4_portable_product = (_product(_integer_tile(True, vnni)) for vnni in (True, False))
