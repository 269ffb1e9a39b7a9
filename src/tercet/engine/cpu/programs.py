"""Functions that a step calls by address: products for each form of weights, gates, attention.

Each is compiled by itself when a model first needs it, and stored on disk (`native`). `native` compiles
functions with a fixed number of arguments, all integers: the kernels themselves can be called from compiled
code only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tercet.engine.cpu import attention, block_tiles, rows, tiles

attend1, attend1_half = attention.ATTEND[1, False], attention.ATTEND[1, True]
attend4, attend4_half = attention.ATTEND[4, False], attention.ATTEND[4, True]
store_as_float, store_as_half = attention.STORE[False], attention.STORE[True]
quantize_row, quantize_row_wide = rows.quantize, rows.quantize_wide
gate_silu, gate_gelu, gate_gelu_tanh, gate_relu = (rows.GATES[name, True] for name in rows.ACTIVATIONS)
plain_silu, plain_gelu, plain_gelu_tanh, plain_relu = (rows.GATES[name, False] for name in rows.ACTIVATIONS)


def _product(kernel: Any) -> Callable[..., None]:
    """Make a function of a product (see `tiles`).

    w, s weights and their scales; k columns; x, j float32 rows and their stride; q, a, z quantised rows,
    their scales and sums; n tokens; o, p outputs and their stride.
    """

    def product(
        w: int, s: int, k: int, x: int, j: int, q: int, a: int, z: int, n: int, o: int, p: int
    ) -> None:
        kernel(w, s, k, x, j, q, a, z, n, o, p)

    return product


def _row(kernel: Any) -> Callable[..., None]:
    """Make a function that reads a row: w, s weights and scales; k columns; r row of the block; o output."""

    def row(w: int, s: int, k: int, r: int, o: int) -> None:
        kernel(w, s, k, r, o)

    return row


FORMS: dict[str, Callable[..., None]] = {
    **{f"product_{kind}": _product(kernel) for kind, kernel in tiles.PRODUCTS.items()},
    **{f"row_{kind}": _row(kernel) for kind, kernel in tiles.ROWS.items()},
    **{
        f"product_{name}_{way}{'_wide' if wide else ''}": _product(kernel)
        for (name, way, wide), kernel in block_tiles.PRODUCTS.items()
    },
    **{f"row_{name}": _row(kernel) for name, kernel in block_tiles.ROWS.items()},
}


def program(name: str) -> Callable[..., None]:
    """Return the function of that name."""
    if name in FORMS:
        function = FORMS[name]
        function.__name__ = function.__qualname__ = (
            name  # the symbol in the object file, which must be unique
        )
        return function
    fixed: Callable[..., None] = globals()[name]
    return fixed


def quantize(x: int, n: int, q: int, a: int, z: int) -> None:
    """Quantise n groups of a row of activations x: values q, scales a, sums z (see `rows`)."""
    quantize_row(x, n, q, a, z)


def quantize_wide(x: int, n: int, q: int, a: int, z: int) -> None:
    """Quantise n groups of a row of activations to 16 bits, in two rows of bytes."""
    quantize_row_wide(x, n, q, a, z)


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
