"""Functions that a step calls by address: products for each form of weights, gates, attention.

Each is compiled by itself when a model first needs it, and stored on disk (`native`). They are written out,
not generated, because `native` compiles functions with a fixed number of arguments, all integers: the
kernels below can be called from compiled code only.
"""

from __future__ import annotations

from tercet.engine.cpu import attention, rows, tiles

float32_product, bfloat16_product = tiles.float32_product, tiles.bfloat16_product
int8_product, int8_portable_product = tiles.int8_product, tiles.int8_portable_product
int4_product, int4_portable_product = tiles.int4_product, tiles.int4_portable_product
attend1, attend1_half = attention.ATTEND[1, False], attention.ATTEND[1, True]
attend4, attend4_half = attention.ATTEND[4, False], attention.ATTEND[4, True]
store_as_float, store_as_half = attention.STORE[False], attention.STORE[True]
quantize8, quantize4 = rows.quantize8, rows.quantize4
gate_silu, gate_gelu, gate_gelu_tanh, gate_relu = (rows.GATES[name, True] for name in rows.ACTIVATIONS)
plain_silu, plain_gelu, plain_gelu_tanh, plain_relu = (rows.GATES[name, False] for name in rows.ACTIVATIONS)

# The arguments of products: w, s weights and their scales; k columns; x, j float32 rows and their stride;
# q, a, z quantised rows, their scales and zeros; n tokens; o, p outputs and their stride (see `tiles`).


def product_float32(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    """Multiply by a block of float32 weights."""
    float32_product(w, s, k, x, j, q, a, z, n, o, p)


def product_bfloat16(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    """Multiply by a block of bfloat16 weights."""
    bfloat16_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int8(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    """Multiply by a block of int8 weights."""
    int8_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int8_portable(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    """Multiply by a block of int8 weights, without special instructions."""
    int8_portable_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int4(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    """Multiply by a block of int4 weights."""
    int4_product(w, s, k, x, j, q, a, z, n, o, p)


def product_int4_portable(
    w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
) -> None:
    """Multiply by a block of int4 weights, without special instructions."""
    int4_portable_product(w, s, k, x, j, q, a, z, n, o, p)


# x a row; n groups; q, a, z quantised values, scales and zeros (see `rows`).


def quantize_int8(x: int, n: int, q: int, a: int, z: int) -> None:
    """Quantise a row of activations for int8 weights."""
    quantize8(x, n, q, a, z)


def quantize_int4(x: int, n: int, q: int, a: int, z: int) -> None:
    """Quantise a row of activations for int4 weights."""
    quantize4(x, n, q, a, z)


# q, j queries and their stride; k, v a page's keys and values; d size of a head; n visible positions of the first
# query, p more for each further query, w window; c soft cap; s state (see `attention`).


def attend_one(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    """Attend for one query over a float32 page."""
    attend1(q, j, k, v, d, n, p, w, c, s)


def attend_four(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    """Attend for four queries over a float32 page."""
    attend4(q, j, k, v, d, n, p, w, c, s)


def attend_one_half(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    """Attend for one query over a float16 page."""
    attend1_half(q, j, k, v, d, n, p, w, c, s)


def attend_four_half(q: int, j: int, k: int, v: int, d: int, n: int, p: int, w: int, c: int, s: int) -> None:
    """Attend for four queries over a float16 page."""
    attend4_half(q, j, k, v, d, n, p, w, c, s)


# k, v a key and a value; d size of a head; a, b a page's keys and values; s slot in the page.


def store_float(k: int, v: int, d: int, a: int, b: int, s: int) -> None:
    """Store a key and a value in a float32 page."""
    store_as_float(k, v, d, a, b, s)


def store_half(k: int, v: int, d: int, a: int, b: int, s: int) -> None:
    """Store a key and a value in a float16 page."""
    store_as_half(k, v, d, a, b, s)


# g, u, o addresses of 16 values: gate, up (unused where there is no gate), output.


def gated_silu(g: int, u: int, o: int) -> None:
    """Apply SiLU to the gate and multiply by up."""
    gate_silu(g, u, o)


def gated_gelu(g: int, u: int, o: int) -> None:
    """Apply GELU to the gate and multiply by up."""
    gate_gelu(g, u, o)


def gated_gelu_tanh(g: int, u: int, o: int) -> None:
    """Apply GELU by tanh to the gate and multiply by up."""
    gate_gelu_tanh(g, u, o)


def gated_relu(g: int, u: int, o: int) -> None:
    """Apply ReLU to the gate and multiply by up."""
    gate_relu(g, u, o)


def ungated_silu(g: int, u: int, o: int) -> None:
    """Apply SiLU to the gate alone."""
    plain_silu(g, u, o)


def ungated_gelu(g: int, u: int, o: int) -> None:
    """Apply GELU to the gate alone."""
    plain_gelu(g, u, o)


def ungated_gelu_tanh(g: int, u: int, o: int) -> None:
    """Apply GELU by tanh to the gate alone."""
    plain_gelu_tanh(g, u, o)


def ungated_relu(g: int, u: int, o: int) -> None:
    """Apply ReLU to the gate alone."""
    plain_relu(g, u, o)
