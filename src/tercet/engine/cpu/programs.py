"""Functions that a step calls by address: products for each form of weights, gates, attention.

Each is compiled by itself when a model first needs it, and kept on disk. They are written out one by
one because numba keeps compiled code for functions of a module, not for closures.
"""

from __future__ import annotations

from tercet.engine.cpu import attention, rows, tiles

float32_product, bfloat16_product = tiles.float32_product, tiles.bfloat16_product
int8_product, int8_portable_product = tiles.int8_product, tiles.int8_portable_product
int4_product, int4_portable_product = tiles.int4_product, tiles.int4_portable_product
one, one_half = attention.ATTEND[1, False], attention.ATTEND[1, True]
four, four_half = attention.ATTEND[4, False], attention.ATTEND[4, True]
as_float, as_half = attention.STORE[False], attention.STORE[True]
quantize8, quantize4 = rows.quantize8, rows.quantize4
gate_silu, gate_gelu, gate_gelu_tanh, gate_relu = (rows.GATES[name, True] for name in rows.ACTIVATIONS)
plain_silu, plain_gelu, plain_gelu_tanh, plain_relu = (rows.GATES[name, False] for name in rows.ACTIVATIONS)


def product_float32(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    float32_product(w, s, k, x, j, q, a, z, n, o, p)


def product_bfloat16(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    bfloat16_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int8(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    int8_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int8_portable(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    int8_portable_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int4(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    int4_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int4_portable(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    int4_portable_product(w, s, k, x, j, q, a, z, n, o, p)


def quantize_int8(x: int, n: int, q: int, a: int, z: int) -> None:
    quantize8(x, n, q, a, z)


def quantize_int4(x: int, n: int, q: int, a: int, z: int) -> None:
    quantize4(x, n, q, a, z)


def attend_one(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    one(q, j, k, v, d, n, p, w, c, s)


def attend_four(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    four(q, j, k, v, d, n, p, w, c, s)


def attend_one_half(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    one_half(q, j, k, v, d, n, p, w, c, s)


def attend_four_half(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    four_half(q, j, k, v, d, n, p, w, c, s)


def store_float(k: int, v: int, d: int, a: int, b: int, s: int) -> None:
    as_float(k, v, d, a, b, s)


def store_half(k: int, v: int, d: int, a: int, b: int, s: int) -> None:
    as_half(k, v, d, a, b, s)


def gated_silu(g: int, u: int, o: int) -> None:
    gate_silu(g, u, o)


def gated_gelu(g: int, u: int, o: int) -> None:
    gate_gelu(g, u, o)


def gated_gelu_tanh(g: int, u: int, o: int) -> None:
    gate_gelu_tanh(g, u, o)


def gated_relu(g: int, u: int, o: int) -> None:
    gate_relu(g, u, o)


def ungated_silu(g: int, u: int, o: int) -> None:
    plain_silu(g, u, o)


def ungated_gelu(g: int, u: int, o: int) -> None:
    plain_gelu(g, u, o)


def ungated_gelu_tanh(g: int, u: int, o: int) -> None:
    plain_gelu_tanh(g, u, o)


def ungated_relu(g: int, u: int, o: int) -> None:
    plain_relu(g, u, o)
