"""The operations between the matrix products of a training step, each in one pass over memory.

PyTorch runs these as many small operations, each of which reads and writes all its data and waits for all
threads. Here one function does the work in one pass, on one thread, without Python's lock: a step gives each
thread rows of its own (`step.py`).

Activations are float32 or bfloat16 (as uint16, since numpy has no bfloat16); sums, exponentials, norms and the
residual stream are float32. Reductions may be reordered (``reassoc``), so that they run sixteen elements at a
time; the order is fixed at compile time, so a run repeats bit for bit. This requires that a kernel's arrays do
not overlap, which the compiler is promised.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from tercet.train.cpu.compiling import compiled, compiled_without_nan, inlined

LOG2E = np.float32(1.4426950408889634)

# Numbers in memory


@intrinsic
def _widen(context: Any, bits: Any) -> Any:
    """Convert bfloat16 bits to float32, whose upper half they are."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(whole, ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _narrow(context: Any, value: Any) -> Any:
    """Round float32 to bfloat16 bits, to nearest, ties to even; a NaN stays NaN only if its upper half is one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """Return 2 ** exponent as float32, for an integer in [-126, 127]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(arguments[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), codegen


def get(array, place):
    """Return array[place] as float32, from float32 or bfloat16 bits."""


def put(array, place, value):
    """Set array[place] = value, rounded to the array's type."""


@overload(get, inline="always")
def _get(array, place):
    if array.dtype == types.uint16:
        return lambda array, place: _widen(array[place])
    return lambda array, place: array[place]


@overload(put, inline="always")
def _put(array, place, value):
    if array.dtype == types.uint16:

        def bfloat(array, place, value):
            array[place] = _narrow(np.float32(value))

        return bfloat

    def single(array, place, value):
        array[place] = value

    return single


@inlined
def exp(x):
    """Return e ** x within 2 units in the last place, in operations that vectorise; x is clamped to [-87, 87]."""
    x = min(max(x, np.float32(-87.0)), np.float32(87.0))
    scaled = x * LOG2E
    whole = np.float32(math.floor(scaled + np.float32(0.5)))
    # x - whole * ln 2 in two parts, to keep precision; then the Taylor series to degree 6.
    rest = x - whole * np.float32(0.693145751953125)
    rest = rest - whole * np.float32(1.42860682030941723e-6)
    series = np.float32(1.0 / 720)
    series = series * rest + np.float32(1.0 / 120)
    series = series * rest + np.float32(1.0 / 24)
    series = series * rest + np.float32(1.0 / 6)
    series = series * rest + np.float32(0.5)
    series = series * rest + np.float32(1.0)
    series = series * rest + np.float32(1.0)
    return series * _power_of_two(np.int32(whole))


# Norms (RMS, Zhang and Sennrich 2019). stream [N, H] float32, normed [N, H], factors [N] = 1 / rms.


@compiled
def add_and_norm(stream, update, weight, eps, new_stream, normed, factors):
    """Compute new_stream = stream + update, and normed = its norm times weight."""
    rows, width = stream.shape
    for row in range(rows):
        before, change, after, out = stream[row], update[row], new_stream[row], normed[row]
        squares = np.float32(0)
        for i in range(width):
            value = before[i] + get(change, i)
            after[i] = value
            squares += value * value
        factor = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        factors[row] = factor
        for i in range(width):
            put(out, i, after[i] * factor * weight[i])


@compiled
def norm(stream, weight, eps, normed, factors):
    """Compute normed, as `add_and_norm` without an update."""
    rows, width = stream.shape
    for row in range(rows):
        before, out = stream[row], normed[row]
        squares = np.float32(0)
        for i in range(width):
            squares += before[i] * before[i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        factors[row] = factor
        for i in range(width):
            put(out, i, before[i] * factor * weight[i])


@compiled
def norm_backward(stream, weight, factors, d_normed, d_stream, d_weight, narrow):
    """Add the norm's gradients to d_stream [N, H] and d_weight [H]; narrow = d_stream in the activations' type.

    With x the row, f = 1 / rms and g = d_normed * weight: dx = f (g - x f^2 mean(g x)).
    """
    rows, width = stream.shape
    for row in range(rows):
        x, grad, out, small = stream[row], d_normed[row], d_stream[row], narrow[row]
        factor = factors[row]
        along = np.float32(0)
        for i in range(width):
            along += get(grad, i) * weight[i] * x[i]
        pull = along * factor * factor * factor / np.float32(width)
        for i in range(width):
            upstream = get(grad, i)
            d_weight[i] += upstream * x[i] * factor
            value = out[i] + upstream * weight[i] * factor - x[i] * pull
            out[i] = value
            put(small, i, value)


# Heads: rows of queries, keys and values into the attention's layout, normed and rotated, and their gradients back.
# qkv [B * T, (N + 2 K) D]; q [B * K, T * G, D] with G = N / K queries to a key head; k, v [B * K, T, D].


@compiled
def heads(qkv, q_weight, k_weight, normed, eps, cosines, sines, positions, scale, q, k, v, factors):
    """Norm each head (if ``normed``), rotate it by its position, and scale queries by ``scale``.

    ``factors`` [B * T, N + K] gets 1 / rms of each head, for the backward pass.
    """
    batch, time = positions.shape
    kv_heads, dim = k.shape[0] // batch, k.shape[2]
    groups = q.shape[1] // time
    half = dim // 2
    for b in range(batch):
        for t in range(time):
            row = b * time + t
            cos, sin = cosines[positions[b, t]], sines[positions[b, t]]
            for head in range(kv_heads * groups + kv_heads):
                is_query = head < kv_heads * groups
                place = qkv[row, head * dim : (head + 1) * dim]
                weight = q_weight if is_query else k_weight
                factor = np.float32(1)
                if normed:
                    squares = np.float32(0)
                    for i in range(dim):
                        value = get(place, i)
                        squares += value * value
                    factor = np.float32(1) / np.sqrt(squares / np.float32(dim) + eps)
                    factors[row, head] = factor
                if is_query:
                    out = q[b * kv_heads + head // groups, t * groups + head % groups]
                    factor *= scale
                else:
                    out = k[b * kv_heads + head - kv_heads * groups, t]
                for i in range(half):
                    first = get(place, i) * factor * weight[i]
                    second = get(place, i + half) * factor * weight[i + half]
                    put(out, i, first * cos[i] - second * sin[i])
                    put(out, i + half, second * cos[i] + first * sin[i])
            for head in range(kv_heads):
                start = (kv_heads * groups + kv_heads + head) * dim
                for i in range(dim):
                    v[b * kv_heads + head, t, i] = qkv[row, start + i]


@compiled
def heads_backward(
    qkv,
    q_weight,
    k_weight,
    normed,
    cosines,
    sines,
    positions,
    scale,
    factors,
    d_q,
    d_k,
    d_v,
    d_qkv,
    d_q_weight,
    d_k_weight,
):
    """Compute the gradients of `heads` for d_q (activations' type), d_k and d_v (float32).

    d_qkv is set, d_q_weight and d_k_weight are added to.
    """
    batch, time = positions.shape
    kv_heads, dim = d_k.shape[0] // batch, d_k.shape[2]
    groups = d_q.shape[1] // time
    half = dim // 2
    rotated = np.empty(dim, np.float32)
    for b in range(batch):
        for t in range(time):
            row = b * time + t
            cos, sin = cosines[positions[b, t]], sines[positions[b, t]]
            for head in range(kv_heads * groups + kv_heads):
                is_query = head < kv_heads * groups
                place = qkv[row, head * dim : (head + 1) * dim]
                out = d_qkv[row, head * dim : (head + 1) * dim]
                if is_query:
                    grad = d_q[b * kv_heads + head // groups, t * groups + head % groups]
                    for i in range(half):  # the inverse rotation
                        first, second = get(grad, i) * scale, get(grad, i + half) * scale
                        rotated[i] = first * cos[i] + second * sin[i]
                        rotated[i + half] = second * cos[i] - first * sin[i]
                else:
                    exact = d_k[b * kv_heads + head - kv_heads * groups, t]
                    for i in range(half):
                        rotated[i] = exact[i] * cos[i] + exact[i + half] * sin[i]
                        rotated[i + half] = exact[i + half] * cos[i] - exact[i] * sin[i]
                weight = q_weight if is_query else k_weight
                d_weight = d_q_weight if is_query else d_k_weight
                if normed:
                    factor = factors[row, head]
                    along = np.float32(0)
                    for i in range(dim):
                        along += rotated[i] * weight[i] * get(place, i)
                    pull = along * factor * factor * factor / np.float32(dim)
                    for i in range(dim):
                        value = get(place, i)
                        d_weight[i] += rotated[i] * value * factor
                        put(out, i, rotated[i] * weight[i] * factor - value * pull)
                else:
                    for i in range(dim):
                        put(out, i, rotated[i])
            for head in range(kv_heads):
                start = (kv_heads * groups + kv_heads + head) * dim
                out = d_qkv[row, start : start + dim]
                exact = d_v[b * kv_heads + head, t]
                for i in range(dim):
                    put(out, i, exact[i])


# Attention weights of a range of queries. scores [B * K, C * G, S] are those of queries first..first + C - 1 and
# keys start..start + S - 1. The query at t sees keys begins[b, t]..t: itself and what precedes it in its segment.


@compiled_without_nan
def softmax(scores, begins, groups, first, start):
    """Turn scores into weights, in place; keys that a query does not see get 0."""
    heads, rows, keys = scores.shape
    per_row = heads // begins.shape[0]
    numbers = np.empty(keys, np.float32)
    for head in range(heads):
        for row in range(rows):
            place = scores[head, row]
            query = first + row // groups
            begin, seen = begins[head // per_row, query] - start, query - start + 1
            # Index slices from 0: with another start numba checks each index for being negative.
            live, count = place[begin:seen], seen - begin
            largest = np.float32(-3e38)
            for i in range(count):
                largest = max(largest, get(live, i))
            total = np.float32(0)
            for i in range(count):
                value = exp(get(live, i) - largest)
                numbers[i] = value
                total += value
            share = np.float32(1) / total
            for i in range(count):
                put(live, i, numbers[i] * share)
            place[:begin] = 0
            place[seen:] = 0


@compiled
def row_products(left, right, out):
    """Compute out [M, R] = the dot products of the rows of left and right [M, R, D], summed in float32."""
    heads, rows, dim = left.shape
    for head in range(heads):
        for row in range(rows):
            a, b = left[head, row], right[head, row]
            total = np.float32(0)
            for i in range(dim):
                total += get(a, i) * get(b, i)
            out[head, row] = total


@compiled
def softmax_backward(weights, d_weights, along, first):
    """Replace d_weights [B * K, R, S] by the scores' gradient, weights * (d_weights - along).

    ``along`` [B * K, rows of all queries] is `row_products` of the attention's output and its gradient, which
    is the sum of weights * d_weights over a row (Dao et al. 2022, arXiv:2205.14135). ``first`` is the row of
    ``along`` that belongs to row 0.
    """
    heads, rows, keys = weights.shape
    for head in range(heads):
        for row in range(rows):
            shift = along[head, first + row]
            p, dp = weights[head, row], d_weights[head, row]
            for i in range(keys):
                put(dp, i, get(p, i) * (get(dp, i) - shift))


# The gated feed-forward layer. both [N, 2 I]: the gates, then the values.


@compiled
def gate(both, out):
    """Compute out [N, I] = silu(gates) * values (SwiGLU, Shazeer 2020)."""
    rows, inner = out.shape
    for row in range(rows):
        left, right, place = both[row, :inner], both[row, inner:], out[row]
        for i in range(inner):
            g = get(left, i)
            put(place, i, g / (np.float32(1) + exp(-g)) * get(right, i))


@compiled
def gate_backward(both, d_out, d_both):
    """Compute the gradients of `gate`, into d_both [N, 2 I]."""
    rows, inner = d_out.shape
    for row in range(rows):
        left, right, grad = both[row, :inner], both[row, inner:], d_out[row]
        d_left, d_right = d_both[row, :inner], d_both[row, inner:]
        for i in range(inner):
            g, upstream = get(left, i), get(grad, i)
            s = np.float32(1) / (np.float32(1) + exp(-g))
            put(d_right, i, upstream * g * s)
            put(d_left, i, upstream * get(right, i) * s * (np.float32(1) + g * (np.float32(1) - s)))


# The head


@compiled_without_nan
def cross_entropy(logits, targets, scale, z_weight, losses):
    """Compute the losses of logits [N, V], and replace the logits by scale * d(loss + z_weight log(Z)^2)/d(logits).

    ``losses`` [N] gets minus the log-probability of each target (nats), without the z term, which keeps the
    normaliser Z near 1 (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).
    """
    rows, vocabulary = logits.shape
    numbers = np.empty(vocabulary, np.float32)
    for row in range(rows):
        place, target = logits[row], targets[row]
        largest = np.float32(-3e38)
        for i in range(vocabulary):
            largest = max(largest, get(place, i))
        total = np.float32(0)
        for i in range(vocabulary):
            value = exp(get(place, i) - largest)
            numbers[i] = value
            total += value
        log_z = largest + np.float32(math.log(total))
        losses[row] = log_z - get(place, target)
        share = scale * (np.float32(1) + np.float32(2) * z_weight * log_z) / total
        for i in range(vocabulary):
            put(place, i, numbers[i] * share)
        put(place, target, numbers[target] * share - scale)


@compiled
def add_rows(table, ids, rows):
    """Add rows[n] to table[ids[n]] for every n: the gradient of an embedding."""
    count, width = rows.shape
    for row in range(count):
        place, source = table[ids[row]], rows[row]
        for i in range(width):
            place[i] += source[i]
