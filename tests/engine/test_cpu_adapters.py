"""Adapters beside packed weights: the logits of peft, whatever the rest of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_backends import Logits, at_once, load
from lora import CASES, logits_of, make_adapter

from tercet.engine.backend import Chunk
from tercet.engine.cpu.backend import CPUBackend
from tercet.engine.cpu.load import load_cpu_backend
from tercet.engine.cpu.pool import Crew
from tiny_checkpoints import Make


def ids(count: int, seed: int = 0) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(3, 61, count).tolist()
    return result


@pytest.fixture(autouse=True)
def all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes all threads, however busy the machine is."""
    monkeypatch.setattr(Crew, "note", lambda *_: None)


def feed(
    backend: CPUBackend, tokens: list[int], adapter: int, page: int = 0, cuts: tuple[int, ...] = ()
) -> Logits:
    """Return the logits at every token, fed in parts of the lengths ``cuts`` and the rest at once."""
    result, begin = [], 0
    for size in (*cuts, len(tokens)):
        part = tokens[begin : begin + size]
        if part:
            result.append(backend.feed([Chunk(0, part, begin, [page], range(len(part)), adapter)]))
        begin += len(part)
    return np.concatenate(result)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft_and_of_the_merged_adapter(make: Make, tmp_path: Path, case: str) -> None:
    family, fields, lora = CASES[case]
    theirs, base = make(family, **fields)
    models = [make_adapter(base, tmp_path / name, seed, **lora) for name, seed in (("one", 3), ("other", 4))]
    tokens, plain = ids(40), logits_of(theirs, ids(40))
    before = at_once(load_cpu_backend(base, quantization="none", threads=1), tokens)
    for threads in (1, 2):
        backend = load_cpu_backend(base, quantization="none", threads=threads)
        assert [backend.add_adapter(tmp_path / name) for name in ("one", "other")] == [1, 2]
        for number, (name, model) in enumerate(zip(("one", "other"), models, strict=True), 1):
            expected = logits_of(model, tokens)
            assert np.abs(expected - plain).max() > 0.05
            result = feed(backend, tokens, number, cuts=(11, 1, 1, 2, 9))
            np.testing.assert_allclose(result, expected, atol=1e-4, rtol=0)
            merged = load_cpu_backend(base, tmp_path / name, "none")
            np.testing.assert_allclose(result, at_once(merged, tokens), atol=1e-4, rtol=0)
        np.testing.assert_array_equal(feed(backend, tokens, 0), before)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_other_adapters_in_the_batch_change_no_bit(
    make: Make, tmp_path: Path, family: str, quantization: Any
) -> None:
    """The threads race, sequences are cut at random, and adapters have different ranks and layers."""
    _, base = make(family)
    ends = ["query_key_value", "dense"] if family == "gpt_neox" else ["q_proj", "up_proj", "o_proj"]
    make_adapter(base, tmp_path / "wide", r=20)
    make_adapter(base, tmp_path / "narrow", seed=4, r=1, target_modules=ends)
    alone, both = (load(base, quantization, threads=threads) for threads in (1, 2))
    for backend in (alone, both):
        backend.add_adapter(tmp_path / "wide")
        backend.add_adapter(tmp_path / "narrow")
    rows = [
        (ids(30, 5), 1),
        (ids(30, 5), 0),
        (ids(23, 6), 2),
        (ids(30, 5), 2),
        (ids(9, 7), 1),
        (ids(25, 8), 1),
    ]
    expected = [feed(alone, tokens, adapter) for tokens, adapter in rows]
    rng = np.random.default_rng(0)
    for _ in range(8):
        at, result = [0] * len(rows), [[] for _ in rows]  # type: ignore[var-annotated]
        while any(begin < len(tokens) for begin, (tokens, _) in zip(at, rows, strict=True)):
            chunks, whose = [], []
            for number in rng.permutation(len(rows)).tolist():
                tokens, adapter = rows[number]
                size = min(len(tokens) - at[number], int(rng.choice([0, 1, 2, 5, 11])))
                if size:
                    part = tokens[at[number] : at[number] + size]
                    chunks.append(Chunk(number, part, at[number], [number], range(size), adapter))
                    whose.append(number)
                    at[number] += size
            if chunks:
                logits = both.feed(chunks)
                for number, chunk in zip(whose, chunks, strict=True):
                    result[number].append(logits[: len(chunk.tokens)])
                    logits = logits[len(chunk.tokens) :]
        for parts, alone in zip(result, expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), alone)


def test_an_adapter_beside_quantised_weights_adds_no_error(make: Make, tmp_path: Path) -> None:
    theirs, base = make("llama")
    model = make_adapter(base, tmp_path / "adapter")
    for quantization, bound in (("bf16", 0.05), ("int8", 0.15), ("int4", 1.2)):
        backend = load(base, quantization)  # type: ignore[arg-type]
        backend.add_adapter(tmp_path / "adapter")
        for adapter, reference in ((0, theirs), (1, model)):
            error = np.abs(feed(backend, ids(30), adapter) - logits_of(reference, ids(30))).max()
            assert 0 < error < bound


def test_many_tokens_of_several_adapters_in_one_step(make: Make, tmp_path: Path) -> None:
    """Consecutive rows of one adapter are computed together, with the same result as alone."""
    _, base = make("qwen3", max_position_embeddings=256)
    make_adapter(base, tmp_path / "adapter")
    backend = load(base, threads=2)
    backend.add_adapter(tmp_path / "adapter")
    lengths, adapters = [61, 3, 40, 64, 64, 17, 1], [1, 1, 0, 1, 0, 0, 1]
    rows = [ids(length, seed) for seed, length in enumerate(lengths)]
    chunks = [
        Chunk(n, row, 0, [n], range(len(row)), adapter)
        for n, (row, adapter) in enumerate(zip(rows, adapters, strict=True))
    ]
    together = np.split(backend.feed(chunks), np.cumsum(lengths)[:-1])
    for n, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
        np.testing.assert_array_equal(together[n], feed(backend, row, adapter))
