"""The bench on a backend whose feeds take a known time, against numbers computed by hand."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tercet.engine import bench, memory_traffic
from tercet.engine.bench import Settings
from tercet.engine.memory_traffic import Weights
from tercet.errors import UserError

VOCAB = 50
PER_TOKEN, PER_CALL = 0.01, 0.5  # seconds that a feed takes
SETTINGS = Settings(prompt_tokens=20, new_tokens=5, batch=3, repeat=2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeBackend:
    """Records its chunks, checks the rules of the protocol, and advances the clock."""

    vocab_size, max_positions = VOCAB, 64
    page_size, num_pages = 8, 12
    max_tokens, max_chunks = 16, 2
    name, threads, quantization = "fake", 1, "int8"
    parameters, weight_bytes, weight_bytes_per_token = 1000, 1200, 1000
    cache_bytes_per_token = 10

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: list[list[Any]] = []
        self.held: dict[int, list[int]] = {}

    def feed(self, chunks: Sequence[Any]) -> np.ndarray:
        assert 1 <= len(chunks) <= self.max_chunks
        assert sum(len(chunk.tokens) for chunk in chunks) <= self.max_tokens
        for chunk in chunks:
            held = self.held.setdefault(chunk.sequence, [])
            assert len(held) == chunk.start
            held.extend(chunk.tokens)
            assert len(held) <= len(chunk.pages) * self.page_size
            assert max(chunk.pages) < self.num_pages
            assert all(0 <= token < VOCAB for token in chunk.tokens)
        pages = [page for chunk in chunks for page in chunk.pages]
        assert len(pages) == len(set(pages)), "a page that is written to belongs to one sequence"
        self.calls.append(list(chunks))
        self.clock.now += PER_CALL + PER_TOKEN * sum(len(chunk.tokens) for chunk in chunks)
        return np.zeros((sum(len(chunk.outputs) for chunk in chunks), VOCAB), np.float32)

    def release(self, sequence: int) -> None:
        del self.held[sequence]


class FakeEngine:
    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.prompts: list[tuple[int, ...]] = []

    def generate(self, requests: Sequence[Any]) -> None:
        (request,) = requests
        assert (request.sampling.max_tokens, request.sampling.temperature) == (1, 0)
        self.prompts.append(request.tokens)
        self.backend.clock.now += 7.0


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = Clock()
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    return FakeEngine(FakeBackend(clock))


def test_speeds_are_tokens_over_the_time_that_feeding_took(engine: Any) -> None:
    fed: list[float] = []
    speeds = bench.measure(engine, SETTINGS, fed.append)
    # 60 tokens of prompts in calls of at most 16 tokens; five steps of two calls each.
    prefill = 3 * 20 / (4 * PER_CALL + 60 * PER_TOKEN)
    decode = 3 * 5 / (5 * 2 * PER_CALL + 15 * PER_TOKEN)
    assert speeds.prefill == pytest.approx([prefill, prefill])
    assert speeds.decode == pytest.approx([decode, decode])
    assert speeds.first_token == [7.0, 7.0]
    assert sum(fed) == SETTINGS.work
    assert engine.backend.held == {}, "every sequence is released"


def test_logits_are_requested_only_where_a_token_would_be_sampled(engine: Any) -> None:
    bench.measure(engine, SETTINGS)
    calls = engine.backend.calls[: len(engine.backend.calls) // 3]
    assert [[chunk.outputs for chunk in call] for call in calls[:4]] == [[[]], [[3], []], [[7], []], [[11]]]
    assert all(chunk.outputs == [0] for call in calls[4:] for chunk in call)


def test_no_prompt_repeats_so_that_the_prefix_cache_does_not_help(engine: Any) -> None:
    bench.measure(engine, SETTINGS)
    assert len(set(engine.prompts)) == len(engine.prompts) == 3


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"batch": 0}, "`batch` is 0; it must be at least 1"),
        ({"new_tokens": 0}, "`new_tokens` is 0"),
        ({"prompt_tokens": 60}, "`prompt_tokens` and `new_tokens` are 65 together; the model takes 64"),
        ({"batch": 4}, "`batch` is 4; the cache holds 3 sequences of 25 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine: Any, changes: dict[str, int], part: str) -> None:
    with pytest.raises(UserError) as caught:
        bench.measure(engine, dataclasses.replace(SETTINGS, **changes))
    assert part in str(caught.value)


def test_the_report_relates_speed_to_the_memory_bandwidth(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load", lambda reference, quantize, threads: engine)
    monkeypatch.setattr(bench, "memory_bandwidth", lambda threads: 10_000.0)
    report = bench.bench("runs/mine", dataclasses.replace(SETTINGS, batch=1))
    decode = 5 / (5 * PER_CALL + 5 * PER_TOKEN)
    # Keys and values of positions 20 to 24: a step reads between 21 and 25 of them, 23 on average.
    assert report.fraction_of_limit == pytest.approx(decode * (1000 + 23 * 10) / 10_000)
    assert (report.backend, report.quantization, report.threads) == ("fake", "int8", 1)
    assert (report.parameters, report.weight_bytes) == (1000, 1200)
    assert list(report.to_json()) == [
        "model", "parameters", "quantization", "backend", "threads", "prompt_tokens", "new_tokens", "batch",
        "prefill_tokens_per_second", "prefill_tokens_per_second_min", "prefill_tokens_per_second_median",
        "decode_tokens_per_second", "decode_tokens_per_second_min", "decode_tokens_per_second_median",
        "time_to_first_token", "time_to_first_token_min", "time_to_first_token_median", "load_seconds",
        "peak_memory_bytes", "weight_bytes", "bandwidth_bytes_per_second", "fraction_of_limit",
    ]  # fmt: skip
    assert bench.bench("runs/mine", SETTINGS).fraction_of_limit is None


def test_the_default_prompt_leaves_room_for_the_new_tokens() -> None:
    assert Settings(new_tokens=100).for_model(2048).prompt == 512
    assert Settings(new_tokens=100).for_model(256).prompt == 156
    assert Settings(prompt_tokens=512, new_tokens=100).for_model(256).prompt == 512


def test_a_hosted_model_and_unknown_settings_are_refused() -> None:
    with pytest.raises(UserError, match="openai:small is a hosted model"):
        bench.bench("openai:small")
    with pytest.raises(UserError, match="`quantize` is 'int2'; it must be int8, int4, bf16, none"):
        bench.bench("runs/mine", quantize="int2")
    with pytest.raises(UserError, match="`threads` is 100000; this machine has"):
        bench.bench("runs/mine", threads=100_000)


def test_the_bandwidth_is_plausible_for_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_traffic, "BANDWIDTH_SECONDS", 0.0)
    array = np.ones(1 << 25, np.int64)
    best = min(_seconds(array) for _ in range(3))
    measured = memory_traffic.memory_bandwidth(1)
    # A copy reads and writes, so reading is at least half as fast; and it is not faster than a cache could be.
    assert 0.5 * array.nbytes / best < measured < 1e12


def _seconds(array: np.ndarray) -> float:
    begun = bench.time.perf_counter()
    array.copy()
    return bench.time.perf_counter() - begun


def test_the_threads_are_set_in_loaded_and_in_unloaded_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in bench.THREAD_VARIABLES:
        monkeypatch.setenv(name, "9")
    before = torch.get_num_threads()
    try:
        bench.use_threads(1)
        assert torch.get_num_threads() == 1
        assert {os.environ[name] for name in bench.THREAD_VARIABLES} == {"1"}
        assert bench.threads_of(SimpleNamespace()) == 1
    finally:
        torch.set_num_threads(before)


def test_weights_that_a_token_does_not_need_are_not_read() -> None:
    """Only one row of an embedding is read, unless it is the head too; two of eight experts are used."""
    hidden, vocab = 4, 10

    class Network(torch.nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(vocab, hidden)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden, bias=False) for _ in range(8))
            self.mlp = torch.nn.Module()
            self.mlp.experts = self.experts
            self.head = torch.nn.Linear(hidden, vocab, bias=False)
            if tied:
                self.head.weight = self.embed.weight
            self.config = SimpleNamespace(num_experts=8, experts_per_token=2)

    untied = memory_traffic.weights_of(SimpleNamespace(model=Holder(Network(tied=False))))
    assert untied.parameters == 2 * hidden * vocab + 8 * hidden * hidden
    assert untied.nbytes == 4 * untied.parameters
    assert untied.read == 4 * (hidden * vocab + 2 * hidden * hidden)
    tied = memory_traffic.weights_of(SimpleNamespace(model=Holder(Network(tied=True))))
    assert tied.parameters == hidden * vocab + 8 * hidden * hidden
    assert tied.read == untied.read


class Holder(torch.nn.Module):
    """A network inside another module, as in real models."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config


def test_keys_and_values_outside_of_a_window_are_not_read() -> None:
    config = SimpleNamespace(
        num_layers=2, num_kv_heads=2, head_dim=8, window=lambda layer: 10 if layer == 0 else None
    )
    model = SimpleNamespace(config=config, dtype=torch.bfloat16)
    settings = Settings(prompt_tokens=100, new_tokens=1)
    weights = Weights(0, 0, read=500)
    expected = 500 + (10 + 101) * 2 * 2 * 8 * 2
    assert (
        memory_traffic.bytes_per_token(SimpleNamespace(model=model), weights, settings.mean_length)
        == expected
    )
