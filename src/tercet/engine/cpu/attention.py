"""Attention over one page of keys and values, with a running softmax.

A page holds PAGE positions of one head: keys [D, PAGE] (so that 16 scores are one vector) and values
[PAGE, D]. Pages are visited in order; after each, the largest score, the sum of exponentials and the
weighted values so far are brought to the new maximum (Milakov and Gimelshein 2018,
arXiv:1805.02867). Every query does the same arithmetic whatever tile it is in: positions it does
not see weigh exactly 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tercet.engine.cpu.table import PAGE, QUERIES
from tercet.simd import F16, F32, I32, I64, INTEGERS, LANES, VECTOR, Vectors, kernel

VECTORS = PAGE // LANES
NEVER = -1e30  # below every score


def _attend(queries: int, half: bool) -> Any:
    """(q, q stride, keys, values, head dim, seen, step, window, cap, state).

    q: float32, scaled. ``seen``: how many of the page's positions the first query sees (may be above
    PAGE); each further one sees ``step`` more. Only the last ``window`` before that are seen.
    cap: bits of the soft cap, 0 for none. ``state`` [queries, 16] maxima, sums, then weights
    [queries, PAGE] and outputs [queries, head dim].
    """
    size = 2 if half else 4

    @kernel(10)
    def attend(
        v: Vectors, q: Any, q_stride: Any, keys: Any, values: Any, dim: Any, seen: Any, step: Any, window: Any,
        cap: Any, state: Any,
    ) -> None:  # fmt: skip
        b = v.b
        load = v.halves if half else v.floats
        rows = [v.address(q, b.mul(q_stride, I64(t))) for t in range(queries)]
        scores = [[v.variable(VECTOR, v.constant(0.0)) for _ in range(VECTORS)] for _ in range(queries)]
        with v.loop(dim) as d:
            at = v.address(keys, b.mul(d, I64(PAGE * size)))
            key = [load(v.address(at, LANES * size * i)) for i in range(VECTORS)]
            for t in range(queries):
                value = v.splat(v.load(v.address(rows[t], b.mul(d, I64(4))), F32, 4))
                for i in range(VECTORS):
                    b.store(v.fma(key[i], value, b.load(scores[t][i])), scores[t][i])
        lanes = ir.Constant(INTEGERS, list(range(LANES)))
        factors = []
        for t in range(queries):
            last = b.add(seen, b.mul(step, I64(t)))
            high, low = v.splat(b.trunc(last, I32)), v.splat(b.trunc(b.sub(last, window), I32))
            found = []
            for i in range(VECTORS):
                score = b.load(scores[t][i])
                with b.if_then(b.icmp_signed("!=", cap, I64(0))):
                    limit = v.number(cap)
                    b.store(b.fmul(limit, v.tanh(b.fdiv(score, limit))), scores[t][i])
                score = b.load(scores[t][i])
                place = b.add(lanes, v.integers(LANES * i))
                visible = b.and_(b.icmp_signed("<", place, high), b.icmp_signed(">=", place, low))
                found.append(b.select(visible, score, v.constant(2 * NEVER)))
            most = found[0]
            for score in found[1:]:
                most = v.largest(most, score)
            before = v.floats(v.address(state, 64 * t))
            after = v.largest(before, v.splat(v.maximum(most)))
            v.store(after, v.address(state, 64 * t), 4)
            factors.append(v.exp(b.fsub(before, after)))
            sums = v.address(state, 64 * (queries + t))
            total = b.fmul(v.floats(sums), factors[t])
            for i in range(VECTORS):
                weight = v.exp(b.fsub(found[i], after))
                total = b.fadd(total, weight)
                v.store(weight, v.address(state, 128 * queries + 4 * (PAGE * t + LANES * i)), 4)
            v.store(total, sums, 4)
        end = b.add(seen, b.mul(step, I64(queries - 1)))
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
    """outputs = outputs * factor + weights times values, for ``width`` vectors from ``first`` on."""
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
    """(key, value, head dim, keys, values, slot): put float32 vectors into a page."""
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
    """(state, head dim, out, out stride): outputs divided by their sums."""

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
    """(state, head dim): nothing seen yet."""

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
