"""The compiled kernels, against numpy and scipy in float64 and against arithmetic on the packed integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import scipy.special
from numba import cfunc, types
from numpy.typing import NDArray

from tercet import host, simd
from tercet.engine.cpu import block_tiles, rows
from tercet.engine.cpu.backend import FLOAT_NAMES
from tercet.engine.cpu.formats import FORMATS, repack
from tercet.engine.cpu.instructions import INSTRUCTIONS, Instructions, available
from tercet.engine.cpu.native import function
from tercet.engine.cpu.pack import allocate
from tercet.engine.cpu.table import GROUP

Array = NDArray[Any]
TOKENS = 20


def compiled(name: str) -> Callable[..., None]:
    """Return the function ``name`` of `programs`, to be called from Python with integers."""
    from tercet.engine.cpu import programs

    return function(name, programs.program(name).__code__.co_argcount)


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


@pytest.fixture(scope="module")
def functions() -> dict[str, Callable[..., None]]:
    """Compile functions for these tests alone, as one program, which takes less time than several."""

    def apply(which: int, x: int, weight: int, vectors: int, size: int, eps: int, out: int) -> None:
        if which < 2:
            for i in range(vectors):
                _apply(which, x + 64 * i, out + 64 * i)
        elif which == 2:
            rms_norm(x, weight, vectors, size, eps, out)
        else:
            soft_cap(x, vectors, eps)

    rms_norm, soft_cap = rows.rms_norm, rows.soft_cap
    call = cfunc(types.void(*[types.int64] * 7))(apply).ctypes

    def over(which: int) -> Callable[[Array], Array]:
        def run(x: Array) -> Array:
            whole = np.resize(np.asarray(x, np.float32), -(-len(x) // 16) * 16)
            out = np.zeros_like(whole)
            call(which, at(whole), 0, len(whole) // 16, 0, 0, at(out))
            return out[: len(x)]

        return run

    def rms(x: Array, weight: Array, size: int, eps: float) -> Array:
        out = np.zeros_like(x)
        call(2, at(x), at(weight), len(x) // 16, size, host.bits(eps), at(out))
        return out

    def capped(x: Array, cap: float) -> Array:
        out = x.copy()
        call(3, at(out), 0, len(x) // 16, 0, host.bits(cap), 0)
        return out

    return {"exp": over(0), "tanh": over(1), "rms_norm": rms, "soft_cap": capped}


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


# Activations


def test_quantized_activations() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, GROUP)).astype(np.float32)
    x[1] = 0
    x[2] = 1e-35  # too small for the inverse of its scale
    x[3], x[3, -1] = 0, -1e30
    x[4] = np.linspace(-127, 127, GROUP).round()  # whole numbers stay exact
    x[5, 7] = 4000  # an outlier: the others are rounded to a few steps
    x[6] = np.resize([127, 0.5, 1.5, 2.5, -0.5, -1.5], GROUP)  # ties, to even
    q, scales, sums = quantized(x)
    scales = scales[:, 0]
    exact, highest = x.astype(np.float64), np.abs(x).max(-1).astype(np.float64)
    np.testing.assert_allclose(scales, highest / 127, rtol=2e-7)
    assert (np.abs(q.astype(int)) <= 127).all()
    steps = scales[:, None].astype(np.float64)
    usual = highest > 1e-30
    assert (np.abs(q * steps - exact) <= 0.5001 * steps)[usual].all()
    assert not q[~usual].any() and (scales[~usual] <= 1e-30).all()
    np.testing.assert_array_equal(q[4], x[4])
    np.testing.assert_array_equal(q[6, :6], [127, 0, 2, 2, 0, -2])
    np.testing.assert_array_equal(sums, q.reshape(12, 2, 16).sum(-1, dtype=np.int32))
    planes, fine, wide_sums = quantized(x, wide=True)
    values = whole(planes)
    np.testing.assert_allclose(fine[usual, 0], highest[usual] / (127 * 255), rtol=2e-7)
    assert (np.abs(planes.astype(int)) <= 127).all() and values.max() == 127 * 255
    fine_steps = fine.astype(np.float64)
    assert (np.abs(values * fine_steps - exact) <= 0.51 * fine_steps + 1e-7 * highest[:, None])[usual].all()
    np.testing.assert_array_equal(wide_sums, values.reshape(12, 2, 16).sum(-1))


def whole(planes: Array) -> Array:
    """Return the values of 16 bits that two rows of bytes hold, [rows, 2, K] to [rows, K]."""
    wide: Array = planes[:, 0].astype(np.int64) * 255 + planes[:, 1]
    return wide


def quantized(x: Array, wide: bool = False) -> tuple[Array, Array, Array]:
    """Return rows of activations as the kernel quantises them: values, scales and sums."""
    rows, columns = x.shape
    q = np.full((rows, 2, columns) if wide else x.shape, 99, np.int8)
    scales, sums = (
        np.full((rows, columns // GROUP), np.nan, np.float32),
        np.zeros((rows, columns // 16), np.int32),
    )
    for row in range(rows):
        compiled("quantize_wide" if wide else "quantize")(
            at(x[row]), columns // GROUP, at(q[row]), at(scales[row]), at(sums[row])
        )
    return q, scales, sums


# Products


TYPES = ["F32", "BF16", "F16", *FORMATS]
COLUMNS = {"F32": (2, 50, 576), "BF16": (2, 50, 576), "F16": (2, 50, 576)}
WAYS = [way for way in INSTRUCTIONS if available(way)]


def random_rows(type_name: str, columns: int, seed: int, scale: float | None = None) -> Array:
    """Return the bytes of 16 rows of a file: extremes and random numbers, with usual scales or just one."""
    rng = np.random.default_rng(seed)
    if type_name in ("F32", "F16"):
        values = rng.standard_normal((16, columns)).astype(np.float32 if type_name == "F32" else np.float16)
        values[0, 0] = 6e-8  # a subnormal float16
        return values.view(np.uint8)
    if type_name == "BF16":
        words = rng.standard_normal((16, columns)).astype(np.float32).view(np.uint32) >> 16
        return words.astype(np.uint16).view(np.uint8)
    form = FORMATS[type_name]
    blocks = rng.integers(0, 256, (16, columns // form.block, form.block_bytes)).astype(np.uint8)
    blocks[:8] = rng.choice(np.array([0, 127, 128, 255], np.uint8), blocks[:8].shape)
    for place in {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(
        type_name, (0, 2) if form.minimum else (0,)
    ):
        factors = (
            rng.uniform(-0.1, 0.1, blocks.shape[:2]) if scale is None else np.full(blocks.shape[:2], scale)
        )
        blocks[..., place : place + 2] = factors.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(16, -1)


class Block:
    """16 rows of weights, packed for the kernels, and their values by the gguf package in float64."""

    def __init__(
        self, type_name: str, columns: int, seed: int, scale: float | None = None, wide: bool = False
    ) -> None:
        """scale: of every group; then all sums are exact, whatever their order. None: random."""
        rng = np.random.default_rng(seed)
        self.wide = wide
        raw = random_rows(type_name, columns, seed, scale)
        self.type, self.columns = type_name, columns
        self.w = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name]).astype(np.float64)
        weights, scales = repack(type_name, raw)
        self.weights, self.scales = (
            aligned(weights),
            aligned(scales if scales.size else np.zeros(1, np.uint8)),
        )
        self.x = rng.standard_normal((TOKENS, columns)).astype(np.float32)
        self.inputs = self.x.astype(np.float64)
        if type_name in FORMATS:
            self.q, self.q_scales, self.q_sums = quantized(self.x, wide)
            self.q[::2] = rng.choice([-127, 0, 127], self.q[::2].shape)  # the largest sums
            values = whole(self.q) if wide else self.q.astype(np.int64)
            self.q_sums[:] = values.reshape(TOKENS, -1, 16).sum(-1)
            if scale is not None:
                self.q_scales[:] = scale
            groups = values.reshape(TOKENS, -1, GROUP) * self.q_scales[..., None].astype(np.float64)
            self.inputs = groups.reshape(TOKENS, columns)
        else:
            self.q = self.q_scales = self.q_sums = np.zeros((TOKENS, columns), np.int8)

    def times(self, first: int, count: int, way: Instructions) -> Array:
        """The product of tokens first.. by the kernel [count, 16]; checks that nothing else is written."""
        out = np.full((count + 1, 24), np.float32(7))
        name = f"product_{FLOAT_NAMES.get(self.type, self.type)}"
        name += f"_{way}{'_wide' if self.wide else ''}" if self.type in FORMATS else ""
        compiled(name)(
            at(self.weights), at(self.scales), self.columns, at(self.x[first:]), 4 * self.columns,
            at(self.q[first:]), at(self.q_scales[first:]), at(self.q_sums[first:]), count, at(out), 96,
        )  # fmt: skip
        assert (out[count] == 7).all() and (out[:, 16:] == 7).all()
        return out[:count, :16]


@pytest.mark.parametrize(("type_name", "wide"), [(x, False) for x in TYPES] + [(x, True) for x in FORMATS])
def test_products(type_name: str, wide: bool) -> None:
    for columns in COLUMNS.get(type_name, (256, 768)):
        block = Block(type_name, columns, seed=columns, wide=wide)
        for way in WAYS:
            result = block.times(0, TOKENS, way)
            size = np.abs(block.inputs) @ np.abs(block.w).T  # rounding is measured by this, as sums cancel
            assert (np.abs(result - block.inputs @ block.w.T) <= 1e-6 * size + 1e-30).all()
            for count in range(1, TOKENS + 1):  # the same bits whatever else is computed
                np.testing.assert_array_equal(block.times(0, count, way), result[:count])
                np.testing.assert_array_equal(block.times(TOKENS - count, 1, way)[0], result[TOKENS - count])


@pytest.mark.parametrize("type_name", FORMATS)
def test_integer_products_are_exact_where_scales_are_and_equal_by_all_instructions(type_name: str) -> None:
    block = Block(type_name, 512, seed=1, scale=0.25)
    expected = block.inputs @ block.w.T
    if not FORMATS[type_name].nested:  # multiples of 1/16 below 2**20
        for way in WAYS:
            np.testing.assert_array_equal(block.times(0, TOKENS, way), expected)
    for wide in (False, True):
        block = Block(type_name, 768, seed=2, wide=wide)
        for way in WAYS[1:]:
            np.testing.assert_array_equal(block.times(0, TOKENS, way), block.times(0, TOKENS, WAYS[0]))


@pytest.mark.parametrize("type_name", TYPES)
def test_a_row_is_read_as_the_file_has_it(type_name: str) -> None:
    block = Block(type_name, 512, seed=3)
    name = FLOAT_NAMES.get(type_name, type_name)
    for row in range(16):
        out = np.full(520, np.float32(7))
        compiled(f"row_{name}")(at(block.weights), at(block.scales), 512, row, at(out))
        np.testing.assert_array_equal(out[:512], block.w[row].astype(np.float32))
        assert (out[512:] == 7).all()


def test_float16_without_its_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """All finite float16 are widened exactly by integer instructions, too."""
    with monkeypatch.context() as patch:
        patch.setattr(simd, "has_half", lambda: False)

        @simd.kernel(2)
        def widen(v: simd.Vectors, x: Any, out: Any) -> None:
            v.store(v.halves(x), out, 4)

        def each(x: int, out: int, count: int) -> None:
            for i in range(count):
                widen(x + 32 * i, out + 64 * i)

        call = cfunc(types.void(*[types.int64] * 3))(each).ctypes
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    out = np.zeros(len(halves), np.float32)
    call(at(halves), at(out), len(halves) // 16)
    np.testing.assert_array_equal(out.view(np.uint32), halves.astype(np.float32).view(np.uint32))


@pytest.mark.skipif(host.has_vnni(), reason="this machine has the instruction itself")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_1", "Q6_K"])
def test_the_product_of_other_processors_with_its_instruction_spelled_out(
    type_name: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What surrounds the instruction is right on machines that lack it, too: offsets, zeros, order."""
    call = simd.Vectors.call

    def spelled_out(v: simd.Vectors, name: str, result: Any, *arguments: Any) -> Any:
        if name != "llvm.x86.avx512.vpdpbusd.512":
            return call(v, name, result, *arguments)
        sums, unsigned, signed = arguments
        for byte in range(4):
            up, down = v.integers(24 - 8 * byte), v.integers(24)
            left = v.b.lshr(v.b.shl(unsigned, up), down)
            sums = v.b.add(sums, v.b.mul(left, v.b.ashr(v.b.shl(signed, up), down)))
        return sums

    monkeypatch.setattr(simd.Vectors, "call", spelled_out)
    product = block_tiles.PRODUCTS[type_name, "vnni", wide]

    def multiply(w: int, s: int, k: int, q: int, scales: int, sums: int, tokens: int, out: int) -> None:
        product(w, s, k, 0, 0, q, scales, sums, tokens, out, 64)

    block = Block(type_name, 256, seed=4, wide=wide)
    out = np.zeros((TOKENS, 16), np.float32)
    cfunc(types.void(*[types.int64] * 8))(multiply).ctypes(
        at(block.weights), at(block.scales), 256, at(block.q), at(block.q_scales), at(block.q_sums), TOKENS, at(out)
    )  # fmt: skip
    np.testing.assert_array_equal(out, block.times(0, TOKENS, WAYS[0]))
