"""The compiled kernels, against numpy and scipy in float64 and against arithmetic on the packed integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
from numba import cfunc, types
from numpy.typing import NDArray

from tercet import host, simd
from tercet.engine.cpu import rows
from tercet.engine.cpu.native import function
from tercet.engine.cpu.pack import allocate
from tercet.engine.cpu.table import GROUP4, GROUP8

Array = NDArray[Any]
TOKENS = 20


def compiled(name: str) -> Callable[..., None]:
    """Return the function ``name`` of `programs`, to be called from Python with integers."""
    from tercet.engine.cpu import programs

    count = getattr(programs, name).__code__.co_argcount
    return function(name, count)


def aligned(values: Array) -> Array:
    """Copy an array to an address that is a multiple of 64, as packed weights are."""
    memory = allocate(values.nbytes)[: values.nbytes]
    memory[:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return memory.view(values.dtype).reshape(values.shape)


def at(array: Array) -> int:
    return int(array.ctypes.data)


# Functions of one vector


@simd.kernel(3)
def _apply(v: simd.Vectors, which: Any, x: Any, out: Any) -> None:
    b, value = v.b, v.floats(x)
    tanh = b.icmp_signed("!=", which, simd.I64(0))
    v.store(b.select(tanh, v.tanh(value), v.exp(value)), out, 4)


@simd.kernel(5)
def _dot(v: simd.Vectors, unsigned: Any, signed: Any, sums: Any, native: Any, portable: Any) -> None:
    words = [v.load(place, simd.INTEGERS, 4) for place in (unsigned, signed, sums)]
    for place, vnni in ((native, True), (portable, False)):
        v.store(v.dot4(words[2], words[0], words[1], vnni), place, 4)


@pytest.fixture(scope="module")
def functions() -> dict[str, Callable[..., None]]:
    """Compile functions for these tests alone, as one program, which takes less time than several."""

    def apply(
        which: int, x: int, weight: int, vectors: int, size: int, eps: int, out: int, extra: int, more: int
    ) -> None:
        if which < 2:
            for i in range(vectors):
                _apply(which, x + 64 * i, out + 64 * i)
        elif which == 2:
            rms_norm(x, weight, vectors, size, eps, out)
        elif which == 3:
            soft_cap(x, vectors, eps)
        else:
            for i in range(vectors):
                _dot(x + 64 * i, weight + 64 * i, extra + 64 * i, out + 64 * i, more + 64 * i)

    rms_norm, soft_cap = rows.rms_norm, rows.soft_cap
    call = cfunc(types.void(*[types.int64] * 9))(apply).ctypes

    def over(which: int) -> Callable[[Array], Array]:
        def run(x: Array) -> Array:
            whole = np.resize(np.asarray(x, np.float32), -(-len(x) // 16) * 16)
            out = np.zeros_like(whole)
            call(which, at(whole), 0, len(whole) // 16, 0, 0, at(out), 0, 0)
            return out[: len(x)]

        return run

    def rms(x: Array, weight: Array, size: int, eps: float) -> Array:
        out = np.zeros_like(x)
        call(2, at(x), at(weight), len(x) // 16, size, host.bits(eps), at(out), 0, 0)
        return out

    def capped(x: Array, cap: float) -> Array:
        out = x.copy()
        call(3, at(out), 0, len(x) // 16, 0, host.bits(cap), 0, 0, 0)
        return out

    def dots(unsigned: Array, signed: Array, sums: Array) -> tuple[Array, Array]:
        native, portable = np.zeros_like(sums), np.zeros_like(sums)
        arguments = (at(unsigned), at(signed), len(sums) // 16, 0, 0, at(native), at(sums), at(portable))
        call(4, *arguments)
        return native, portable

    return {"exp": over(0), "tanh": over(1), "rms_norm": rms, "soft_cap": capped, "dot4": dots}


def test_exp_is_within_three_units_in_the_last_place(functions: dict[str, Any]) -> None:
    x = np.linspace(-87, 88, 400_001).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    unit = np.spacing(expected.astype(np.float32)).astype(np.float64)
    assert (np.abs(functions["exp"](x) - expected) / unit).max() < 3


def test_exp_at_its_edges(functions: dict[str, Any]) -> None:
    below = np.nextafter(np.float32(-87), np.float32(-1000))
    x = np.array([0, -0.0, below, -1e30, -np.inf, 88, 89, 1e30, np.inf, np.nan], np.float32)
    result = functions["exp"](x)
    assert result[:2].tolist() == [1, 1]  # the weight of attention's largest score
    assert result[2:5].tolist() == [
        0,
        0,
        0,
    ]  # exactly 0: the weight of a position that attention does not see
    assert (result[5:9] == result[5]).all() and result[5] == pytest.approx(
        np.exp(88.0), rel=1e-6
    )  # never inf
    assert np.isnan(result[9])  # a broken model must not be hidden


def test_tanh_and_soft_cap(functions: dict[str, Any]) -> None:
    x = np.linspace(-50, 50, 200_000).astype(np.float32)
    result = functions["tanh"](x)
    assert np.abs(result - np.tanh(x.astype(np.float64))).max() < 3e-7
    assert result.min() == -1 and result.max() == 1 and functions["tanh"](np.zeros(1))[0] == 0
    assert np.isnan(functions["tanh"](np.array([np.nan]))[0])
    for cap in (2.0, 30.0):
        expected = cap * np.tanh(x.astype(np.float64) / cap)
        np.testing.assert_allclose(functions["soft_cap"](x, cap), expected, rtol=0, atol=4e-7 * cap)


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * scipy.special.expit(x),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_activations(name: str) -> None:
    x = np.concatenate(
        [np.linspace(-12, 12, 20_000), [0, -0.0, 1e-30, -1e-30, 200, -200, 1e4, -1e4, 3e9, -3e9]]
    )
    x = np.resize(x, len(x) + -len(x) % 16).astype(np.float32)
    up = np.random.default_rng(0).standard_normal(len(x)).astype(np.float32)
    expected = REFERENCES[name](x.astype(np.float64))
    gated, plain = np.zeros_like(x), np.zeros_like(x)
    gate, activate = compiled(f"gated_{name}"), compiled(f"ungated_{name}")
    for place in range(0, 4 * len(x), 64):
        gate(at(x) + place, at(up) + place, at(gated) + place)
        activate(at(x) + place, 0, at(plain) + place)
    bound = 4e-7 * np.abs(x.astype(np.float64)) + 1e-30
    assert (np.abs(plain - expected) <= bound).all()
    np.testing.assert_array_equal(gated, plain * up)


def test_rms_norm_does_not_count_padding(functions: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for size, scale, eps in (
        (64, 1.0, 1e-6),
        (33, 1.0, 1e-5),
        (1, 3.0, 1e-6),
        (576, 1e-4, 1e-6),
        (100, 1e8, 1e-6),
    ):
        width = size + -size % 64
        x, weight = np.zeros(width, np.float32), np.zeros(width, np.float32)
        x[:size], weight[:size] = rng.standard_normal(size) * scale, rng.standard_normal(size)
        exact = x[:size].astype(np.float64)
        expected = exact / np.sqrt(np.mean(exact**2) + eps) * weight[:size]
        result = functions["rms_norm"](x, weight, size, eps)
        np.testing.assert_allclose(result[:size], expected, rtol=2e-6)
        assert not result[size:].any()
    nothing = functions["rms_norm"](np.zeros(64, np.float32), np.ones(64, np.float32), 64, 1e-6)
    assert not nothing.any()


def test_layer_norm() -> None:
    from tercet.engine.cpu.rows import layer_norm

    rng = np.random.default_rng(0)
    for size in (1, 33, 64, 768):
        x = (rng.standard_normal(size) * 2 + 5).astype(np.float32)
        weight, bias = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
        out = np.full(size, np.nan, np.float32)
        layer_norm(x, weight, bias, size, np.float32(1e-5), out)
        exact = x.astype(np.float64)
        expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5) * weight + bias
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


# Whole numbers


def _bytes(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Return unsigned and signed bytes, one half extremes and one half random."""
    unsigned, signed = rng.integers(0, 256, count), rng.integers(-128, 128, count)
    half = count // 2
    unsigned[:half] = rng.choice([0, 255], half)
    signed[:half] = rng.choice([-128, 127], half)
    return unsigned.astype(np.uint8), signed.astype(np.int8)


def test_both_ways_of_multiplying_bytes_give_the_same_integers(functions: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    unsigned, signed = _bytes(rng, 4 * 16 * 1000)
    sums = rng.integers(-(2**30), 2**30, 16 * 1000).astype(np.int32)
    products = unsigned.astype(np.int64) * signed
    expected = sums + products.reshape(-1, 4).sum(-1)
    native, portable = functions["dot4"](unsigned, signed, sums)
    np.testing.assert_array_equal(portable, expected)
    np.testing.assert_array_equal(native, expected)  # where the machine has no such instruction, portable too


@pytest.mark.parametrize(("name", "group"), [("quantize_int8", 64), ("quantize_int4", GROUP4)])
def test_quantized_activations(name: str, group: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, group)).astype(np.float32)
    x[1] = 0
    x[2] = 1e-35  # too small for the inverse of its scale
    x[3], x[3, -1] = 0, -1e30
    x[4] = np.linspace(-127, 127, group).round()  # whole numbers stay exact
    x[5, 7] = 4000  # an outlier: the others are rounded to a few steps
    x[6] = np.resize([127, 0.5, 1.5, 2.5, -0.5, -1.5], group)  # ties, to even
    q = np.full(x.shape, 99, np.int8)
    scales, zeros = np.full(12, np.nan, np.float32), np.zeros(12, np.int32)
    compiled(name)(at(x), 12, at(q), at(scales), at(zeros))
    exact, highest = x.astype(np.float64), np.abs(x).max(-1).astype(np.float64)
    np.testing.assert_allclose(scales, highest / 127, rtol=2e-7)
    assert (np.abs(q.astype(int)) <= 127).all()
    steps = scales[:, None].astype(np.float64)
    usual = highest > 1e-30
    assert (np.abs(q * steps - exact) <= 0.5001 * steps)[usual].all()
    assert not q[~usual].any() and (scales[~usual] <= 1e-30).all()
    np.testing.assert_array_equal(q[4], x[4])
    np.testing.assert_array_equal(q[6, :6], [127, 0, 2, 2, 0, -2])
    sums = q.sum(-1, dtype=np.int64)
    if name == "quantize_int8":  # takes the 128 off that unsigned weights have too much
        np.testing.assert_array_equal(zeros, -128 * sums)
    else:
        np.testing.assert_array_equal(zeros.view(np.float32), sums.astype(np.float32) * scales)


# Products


class Block:
    """16 rows of random weights, packed for the kernels, and their values in float64."""

    def __init__(self, kind: str, columns: int, seed: int, scale: float | None = None) -> None:
        """scale: of every group; then all sums are exact, whatever their order. None: random."""
        rng = np.random.default_rng(seed)
        self.kind, self.columns = kind, columns
        self.group = {"int8": GROUP8, "int4": GROUP4}.get(kind, columns)
        groups = columns // self.group
        self.x = rng.standard_normal((TOKENS, columns)).astype(np.float32)
        self.scales = np.zeros(1, np.uint16)
        self.q = np.zeros((TOKENS, columns), np.int8)
        self.q_scales = np.zeros((TOKENS, groups), np.float32)
        self.q_zeros = np.zeros((TOKENS, groups), np.int32)
        if kind in ("float32", "bfloat16"):
            w = rng.standard_normal((16, columns)).astype(np.float32)
            if kind == "bfloat16":
                w = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
            stored = np.ascontiguousarray(w.T)  # [K, 16]
            if kind == "bfloat16":
                stored = (stored.view(np.uint32) >> 16).astype(np.uint16)
            self.weights, self.w, self.inputs = (
                aligned(stored),
                w.astype(np.float64),
                self.x.astype(np.float64),
            )
            return
        _, self.q = _bytes(rng, TOKENS * columns)
        self.q = self.q.reshape(TOKENS, columns)
        by_group = self.q.reshape(TOKENS, groups, self.group)
        sizes = np.full((TOKENS, groups), scale) if scale else rng.uniform(0.001, 0.1, (TOKENS, groups))
        self.q_scales = sizes.astype(np.float32)
        self.inputs = (by_group * self.q_scales[..., None].astype(np.float64)).reshape(TOKENS, columns)
        sums = by_group.sum(-1, dtype=np.int32)

        def bfloats(low: float, high: float) -> Array:
            values = rng.uniform(low, high, (groups, 16)).astype(np.float32)
            return (values.view(np.uint32) >> 16).astype(np.uint16)

        def value(raw: Array) -> Array:
            """[groups, 16] bfloat16 as float64 [16, K]."""
            return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64).T.repeat(self.group, 1)

        steps = bfloats(scale, scale) if scale else bfloats(0.001, 0.1)
        if kind == "int8":
            u, _ = _bytes(rng, 16 * columns)
            u = u.reshape(16, columns)
            self.weights = aligned(u.reshape(16, columns // 4, 4).transpose(1, 0, 2))  # [K / 4, 16, 4]
            self.scales, self.q_zeros = aligned(steps), -128 * sums
            self.w = (u.astype(np.float64) - 128) * value(steps)
        else:
            u = rng.integers(0, 16, (16, columns)).astype(np.uint8)
            packed = np.zeros((columns // 8, 16, 4), np.uint8)
            for k in range(columns):  # two weights in a byte, four apart, the lower nibble first
                packed[k // 8, :, k % 4] |= u[:, k] << (4 if k % 8 >= 4 else 0)
            offsets = bfloats(-8 * scale, -8 * scale) if scale else bfloats(-1.0, 1.0)
            self.weights, self.scales = (
                aligned(packed),
                aligned(np.stack([steps, offsets], 1)),
            )  # [groups, 2, 16]
            self.q_zeros = (sums * self.q_scales).astype(np.float32)
            self.w = u * value(steps) + value(offsets)

    def times(self, first: int, count: int, portable: bool = False) -> Array:
        """The product of tokens first.. by the kernel [count, 16]; checks that nothing else is written."""
        out = np.full((count + 1, 24), np.float32(7))
        row = 4 * self.q_scales.shape[1] * first
        compiled(f"product_{self.kind}{'_portable' if portable else ''}")(
            at(self.weights), at(self.scales), self.columns, at(self.x) + 4 * self.columns * first, 4 * self.columns,
            at(self.q) + self.columns * first, at(self.q_scales) + row, at(self.q_zeros) + row, count, at(out), 96,
        )  # fmt: skip
        assert (out[count] == 7).all() and (out[:, 16:] == 7).all()
        return out[:count, :16]


KINDS = [
    ("float32", False), ("bfloat16", False), ("int8", False), ("int8", True), ("int4", False), ("int4", True),
]  # fmt: skip
COLUMNS = {
    "float32": (2, 50, 64, 576),
    "bfloat16": (2, 50, 64, 576),
    "int8": (64, 192, 576),
    "int4": (64, 192, 576),
}


@pytest.mark.parametrize(("kind", "portable"), KINDS)
def test_products(kind: str, portable: bool) -> None:
    for columns in COLUMNS[kind]:
        block = Block(kind, columns, seed=columns)
        result = block.times(0, TOKENS, portable)
        size = np.abs(block.inputs) @ np.abs(block.w).T  # rounding is measured by this, as sums cancel
        assert (np.abs(result - block.inputs @ block.w.T) <= 1e-6 * size + 1e-30).all()
        for count in range(1, TOKENS + 1):  # the same bits whatever else is computed
            np.testing.assert_array_equal(block.times(0, count, portable), result[:count])
            np.testing.assert_array_equal(block.times(TOKENS - count, 1, portable)[0], result[TOKENS - count])


@pytest.mark.parametrize(("kind", "portable"), [case for case in KINDS if case[0] in ("int8", "int4")])
def test_integer_products_are_exact_where_scales_are(kind: str, portable: bool) -> None:
    for columns in (64, 576):
        block = Block(kind, columns, seed=1, scale=0.25)
        np.testing.assert_array_equal(block.times(0, TOKENS, portable), block.inputs @ block.w.T)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.skipif(not host.has_vnni(), reason="this machine adds byte products the portable way only")
def test_the_portable_product_has_the_same_bits(kind: str) -> None:
    block = Block(kind, 576, seed=2)
    np.testing.assert_array_equal(block.times(0, TOKENS), block.times(0, TOKENS, portable=True))
