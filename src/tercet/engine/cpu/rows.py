"""Operations on a row of activations between matrix products: norm, quantisation, gate, soft cap."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from tercet.engine.cpu import table as at
from tercet.engine.cpu.matrices import floats
from tercet.engine.cpu.table import GROUP
from tercet.simd import F32, I8, I32, I64, INTEGERS, LANES, VECTOR, Vectors, kernel


@kernel(6)
def rms_norm(v: Vectors, x: Any, weight: Any, vectors: Any, size: Any, eps: Any, out: Any) -> None:
    """Emit out = x / sqrt(mean(x**2) + eps) * weight (RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467).

    A row has ``vectors`` vectors of 16 floats, which are zero after the first ``size`` values. ``eps`` is
    passed as the bits of a float32.
    """
    b = v.b
    squares = v.variable(VECTOR, v.constant(0.0))
    with v.loop(vectors) as i:
        value = v.floats(v.address(x, b.mul(i, I64(64))))
        b.store(v.fma(value, value, b.load(squares)), squares)
    mean = b.fdiv(v.total(b.load(squares)), b.sitofp(size, F32))
    root = v.call("llvm.sqrt.f32", F32, b.fadd(mean, b.bitcast(b.trunc(eps, I32), F32)))
    scale = v.splat(b.fdiv(F32(1.0), root))
    with v.loop(vectors) as i:
        offset = b.mul(i, I64(64))
        value = b.fmul(v.floats(v.address(x, offset)), scale)
        v.store(b.fmul(value, v.floats(v.address(weight, offset))), v.address(out, offset), 4)


@njit(fastmath={"reassoc", "nsz", "arcp", "contract"})
def layer_norm(x: Any, weight: Any, bias: Any, size: int, eps: float, out: Any) -> None:
    """Norm one row of ``size`` floats (Ba et al. 2016, arXiv:1607.06450)."""
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
def norm(table: Any, x: int, weight: int, bias: int, out: int) -> None:
    """Apply the model's kind of norm to one row; all arguments but the table are addresses."""
    width = table[at.HIDDEN]
    if table[at.LAYER_NORM]:
        eps = floats(table[at.FLOATS], 3)[2]
        vectors = floats(x, width), floats(weight, width), floats(bias, width)
        layer_norm(*vectors, table[at.HIDDEN_SIZE], eps, floats(out, width))
    else:
        rms_norm(x, weight, width // 16, table[at.HIDDEN_SIZE], table[at.EPS], out)


def _quantize(wide: bool) -> Any:
    """Build the kernel (x, groups, out, scales, sums) that quantises a row to int8.

    Each group of 32 gets a scale, and each 16 values their sum. With ``wide`` the values have 16 bits: 255 times
    a byte of the first row of ``out`` plus a byte of the second.
    """
    steps = 127.0 * (255 if wide else 1)

    @kernel(5)
    def quantize(v: Vectors, x: Any, groups: Any, out: Any, scales: Any, sums: Any) -> None:
        b = v.b
        row_bytes = b.mul(groups, I64(GROUP))
        with v.loop(groups) as group:
            begin = v.address(x, b.mul(group, I64(4 * GROUP)))
            values = [v.floats(v.address(begin, 64 * i)) for i in range(GROUP // LANES)]
            highest = v.absolute(values[0])
            for value in values[1:]:
                highest = v.largest(highest, v.absolute(value))
            top = v.maximum(highest)
            # A group of zeros stays zero; a group too small for a finite inverse becomes zero.
            usable = b.fcmp_ordered(">", top, F32(1e-30))
            inverse = v.splat(b.select(usable, b.fdiv(F32(steps), top), F32(0.0)))
            start = v.address(out, b.mul(group, I64(GROUP)))
            totals = v.address(sums, b.mul(group, I64(8)))
            for i, value in enumerate(values):
                rounded = v.round(b.fmul(value, inverse))
                whole = b.fptosi(rounded, INTEGERS)
                v.store(v.call("llvm.vector.reduce.add.v16i32", I32, whole), v.address(totals, 4 * i), 4)
                if wide:
                    high = b.fptosi(v.round(b.fmul(rounded, v.constant(1 / 255))), INTEGERS)
                    low = b.sub(whole, b.sub(b.shl(high, v.integers(8)), high))
                    place = v.address(v.address(start, LANES * i), row_bytes)
                    v.store(b.trunc(low, ir.VectorType(I8, LANES)), place, 1)
                    whole = high
                v.store(b.trunc(whole, ir.VectorType(I8, LANES)), v.address(start, LANES * i), 1)
            v.store(b.fmul(top, F32(1 / steps)), v.address(scales, b.mul(group, I64(4))), 4)

    return quantize


def _gate(activation: str, gated: bool) -> Any:
    """Build the kernel (gate, up, out) of 16 values: act(gate) * up if ``gated``, otherwise act(gate) alone."""

    @kernel(3)
    def gate(v: Vectors, gate: Any, up: Any, out: Any) -> None:
        value = _activate(v, v.floats(gate), activation)
        v.store(v.b.fmul(value, v.floats(up)) if gated else value, out, 4)

    return gate


def _activate(v: Vectors, x: ir.Value, activation: str) -> ir.Value:
    """Emit an activation function of 16 values."""
    b, unit, half = v.b, v.constant(1.0), v.constant(0.5)
    if activation == "silu":
        return b.fdiv(x, b.fadd(unit, v.exp(b.fneg(x))))
    if activation == "relu":
        return v.largest(x, v.constant(0.0))
    if activation == "gelu_tanh":
        cube = b.fmul(b.fmul(x, x), b.fmul(x, v.constant(0.044715)))
        inner = b.fmul(v.constant(0.7978845608028654), b.fadd(x, cube))
        return b.fmul(b.fmul(half, x), b.fadd(unit, v.tanh(inner)))
    # gelu: x * (1 + erf(x / sqrt 2)) / 2, erf within 1.5e-7 (Abramowitz and Stegun 7.1.26).
    z = b.fmul(v.absolute(x), v.constant(0.7071067811865476))
    t = b.fdiv(unit, v.fma(z, v.constant(0.3275911), unit))
    power = v.constant(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        power = v.fma(power, t, v.constant(factor))
    tail = b.fmul(b.fmul(power, t), v.exp(b.fneg(b.fmul(z, z))))  # 1 - erf(z)
    negative = b.fcmp_ordered("<", x, v.constant(0.0))
    return b.fmul(b.fmul(half, x), b.select(negative, tail, b.fsub(v.constant(2.0), tail)))


quantize, quantize_wide = _quantize(False), _quantize(True)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
GATES = {(name, gated): _gate(name, gated) for name in ACTIVATIONS for gated in (True, False)}


@kernel(3)
def soft_cap(v: Vectors, x: Any, vectors: Any, cap: Any) -> None:
    """Emit x = cap * tanh(x / cap), in place, for ``vectors`` vectors of 16; ``cap`` as bits of a float32."""
    b, limit = v.b, v.number(cap)
    with v.loop(vectors) as i:
        place = v.address(x, b.mul(i, I64(64)))
        v.store(b.fmul(limit, v.tanh(b.fdiv(v.floats(place), limit))), place, 4)
