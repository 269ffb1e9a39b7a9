"""Quantising into GGUF's blocks, checked by the `gguf` package and, where it is installed, by llama.cpp's quantiser."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as plain_quantize

from tercet.model.block_quantization import TYPES, quantize, type_bytes

SIMPLE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# The squared error per squared value of bell-shaped weights with some extremes: about 4 times less for each bit.
LIMITS = {
    "Q8_0": 5e-5, "Q4_0": 1.2e-2, "Q4_1": 8e-3, "Q5_0": 3e-3, "Q5_1": 2e-3, "Q4_K": 8e-3, "Q5_K": 2e-3, "Q6_K": 6e-4
}  # fmt: skip


def matrix(rows: int = 16, columns: int = 512) -> Any:
    return (0.03 * np.random.default_rng(1).standard_t(6, (rows, columns))).astype(np.float32)


def restored(blocks: Any, kind: str) -> Any:
    return dequantize(blocks, GGMLQuantizationType[kind])


def error(values: Any, blocks: Any, kind: str, importance: Any = 1.0) -> float:
    """Return the weighted squared error of blocks, relative to the values."""
    difference = restored(blocks, kind).astype(np.float64) - values
    return float((importance * difference**2).sum() / (importance * values.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("kind", TYPES)
def test_error_is_that_of_the_type(kind: str) -> None:
    values = matrix()
    blocks = quantize(values, kind)
    count, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert blocks.dtype == np.uint8
    assert blocks.shape == (16, 512 // count * size) == (16, type_bytes(kind, 512))
    assert 0.4 * LIMITS[kind] < error(values, blocks, kind) < LIMITS[kind]


@pytest.mark.parametrize("kind", SIMPLE)
def test_error_is_below_that_of_the_plain_range(kind: str) -> None:
    values = matrix()
    plain = plain_quantize(values, GGMLQuantizationType[kind])
    assert error(values, quantize(values, kind), kind) < 0.93 * error(values, plain, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_importance_moves_the_error_to_columns_of_little_weight(kind: str) -> None:
    values = matrix()
    importance = np.where(np.arange(512) % 8 == 3, 100, 1).astype(np.float32)
    weighted, alike = quantize(values, kind, importance), quantize(values, kind)
    assert error(values, weighted, kind, importance) < 0.9 * error(values, alike, kind, importance)
    assert error(values, weighted, kind) > error(values, alike, kind)
    np.testing.assert_array_equal(quantize(values, kind, np.full(512, 7, np.float32)), alike)
    np.testing.assert_array_equal(quantize(values, kind, np.zeros(512, np.float32)), alike)


@pytest.mark.parametrize("kind", SIMPLE)
def test_values_of_the_type_are_kept(kind: str) -> None:
    stored = restored(plain_quantize(matrix(), GGMLQuantizationType[kind]), kind)
    assert error(stored, quantize(stored, kind), kind) < 1e-8


@pytest.mark.parametrize("kind", TYPES)
def test_extreme_groups_stay_finite(kind: str) -> None:
    values = np.zeros((6, 256), np.float32)
    values[1] = 3.0
    values[2] = -3.0
    values[3, 5] = 60000
    values[4] = 1e-9
    values[5] = np.linspace(5, 6, 256)
    result = restored(quantize(values, kind), kind)
    assert np.isfinite(result).all()
    assert (result[0] == 0).all()
    np.testing.assert_allclose(result[[1, 2, 5]], values[[1, 2, 5]], atol=0.25)
    assert abs(result[3, 5] - 60000) < 1000
    assert np.abs(result[4]).max() < 1e-7


def test_rows_do_not_depend_on_each_other() -> None:
    values = matrix(1100, 256)  # more than a thread's share
    np.testing.assert_array_equal(quantize(values, "Q4_1")[1050:], quantize(values[1050:], "Q4_1"))
    np.testing.assert_array_equal(quantize(values.T.copy().T, "Q4_1"), quantize(values, "Q4_1"))


def test_wrong_input_is_refused() -> None:
    values = matrix(2, 320)
    with pytest.raises(ValueError, match="320 weights can't be stored as Q4_K, whose blocks have 256"):
        quantize(values, "Q4_K")
    with pytest.raises(ValueError, match="unknown type 'Q9'"):
        type_bytes("Q9", 32)
    for bad in (np.nan, np.inf, -np.inf, 1e6):
        values[1, 7] = bad
        with pytest.raises(ValueError, match="finite"):
            quantize(values, "Q8_0")
    for importance in (np.ones(7), -np.ones(320), np.full(320, np.nan)):
        with pytest.raises(ValueError, match="importance"):
            quantize(matrix(2, 320), "Q8_0", importance.astype(np.float32))
    assert quantize(np.zeros((0, 320), np.float32), "Q8_0").shape == (0, 340)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_error_is_at_most_llama_cpps(kind: str, weighted: bool) -> None:
    specification = importlib.util.find_spec("llama_cpp")
    if specification is None or specification.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    libraries = sorted((Path(specification.origin).parent / "lib").glob("libggml-base.*"))
    if not libraries:
        pytest.skip("this llama-cpp-python has no libggml-base")
    quantize_chunk = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    values = matrix(64)
    importance = np.random.default_rng(2).lognormal(0, 1.5, 512).astype(np.float32) if weighted else None
    theirs = np.empty((64, type_bytes(kind, 512)), np.uint8)
    address = None if importance is None else importance.ctypes.data
    quantize_chunk(GGMLQuantizationType[kind], values.ctypes.data, theirs.ctypes.data, 0, 64, 512, address)
    weights = 1.0 if importance is None else importance
    assert error(values, quantize(values, kind, importance), kind, weights) <= error(
        values, theirs, kind, weights
    )


def test_two_compilations_and_any_number_of_threads_give_the_same_bytes(tmp_path: Path) -> None:
    """Each process compiles the searches anew; a cached packed model must not depend on which one wrote it."""
    program = (
        "import hashlib, sys\n"
        "import numpy as np\n"
        "from tercet.model import block_quantization as blocks\n"
        "blocks.allowed_cores = lambda: range(int(sys.argv[1]))\n"
        "blocks.VALUES_AT_ONCE = 4096\n"
        "rng = np.random.default_rng(0)\n"
        "values = (rng.standard_normal((64, 256)) / 20).astype(np.float32)\n"
        "importance = rng.gamma(0.5, 1, 256).astype(np.float32)\n"
        "for type in ('Q8_0', 'Q5_1'):\n"
        "    print(type, hashlib.sha256(blocks.quantize(values, type, importance)).hexdigest())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, threads],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "4")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 2
