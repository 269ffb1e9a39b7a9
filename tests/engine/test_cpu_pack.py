"""Packing weights: the errors of quantisation, the places of bytes, and the cache of packed models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_backends import at_once
from numpy.typing import NDArray

from tercet.engine.cpu import load as loading
from tercet.engine.cpu import pack
from tercet.engine.cpu.backend import CPUBackend
from tercet.engine.cpu.formats import kind_of, repack, sizes
from tercet.engine.cpu.layout import Layout
from tercet.engine.cpu.load import MAX_CACHED, load_cpu_backend
from tercet.engine.cpu.types import is_rounded, weight_types
from tercet.model.adapter import AdapterConfig, add_lora, load_adapter, merge_lora, save_adapter
from tercet.model.block_quantization import quantize
from tercet.model.loading import load_model
from tercet.model.weights import Weights
from tiny_checkpoints import Make

Floats = NDArray[np.float32]
TOKENS = list(range(3, 40))
ROWS, COLUMNS = 32, 256


def random_weights(seed: int = 0) -> Floats:
    """Return normally distributed rows, as trained weights are, of scales from 1e-4 to 1e2."""
    rng = np.random.default_rng(seed)
    w: Floats = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return w * (10.0 ** rng.integers(-4, 3, (ROWS, 1))).astype(np.float32)


def test_bfloat16_is_rounded_as_by_torch() -> None:
    raw = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = raw.view(np.float32)
    edges = [
        np.inf,
        -np.inf,
        0,
        -0.0,
        3.4028235e38,
        -3.4e38,
        1e-45,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
    ]
    x = np.concatenate([x[~np.isnan(x)], np.array(edges, np.float32)])
    expected = torch.from_numpy(x).bfloat16()
    result = pack.to_bfloat16(x)
    np.testing.assert_array_equal(result, expected.view(torch.uint16).numpy())


# Places


@pytest.mark.parametrize("type_name", ["F32", "BF16", "F16", "Q8_0", "Q4_1", "Q6_K"])
def test_a_matrix_is_the_same_for_any_number_of_rows_packed_at_a_time(
    type_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Layout()
    for name, rows in (("before", 16), ("between", 48), ("after", 16)):
        places.matrix(name, type_name, rows, 256)
    rows = pack.encode(np.concatenate([random_weights(), random_weights(1)])[:48], type_name)
    [place] = places.matrices["between"].matrices
    memories = []
    for count in (16, 4096):
        monkeypatch.setattr(pack, "ROWS_AT_ONCE", count)
        memories.append(pack.allocate(places.size))
        pack.pack_matrix(memories[-1], place, lambda begin, end: rows[begin:end])
    np.testing.assert_array_equal(*memories)
    inside = np.zeros(places.size, bool)
    weights, scales = (slice(at, at + size) for at, size in zip(
        (place.weights, place.scales), sizes(kind_of(type_name), 48, 256), strict=True))  # fmt: skip
    inside[weights] = inside[scales] = True
    assert not memories[0][~inside].any() and memories[0][inside].any()  # nothing in its neighbours' places


def test_memory_begins_as_zeros_at_a_multiple_of_64() -> None:
    for size in (1, 100, 5_000_000):
        memory = pack.allocate(size)
        assert memory.size >= size and not memory.any() and memory.ctypes.data % 64 == 0
        memory[-1] = 1


def test_errors_are_weighted_by_the_importance_of_columns(make: Make) -> None:
    directory = make("llama")[1]
    weights = Weights(directory)
    name, config = "model.layers.0.mlp.down_proj.weight", weights.config
    importance = np.random.default_rng(0).lognormal(0, 2, config.intermediate_size).astype(np.float32)
    types = weight_types(config, "int4", weights)
    memories = []
    for given in (None, {name: importance}):
        places, memory = pack.pack(config, types, weights, importance=given)
        [place] = places.matrices["0.down"].matrices
        memories.append(
            memory[place.weights : place.weights + sizes(kind_of(place.type), place.rows, place.columns)[0]]
        )
    whole = np.zeros((place.rows, place.columns), np.float32)
    whole[: config.hidden_size, : config.intermediate_size] = weights(name)
    padded = np.pad(importance, (0, place.columns - importance.size))
    expected = repack(place.type, quantize(whole, place.type, padded))[0]
    np.testing.assert_array_equal(memories[1], expected)
    assert (memories[0] != memories[1]).any()


def test_importance_is_measured_only_for_weights_that_int4_rounds(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = list[Path]()

    def measure(config: Any, directory: Any, weights: Any, types: Any) -> dict[str, Floats]:
        measured.append(directory)
        return {}

    directory = make("llama")[1]
    weights = Weights(directory)
    config = weights.config
    rounded = weight_types(config, "int4", weights)
    assert is_rounded(config, "model.layers.0.mlp.down_proj.weight", rounded)
    assert not is_rounded(config, "model.layers.0.self_attn.v_proj.weight", rounded)
    assert not is_rounded(config, "model.layers.0.mlp.down_proj.weight", lambda name: "Q4_1")
    monkeypatch.setattr(loading, "_importance", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for quantization in ("int8", "int4", "int4"):
        load_cpu_backend(directory, quantization=quantization)
    assert measured == [directory]


# The cache


def bits(backend: CPUBackend) -> Any:
    return at_once(backend, TOKENS)


def packed(caches: Path) -> list[Path]:
    return sorted((caches / "tercet" / "packed").glob("*.bin"))


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes any later packing an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("packed again")

    return lambda: monkeypatch.setattr(loading, "pack", refuse)


def test_each_quantisation_is_cached_once(make: Make, caches: Path, no_packing: Any) -> None:
    _, directory = make("qwen3")
    result = {
        name: bits(load_cpu_backend(directory, quantization=name))
        for name in ("int8", "int4", "bf16", "none")
    }
    assert len(packed(caches)) == 3  # "none" is read from the checkpoint itself
    no_packing()
    for name in ("int8", "int4", "bf16"):
        np.testing.assert_array_equal(bits(load_cpu_backend(directory, quantization=name)), result[name])
    with pytest.raises(AssertionError, match="packed again"):
        load_cpu_backend(directory, quantization="none")


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "a directory", "left over"])
def test_a_damaged_cache_file_is_not_used(damage: str, make: Make, caches: Path) -> None:
    _, directory = make("llama")
    expected = bits(load_cpu_backend(directory))
    [cached] = packed(caches)
    whole = cached.read_bytes()
    if damage == "left over":  # of a process that was killed while writing
        cached.rename(cached.with_name(f".{cached.name}.0123.tmp"))
    else:
        cached.unlink()
        if damage == "a directory":
            cached.mkdir()
        else:
            cached.write_bytes({"cut": whole[:-1], "longer": whole + b"0", "empty": b""}[damage])
    np.testing.assert_array_equal(bits(load_cpu_backend(directory)), expected)
    if damage != "a directory":
        assert cached.read_bytes() == whole


def test_a_changed_checkpoint_is_packed_again(make: Make, caches: Path) -> None:
    theirs, directory = make("llama")
    before = bits(load_cpu_backend(directory))
    with torch.no_grad():
        theirs.model.embed_tokens.weight *= 2
    theirs.save_pretrained(directory)
    changed = bits(load_cpu_backend(directory))
    assert np.abs(changed - before).max() > 0.1 and len(packed(caches)) == 2
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    assert np.abs(bits(load_cpu_backend(directory)) - changed).max() > 0.01


def test_the_least_recently_used_models_are_deleted(make: Make, caches: Path) -> None:
    directories = [make(family)[1] for family in ("llama", "qwen3", "gpt2", "gemma2", "olmo2")]
    first = packed_after(caches, directories[0], "int8")
    for number in range(MAX_CACHED - 1):
        made = packed_after(caches, directories[1 + number // 2], ("int8", "int4")[number % 2])
        os.utime(made, (1000 + number, 1000 + number))
    os.utime(first, (1, 1))
    load_cpu_backend(directories[0])  # used now
    packed_after(caches, directories[0], "bf16")
    assert len(packed(caches)) == MAX_CACHED
    assert first.exists() and min(file.stat().st_mtime for file in packed(caches)) == 1001


def packed_after(caches: Path, directory: Path, quantization: Any) -> Path:
    before = set(packed(caches))
    load_cpu_backend(directory, quantization=quantization)
    [new] = set(packed(caches)) - before
    return new


def test_a_cache_that_cannot_be_made_is_reported_in_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory = make("llama")
    expected = bits(load_cpu_backend(directory))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    capsys.readouterr()
    np.testing.assert_array_equal(bits(load_cpu_backend(directory)), expected)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(tmp_path / "file") in err and "Not a directory" in err


def test_two_processes_at_once(make: Make, caches: Path) -> None:
    """Both pack, and each reads its own file or the other's, never half of a file."""
    _, directory = make("llama", hidden_size=256, intermediate_size=512, vocab_size=4000)
    program = (
        "import sys, hashlib\n"
        "from tercet.engine.backend import Chunk\n"
        "from tercet.engine.cpu.load import load_cpu_backend\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"backend = load_cpu_backend({str(directory)!r}, threads=1)\n"
        f"print(backend.feed([Chunk(0, {TOKENS!r}, 0, [0], range({len(TOKENS)}))]).tobytes().hex())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    expected = load_cpu_backend(directory, threads=1)
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert out.strip() == bits(expected).tobytes().hex()
    assert len(packed(caches)) == 1


# Adapters


def write_adapter(base: Path, directory: Path, alpha: int = 6) -> None:
    model, config = load_model(base), AdapterConfig(r=4, alpha=alpha, base_model=str(base))
    add_lora(model, config, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    save_adapter(model, directory, config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
@torch.no_grad()
def test_merged_adapters_compute_the_same_as_in_torch(family: str, make: Make, tmp_path: Path) -> None:
    _, base = make(family)
    write_adapter(base, tmp_path / "adapter")
    model = load_model(base, trainable=True)
    load_adapter(model, tmp_path / "adapter")
    merge_lora(model)
    expected = model(torch.tensor([TOKENS]))[0].numpy()
    result = bits(load_cpu_backend(base, tmp_path / "adapter", quantization="none"))
    np.testing.assert_allclose(result, expected, atol=1e-4, rtol=0)
    plain = bits(load_cpu_backend(base, quantization="none"))
    assert np.abs(result - plain).max() > 0.1
    near = bits(load_cpu_backend(base, tmp_path / "adapter", quantization="int8"))
    assert np.abs(near - expected).mean() < 0.2 * np.abs(plain - expected).mean()


def test_base_and_adapters_have_their_own_cache_files(
    make: Make, tmp_path: Path, caches: Path, no_packing: Any
) -> None:
    _, base = make("llama")
    write_adapter(base, tmp_path / "one")
    write_adapter(base, tmp_path / "two", alpha=12)
    adapters = (None, tmp_path / "one", tmp_path / "two")
    result = {adapter: bits(load_cpu_backend(base, adapter)) for adapter in adapters}
    assert len(packed(caches)) == 3
    no_packing()
    for adapter, expected in result.items():
        np.testing.assert_array_equal(bits(load_cpu_backend(base, adapter)), expected)


def test_a_changed_scale_of_an_adapter_is_packed_again(make: Make, tmp_path: Path, caches: Path) -> None:
    _, base = make("llama")
    write_adapter(base, tmp_path / "adapter")
    before = bits(load_cpu_backend(base, tmp_path / "adapter"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 60}))
    assert np.abs(bits(load_cpu_backend(base, tmp_path / "adapter")) - before).max() > 0.1
