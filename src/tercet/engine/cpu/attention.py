"""Attention over one page of keys and values, with a running softmax.

A page holds PAGE positions of one head: keys [D, PAGE] (so that 16 scores are one vector) and values
[PAGE, D]. Pages are visited in order; after each, the sum of exponentials and the weighted values so far
are rescaled to the new largest score (Milakov and Gimelshein 2018, arXiv:1805.02867). The arithmetic of a
query does not depend on its tile: positions that it does not see get a weight of exactly 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tercet.engine.cpu.table import PAGE, QUERIES
from tercet.simd import F16, F32, I32, I64, INTEGERS, LANES, VECTOR, Vectors, kernel

VECTORS = PAGE // LANES
NEVER = -1e30  # below every score


def _attend(queries: int, half: bool) -> Any:
    """Build the kernel that attends over one page for ``queries`` queries; ``half``: the page is float16.

    Its arguments are (q, q_stride, keys, values, dim, visible, step, window, cap, state):

    q, q_stride: Address of the scaled float32 queries, and the bytes from one to the next.
    keys, values: Addresses in the page.
    dim: Size of a head.
    visible: Number of the page's positions, from its first, that precede or equal the first query's; may be
        above PAGE. Each further query has ``step`` more. A query sees only the last ``window`` of them.
    cap: Bits of the soft cap as float32; 0: none.
    state: Address of the running state: maxima [queries, 16] and sums [queries, 16], then weights
        [queries, PAGE] and outputs [queries, dim].
    """
    size = 2 if half else 4

    @kernel(10)
    def attend(
        v: Vectors, q: Any, q_stride: Any, keys: Any, values: Any, dim: Any, visible: Any, step: Any, window: Any,
        cap: Any, state: Any,
    ) -> None:  # fmt: skip
        b = v.b
        load = v.halves if half else v.floats
        rows = [v.address(q, b.mul(q_stride, I64(t))) for t in range(queries)]
        scores = [[v.variable(VECTOR, v.constant(0.0)) for _ in range(VECTORS)] for _ in range(queries)]
        with v.loop(dim) as d:
            row = v.address(keys, b.mul(d, I64(PAGE * size)))
            key = [load(v.address(row, LANES * size * i)) for i in range(VECTORS)]
            for t in range(queries):
                value = v.splat(v.load(v.address(rows[t], b.mul(d, I64(4))), F32, 4))
                for i in range(VECTORS):
                    b.store(v.fma(key[i], value, b.load(scores[t][i])), scores[t][i])
        lanes = ir.Constant(INTEGERS, list(range(LANES)))
        factors = []
        for t in range(queries):
            last = b.add(visible, b.mul(step, I64(t)))
            high, low = v.splat(b.trunc(last, I32)), v.splat(b.trunc(b.sub(last, window), I32))
            masked = []
            for i in range(VECTORS):
                score = b.load(scores[t][i])
                with b.if_then(b.icmp_signed("!=", cap, I64(0))):
                    limit = v.number(cap)
                    b.store(b.fmul(limit, v.tanh(b.fdiv(score, limit))), scores[t][i])
                score = b.load(scores[t][i])
                place = b.add(lanes, v.integers(LANES * i))
                in_window = b.and_(b.icmp_signed("<", place, high), b.icmp_signed(">=", place, low))
                masked.append(b.select(in_window, score, v.constant(2 * NEVER)))
            highest = masked[0]
            for score in masked[1:]:
                highest = v.largest(highest, score)
            before = v.floats(v.address(state, 64 * t))
            after = v.largest(before, v.splat(v.maximum(highest)))
            v.store(after, v.address(state, 64 * t), 4)
            factors.append(v.exp(b.fsub(before, after)))
            sums = v.address(state, 64 * (queries + t))
            total = b.fmul(v.floats(sums), factors[t])
            for i in range(VECTORS):
                weight = v.exp(b.fsub(masked[i], after))
                total = b.fadd(total, weight)
                v.store(weight, v.address(state, 128 * queries + 4 * (PAGE * t + LANES * i)), 4)
            v.store(total, sums, 4)
        end = b.add(visible, b.mul(step, I64(queries - 1)))
        end = b.select(b.icmp_signed("<", end, I64(PAGE)), end, I64(PAGE))
        outputs = v.address(state, queries * (128 + 4 * PAGE))
        vectors = b.lshr(dim, I64(4))
        wide = b.lshr(vectors, I64(2))
        with v.loop(wide) as column:
            _add_values(v, load, size, values, state, outputs, dim, b.mul(column, I64(4)), 4, end, factors)
        rest = b.sub(vectors, b.mul(wide, I64(4)))
        with v.loop(rest) as column:
            first = b.add(column, b.mul(wide, I64(4)))
            _add_values(v, load, size, values, state, outputs, dim, first, 1, end, factors)

    return attend


def _add_values(
    v: Vectors, load: Any, size: int, values: Any, state: Any, outputs: Any, dim: Any, first: Any, width: int,
    end: Any, factors: list[Any],
) -> None:  # fmt: skip
    """Emit outputs = outputs * factor + weights times values, for ``width`` vectors from ``first`` on."""
    b, queries = v.b, len(factors)
    column = b.mul(first, I64(LANES))
    places = [
        [
            v.address(outputs, b.mul(b.add(b.add(column, b.mul(dim, I64(t))), I64(LANES * i)), I64(4)))
            for i in range(width)
        ]
        for t in range(queries)
    ]
    sums = [
        [v.variable(VECTOR, b.fmul(v.floats(places[t][i]), factors[t])) for i in range(width)]
        for t in range(queries)
    ]
    with v.loop(end) as j:
        at = v.address(values, b.mul(b.add(b.mul(j, dim), column), I64(size)))
        value = [load(v.address(at, LANES * size * i)) for i in range(width)]
        for t in range(queries):
            place = v.address(state, b.add(b.mul(j, I64(4)), I64(128 * queries + 4 * PAGE * t)))
            weight = v.splat(v.load(place, F32, 4))
            for i in range(width):
                b.store(v.fma(value[i], weight, b.load(sums[t][i])), sums[t][i])
    for t in range(queries):
        for i in range(width):
            v.store(b.load(sums[t][i]), places[t][i], 4)


def _store(half: bool) -> Any:
    """Build the kernel that stores a key and a value in a page; ``half``: the page is float16.

    Its arguments are (key, value, dim, keys, values, slot): addresses of the float32 vectors, the size of a
    head, addresses in the page, and the position within the page.
    """
    size = 2 if half else 4

    @kernel(6)
    def store(v: Vectors, key: Any, value: Any, dim: Any, keys: Any, values: Any, slot: Any) -> None:
        b = v.b

        def shrink(number: ir.Value) -> ir.Value:
            return b.fptrunc(number, F16) if half else number

        with v.loop(dim) as d:
            offset = b.mul(d, I64(4))
            at = b.mul(b.add(b.mul(d, I64(PAGE)), slot), I64(size))
            v.store(shrink(v.load(v.address(key, offset), F32, 4)), v.address(keys, at), size)
            at = b.mul(b.add(b.mul(slot, dim), d), I64(size))
            v.store(shrink(v.load(v.address(value, offset), F32, 4)), v.address(values, at), size)

    return store


def _finish(queries: int) -> Any:
    """Build the kernel (state, dim, out, out_stride) that divides the outputs by their sums of weights."""

    @kernel(4)
    def finish(v: Vectors, state: Any, dim: Any, out: Any, out_stride: Any) -> None:
        b = v.b
        outputs = v.address(state, queries * (128 + 4 * PAGE))
        for t in range(queries):
            total = v.splat(v.total(v.floats(v.address(state, 64 * (queries + t)))))
            with v.loop(b.lshr(dim, I64(4))) as i:
                offset = b.mul(i, I64(64))
                row = v.address(outputs, b.add(b.mul(dim, I64(4 * t)), offset))
                place = v.address(out, b.add(b.mul(out_stride, I64(t)), offset))
                v.store(b.fdiv(v.floats(row), total), place, 4)

    return finish


def _begin(queries: int) -> Any:
    """Build the kernel (state, dim) that sets the state for queries that have seen no position."""

    @kernel(2)
    def begin(v: Vectors, state: Any, dim: Any) -> None:
        b = v.b
        for t in range(queries):
            v.store(v.constant(NEVER), v.address(state, 64 * t), 4)
            v.store(v.constant(0.0), v.address(state, 64 * (queries + t)), 4)
        outputs = v.address(state, queries * (128 + 4 * PAGE))
        with v.loop(b.mul(b.lshr(dim, I64(4)), I64(queries))) as i:
            v.store(v.constant(0.0), v.address(outputs, b.mul(i, I64(64))), 4)

    return begin


ATTEND = {(queries, half): _attend(queries, half) for queries in QUERIES for half in (False, True)}
BEGIN = {queries: _begin(queries) for queries in QUERIES}
FINISH = {queries: _finish(queries) for queries in QUERIES}
STORE = {half: _store(half) for half in (False, True)}
