"""The network on the CPU kernels, against transformers and against itself in other batches."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tercet.engine.backend import Chunk
from tercet.engine.cpu import load, native
from tercet.engine.cpu.backend import LOGIT_ROWS, CPUBackend
from tercet.engine.cpu.layout import layout
from tercet.engine.cpu.load import load_cpu_backend
from tercet.engine.cpu.pack import pack, to_bfloat16
from tercet.engine.cpu.pool import Crew
from tercet.engine.cpu.table import PAGE
from tercet.engine.cpu.types import weight_types
from tercet.model.weights import Weights
from tiny_checkpoints import CASES, Make

Logits = NDArray[np.float32]


def ids(count: int, seed: int = 1) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(3, 61, count).tolist()
    return result


def reference(model: Any, tokens: list[int]) -> Logits:
    with torch.no_grad():
        logits: Logits = model(torch.tensor([tokens])).logits[0].float().numpy()
    return logits


def feed(backend: CPUBackend, tokens: list[int], cuts: list[int], pages: list[int] | None = None) -> Logits:
    """Return the logits at every token, fed in parts of the lengths ``cuts`` and the rest at once."""
    pages = pages or list(range(len(tokens) // PAGE + 1))
    result, begin = [], 0
    for size in [*cuts, len(tokens)]:
        part = tokens[begin : begin + size]
        if part:
            result.append(backend.feed([Chunk(0, part, begin, pages, list(range(len(part))))]))
        begin += len(part)
    return np.concatenate(result)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(make: Make, case: str) -> None:
    family, fields = CASES[case]
    model, directory = make(family, **fields)
    tokens = ids(min(30, load_cpu_backend(directory).max_positions))
    # Positions stretched by length depend on the length at hand, as they do in transformers.
    cuts = [] if any(word in case for word in ("dynamic", "longrope")) else [11, 1, 1, 5]
    for threads in (1, 2):
        backend = load_cpu_backend(directory, quantization="none", threads=threads)
        np.testing.assert_allclose(feed(backend, tokens, cuts), reference(model, tokens), atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 70}])
def test_sequences_and_windows_cross_pages(make: Make, fields: dict[str, Any]) -> None:
    model, directory = make("mistral", max_position_embeddings=256, **({"sliding_window": None} | fields))
    tokens = ids(200)
    backend = load_cpu_backend(directory, quantization="none")
    result = feed(backend, tokens, [60, 1, 1, 1, 1, 1, 90], pages=[7, 2, 9, 4])
    np.testing.assert_allclose(result, reference(model, tokens), atol=1e-4)


@pytest.mark.parametrize(("quantization", "bound"), [("bf16", 0.03), ("int8", 0.1), ("int4", 0.9)])
def test_quantised_logits_are_near(make: Make, quantization: Any, bound: float) -> None:
    model, directory = make("llama")
    result = feed(load_cpu_backend(directory, quantization=quantization), ids(30), [])
    error = np.abs(result - reference(model, ids(30))).max()
    assert 0 < error < bound


def mixture(backend: CPUBackend, rows: list[list[int]], seed: int) -> list[Logits]:
    """Return the logits of all rows, fed together in random parts."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(rows) * 2).tolist()
    at, result = [0] * len(rows), [[] for _ in rows]  # type: ignore[var-annotated]
    while any(begin < len(row) for begin, row in zip(at, rows, strict=True)):
        chunks, whose = [], []
        for number, row in enumerate(rows):
            size = min(len(row) - at[number], int(rng.choice([0, 1, 2, 5, 11])))
            if size:
                part = row[at[number] : at[number] + size]
                pages = places[2 * number : 2 * number + 2]
                chunks.append(Chunk(number, part, at[number], pages, list(range(size))))
                whose.append(number)
                at[number] += size
        if chunks:
            logits = backend.feed(chunks)
            for number, chunk in zip(whose, chunks, strict=True):
                result[number].append(logits[: len(chunk.tokens)])
                logits = logits[len(chunk.tokens) :]
    return [np.concatenate(parts) for parts in result]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_neighbours_parts_pages_and_threads_change_no_bit(make: Make, family: str, quantization: Any) -> None:
    _, directory = make(family)
    rows = [ids(30, 5), ids(23, 6), ids(9, 7)]
    alone = load_cpu_backend(directory, quantization=quantization, threads=1)
    expected = [feed(alone, row, []) for row in rows]
    backend = load_cpu_backend(directory, quantization=quantization, threads=2)
    for seed in range(12):  # threads that race do so sometimes only
        for result, alone_logits in zip(mixture(backend, rows, seed), expected, strict=True):
            np.testing.assert_array_equal(result, alone_logits)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_portable_kernels_give_the_same_bits(make: Make, quantization: Any) -> None:
    _, directory = make("qwen3")
    weights = Weights(directory)
    places, memory = pack(weights.config, weight_types(weights.config, quantization, weights), weights)
    both = [
        CPUBackend(weights.config, places, memory, quantization=quantization, portable=portable)
        for portable in (False, True)
    ]
    np.testing.assert_array_equal(*(feed(backend, ids(30), [11]) for backend in both))


def test_log_probabilities_are_the_log_softmax_of_the_logits(make: Make) -> None:
    model, directory = make("llama", max_position_embeddings=256)
    backend = load_cpu_backend(directory, quantization="none")
    rows = [ids(120, 2), ids(30, 3)]
    assert sum(map(len, rows)) > 2 * LOGIT_ROWS
    chunks = [Chunk(n, row, 0, [2 * n, 2 * n + 1], list(range(len(row)))) for n, row in enumerate(rows)]
    targets = [[5, 60] if place % 3 else [7] for place in range(150)]
    values, likeliest = backend.logprobs(chunks, targets)
    logits = np.concatenate([reference(model, row) for row in rows])
    log_softmax = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    flat = [(place, token) for place, tokens in enumerate(targets) for token in tokens]
    np.testing.assert_allclose(values, [log_softmax[place, token] for place, token in flat], atol=1e-4)
    assert likeliest.tolist() == [log_softmax[place].argmax() == token for place, token in flat]


def test_a_sequence_can_be_rewound_and_its_page_copied(make: Make) -> None:
    _, directory = make("llama")
    backend = load_cpu_backend(directory)
    tokens, other = ids(20, 2), ids(12, 3)
    expected = feed(backend, tokens[:8] + other, [])
    feed(backend, tokens, [], pages=[4])
    backend.copy_pages([(4, 6)])
    again = [backend.feed([Chunk(1, other, 8, [page], list(range(12)))]) for page in (4, 6)]
    for result in again:
        np.testing.assert_array_equal(result, expected[8:])


# Packing


def test_bfloat16_rounds_as_torch_does() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x[:3] = (1 + 2**-8, 1 + 3 * 2**-8, 3e38)  # ties, to even
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bfloat16(x), expected)


def test_int8_takes_little_more_than_a_byte_a_weight(make: Make) -> None:
    weights = Weights(make("llama", hidden_size=256, intermediate_size=512, vocab_size=1024)[1])
    types = weight_types(weights.config, "int8", weights)
    assert layout(weights.config, types).size < 1.08 * weights.parameters


def test_packed_weights_are_cached_until_the_checkpoint_changes(
    make: Make, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = make("llama")
    tokens = ids(10)
    expected = feed(load_cpu_backend(directory), tokens, [])
    with monkeypatch.context() as patch:
        patch.setattr(load, "pack", None)
        np.testing.assert_array_equal(feed(load_cpu_backend(directory), tokens, []), expected)
    newest = max((own_caches / "tercet" / "packed").glob("*.bin"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1])
    np.testing.assert_array_equal(feed(load_cpu_backend(directory), tokens, []), expected)
    os.utime(directory / "model.safetensors", ns=(1, 1))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(load, "pack", None)
        load_cpu_backend(directory)


def test_a_cache_that_cannot_be_written_is_reported_and_costs_only_time(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory = make("llama")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert feed(load_cpu_backend(directory), ids(5), []).shape == (5, 61)
    assert "Could not store the quantised weights in" in capsys.readouterr().err


def test_damaged_compiled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "run.o"
    assert native._read(path) is None
    code = b"symbol\nmachine code"
    path.write_bytes(hashlib.sha256(code).hexdigest().encode() + code)
    assert native._read(path) == code
    for broken in (path.read_bytes()[:-1], b"", b"symbol\nmachine code"):
        path.write_bytes(broken)
        assert native._read(path) is None


# Threads


def test_a_thread_that_mostly_waits_is_removed_and_added_again() -> None:
    crew = Crew(2)
    for step in range(20):
        assert crew.choose(step / 100) == 2
        crew.note(0.001, 0.01, step / 100)  # a tenth of the time: two threads are faster than one
    for step in range(20, 30):
        crew.choose(step / 100)
        crew.note(0.007, 0.01, step / 100)
    assert crew.threads == 1 and crew.choose(0.3) == 1
    assert crew.choose(1.0) == 2


def test_idle_threads_use_no_processor_time(make: Make) -> None:
    backend = load_cpu_backend(make("llama")[1], threads=2)
    feed(backend, ids(10), [])
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_a_model_runs_without_torch_and_compiled_code_without_numba(make: Make) -> None:
    _, directory = make("llama")
    feed(load_cpu_backend(directory), ids(5), [])  # compile the kernels first
    program = (
        "import sys; from tercet.engine.backend import Chunk; from tercet.engine.cpu.load import load_cpu_backend; "
        f"load_cpu_backend({str(directory)!r}).feed([Chunk(0, [5, 6], 0, [0], [1])]); "
        "print([name for name in ('torch', 'numba', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_with_threads_of_its_own(make: Make) -> None:
    """torch's data loaders and web servers fork."""
    _, directory = make("llama")
    expected = feed(load_cpu_backend(directory, threads=2), ids(10), [])
    child = os.fork()
    if child == 0:
        same = np.array_equal(feed(load_cpu_backend(directory, threads=2), ids(10), []), expected)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, 9)
    assert ended[1] == 0 and ended[0] == child
