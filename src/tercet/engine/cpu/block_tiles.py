"""Products with matrices in block formats, and reading a row of one. `formats` describes the packed bytes.

Activations are quantised to int8 with a scale for each group of 32. A group's products are whole numbers;
they are summed exactly, then multiplied by both scales and added to the output in float32, group after group.
A format with minima adds each minimum times the sum of the group's activations.

A wide product takes activations of 16 bits, as two rows of bytes: x = 255 high + low, both from -127 to 127.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from tercet.engine.cpu.dots import Dots
from tercet.engine.cpu.formats import BY_KIND, SUPER, Format
from tercet.engine.cpu.instructions import INSTRUCTIONS, Instructions
from tercet.engine.cpu.table import GROUP
from tercet.engine.cpu.tiles import TILES, make_product
from tercet.simd import F32, I8, I32, I64, INTEGERS, LANES, VECTOR, Vectors, kernel

BYTE_LANES = ir.VectorType(I8, LANES)
QUADS = GROUP // 4
PARTS = SUPER // GROUP  # groups that share a scale of a nested format


class Reader:
    """Emits the reading of groups of 32 weights of 16 rows, and of their scales, at two addresses."""

    def __init__(self, v: Vectors, form: Format, weights: Any, scales: Any) -> None:
        self.v, self.form, self.weights, self.scales = v, form, weights, scales
        self.group_bytes = form.weight_bytes(GROUP)
        self.scale_bytes = form.scale_bytes(form.block)  # of a file's block: a group, or `SUPER` weights

    def each(self, groups: Any, body: Callable[[Any, list[Any], list[Any], Any], None]) -> None:
        """Emit a loop over groups.

        ``body`` gets the group's number, the scales of its parts (one, or two of 16 weights) and its minimum
        as vectors, and the address of its weights; a list of minima is empty where the format has none.
        """
        v, b, form = self.v, self.v.b, self.form
        if not form.nested:
            with v.loop(groups) as group:
                place = v.address(self.scales, b.mul(group, I64(self.scale_bytes)))
                minima = [v.halves(v.address(place, 2 * LANES))] if form.minimum else []
                body(group, [v.halves(place)], minima, self._place(group))
            return
        with v.loop(b.udiv(groups, I64(PARTS))) as block:
            place = v.address(self.scales, b.mul(block, I64(self.scale_bytes)))
            top = v.halves(place)
            lowest = b.fneg(v.halves(v.address(place, 2 * LANES))) if form.minimum else None
            inner = v.address(place, (4 if form.minimum else 2) * LANES)
            with v.loop(PARTS) as part:
                group = b.add(b.mul(block, I64(PARTS)), part)
                at = v.address(inner, b.mul(part, I64(2 * LANES)))
                first, second = (v.load(v.address(at, LANES * i), BYTE_LANES) for i in range(2))
                if lowest is None:  # two scales, of 16 weights each
                    scales = [b.fmul(top, b.sitofp(x, VECTOR)) for x in (first, second)]
                    body(group, scales, [], self._place(group))
                else:
                    scale, minimum = (
                        b.fmul(x, b.uitofp(y, VECTOR)) for x, y in ((top, first), (lowest, second))
                    )
                    body(group, [scale], [minimum], self._place(group))

    def _place(self, group: Any) -> Any:
        return self.v.address(self.weights, self.v.b.mul(group, I64(self.group_bytes)))

    def quads(self, place: Any) -> Any:
        """Yield the group's weights as 8 vectors: in each lane four bytes, of four columns of a row."""
        v, b, form = self.v, self.v.b, self.form
        if form.bits == 8:
            for quad in range(QUADS):
                yield v.load(v.address(place, 64 * quad), INTEGERS, 64)
            return
        extra = form.bits - 4
        high = [v.load(v.address(place, 256 + 64 * i), INTEGERS, 64) for i in range(extra)]
        low_mask, high_mask = v.integers(0x0F0F0F0F), v.integers(((1 << extra) - 1) * 0x10101010)
        for line in range(QUADS // 2):
            raw = v.load(v.address(place, 64 * line), INTEGERS, 64)
            for half in range(2):
                low = b.and_(b.lshr(raw, v.integers(4)) if half else raw, low_mask)
                if extra == 0:
                    yield low
                    continue
                quad = 2 * line + half
                source = high[quad * extra // QUADS]
                shift = 4 - extra * (quad % (QUADS // extra))
                if shift > 0:
                    source = b.shl(source, v.integers(shift))
                elif shift < 0:
                    source = b.lshr(source, v.integers(-shift))
                yield b.or_(low, b.and_(source, high_mask))


def _tile(form: Format, instructions: Instructions, wide: bool) -> Any:
    """Build a tile of a format (see `tiles.make_product`)."""
    parts, planes = GROUP // form.group, 2 if wide else 1

    def tile(
        v: Vectors, tokens: int, t0: Any, w: Any, scales: Any, k: Any, x: Any, x_stride: Any, q: Any,
        q_scales: Any, q_sums: Any, out: Any, out_stride: Any,
    ) -> None:  # fmt: skip
        b = v.b
        groups = b.udiv(k, I64(GROUP))
        places = [b.add(t0, I64(t)) for t in range(tokens)]
        rows = [v.address(q, b.mul(b.mul(k, I64(planes)), place)) for place in places]
        firsts = [b.mul(b.mul(groups, I64(4)), place) for place in places]
        row_scales = [v.address(q_scales, first) for first in firsts]
        row_sums = [v.address(q_sums, b.add(first, first)) for first in firsts]
        outputs = [v.variable(VECTOR, v.constant(0.0)) for _ in range(tokens)]
        reader = Reader(v, form, w, scales)

        def group(number: Any, group_scales: list[Any], minima: list[Any], place: Any) -> None:
            offset = b.mul(number, I64(GROUP))
            starts = [[v.address(row, offset) for row in rows]]
            if wide:
                starts.append([v.address(start, k) for start in starts[0]])
            dots = [
                [Dots(v, tokens, form.limit, form.signed, instructions) for _ in range(parts)]
                for _ in range(planes)
            ]
            for quad, weights in enumerate(reader.quads(place)):
                for plane, plane_starts in zip(dots, starts, strict=True):
                    fours = [v.splat(v.load(v.address(start, 4 * quad), I32, 4)) for start in plane_starts]
                    plane[quad * parts // QUADS].add(weights, fours)
            zero = form.zero + dots[0][0].offset
            sums_at = b.mul(number, I64(8))
            for t in range(tokens):
                halves = [
                    v.load(v.address(row_sums[t], b.add(sums_at, I64(4 * i))), I32, 4) for i in range(2)
                ]
                whole = b.add(*halves)
                scale = v.load(v.address(row_scales[t], b.mul(number, I64(4))), F32, 4)
                value = b.load(outputs[t])
                for part in range(parts):
                    sums = dots[0][part].total(t)
                    if wide:
                        sums = b.sub(b.shl(sums, v.integers(8)), sums)  # 255 times
                        sums = b.add(sums, dots[1][part].total(t))
                    if zero:
                        activations = whole if parts == 1 else halves[part]
                        sums = b.sub(sums, v.splat(b.mul(activations, I32(zero))))
                    factor = b.fmul(group_scales[part], v.splat(scale))
                    value = v.fma(b.sitofp(sums, VECTOR), factor, value)
                for minimum in minima:
                    value = v.fma(minimum, v.splat(b.fmul(scale, b.sitofp(whole, F32))), value)
                b.store(value, outputs[t])

        reader.each(groups, group)
        for t in range(tokens):
            v.store(b.load(outputs[t]), v.address(out, b.mul(out_stride, places[t])), 4)

    return tile


def _row(form: Format) -> Any:
    """Build the kernel (weights, scales, K, lane, out) that writes row ``lane`` of a block as float32."""

    @kernel(5)
    def row(v: Vectors, w: Any, scales: Any, k: Any, lane: Any, out: Any) -> None:
        b, index = v.b, v.b.trunc(lane, I32)
        reader = Reader(v, form, w, scales)
        four = ir.VectorType(F32, 4)

        def same(value: Any) -> Any:
            x = ir.Constant(four, ir.Undefined)
            for i in range(4):
                x = b.insert_element(x, value, I32(i))
            return x

        def group(number: Any, group_scales: list[Any], minima: list[Any], place: Any) -> None:
            factors = [same(b.extract_element(scale, index)) for scale in group_scales]
            shifts = [same(b.extract_element(minimum, index)) for minimum in minima]
            target = v.address(out, b.mul(number, I64(4 * GROUP)))
            for quad, weights in enumerate(reader.quads(place)):
                raw = b.bitcast(b.extract_element(weights, index), ir.VectorType(I8, 4))
                values = b.sitofp(raw, four) if form.signed else b.uitofp(raw, four)
                if form.zero:
                    values = b.fsub(values, ir.Constant(four, [float(form.zero)] * 4))
                values = b.fmul(values, factors[quad * len(factors) // QUADS])
                for shift in shifts:
                    values = b.fadd(values, shift)
                v.store(values, v.address(target, 16 * quad), 4)

        reader.each(b.udiv(k, I64(GROUP)), group)

    return row


PRODUCTS = {
    (form.name, instructions, wide): make_product(_tile(form, instructions, wide), TILES[instructions])
    for form in BY_KIND.values()
    for instructions in INSTRUCTIONS
    for wide in (False, True)
}
ROWS = {form.name: _row(form) for form in BY_KIND.values()}
