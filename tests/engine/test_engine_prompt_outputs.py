"""The log-probabilities of a prompt's tokens, and the scheduling of the feeds that compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine import prompt_outputs
from tercet.engine.engine import Engine
from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer
from tiny_checkpoints import Make

MakeEngine = Callable[..., Engine]
TEXTS = [
    "The quick brown fox",
    "Grüße aus 日本語 🦊🐈",
    "a",
    "Once upon a time there was a small model. " * 3,
]


def random_prompts(count: int, longest: int, vocab: int = 61, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@torch.no_grad()
def log_softmax(model: Any, tokens: Sequence[int]) -> np.ndarray:
    logprobs: np.ndarray = model(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1).numpy()
    return logprobs


def with_tokenizer(directory: Path, tokenizer: Tokenizer) -> Path:
    """Add a tokenizer: a tiny checkpoint has none."""
    tokenizer.save(directory)
    return directory


# Log-probabilities of prompts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("device", ["kernels", "torch", "transformers"])
def test_each_token_has_the_log_softmax_of_transformers(
    make: Make, byte_level: Tokenizer, family: str, device: str
) -> None:
    model, directory = make(family, vocab_size=300)
    engine = any_engine(with_tokenizer(directory, byte_level), device)
    prompts = random_prompts(9, 40, 300)
    for prompt, entries in zip(prompts, engine.prompt_logprobs(prompts, 3), strict=True):
        assert len(entries) == len(prompt) and entries[0] is None
        expected = log_softmax(model, prompt)
        for place, entry in enumerate(entries[1:], 1):
            assert entry is not None and entry.token_id == prompt[place]
            row = expected[place - 1]
            assert entry.logprob == pytest.approx(row[prompt[place]], abs=1e-4)
            assert [token for token, _, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
            for token, _, logprob in entry.top:
                assert logprob == pytest.approx(row[token], abs=1e-4)


def any_engine(directory: Path, device: str) -> Engine:
    if device == "kernels":
        return load_engine(directory, quantize="none", device="cpu")
    if device == "transformers":
        from tercet.engine.load import load_transformers_engine

        return load_transformers_engine(directory)
    from tercet.engine.torch_backend import TorchBackend
    from tercet.model.loading import load_model

    tokenizer = Tokenizer.load(directory)
    return Engine(TorchBackend(load_model(directory)), tokenizer, [])


def test_the_log_probabilities_are_those_of_score(make_engine: MakeEngine, byte_level: Tokenizer) -> None:
    engine = make_engine()
    prompts = [byte_level.encode(text) for text in TEXTS if len(text) > 1]
    scores = engine.score(
        [(byte_level.decode(prompt[:1]), byte_level.decode(prompt[1:])) for prompt in prompts]
    )
    for prompt, score, entries in zip(prompts, scores, engine.prompt_logprobs(prompts, 1), strict=True):
        if score.tokens == prompt[1:]:
            assert [entry.logprob for entry in entries[1:] if entry] == pytest.approx(
                score.token_logprobs, abs=1e-5
            )
        assert score.is_greedy == all(entry.top[0][0] == entry.token_id for entry in entries[1:] if entry)


def test_a_generated_text_has_the_log_probabilities_of_its_generation(
    make: Make, byte_level: Tokenizer
) -> None:
    """Bit for bit on the CPU: the same tokens, texts, bytes, numbers and alternatives."""
    _, directory = make("qwen3", vocab_size=300)
    engine = load_engine(with_tokenizer(directory, byte_level), device="cpu")
    prompt = tuple(byte_level.encode("The quick"))
    [written] = engine.generate(
        [Request(prompt, Sampling(max_tokens=20, seed=1, logprobs=4, ignore_eos=True))]
    )
    [read] = engine.prompt_logprobs([[*prompt, *written.tokens]], 4)
    assert read[len(prompt) :] == written.logprobs


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_bytes_joined_give_the_text(
    make_engine: MakeEngine, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    engine = make_engine(tokenizer)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        pieces = engine.token_pieces(tokens)
        assert b"".join(data for _, data in pieces).decode() == text
        [entries] = engine.prompt_logprobs([tokens])
        assert [(entry.token, entry.bytes) for entry in entries[1:] if entry] == pieces[1:]
        assert all(entry.top == [] for entry in entries[1:] if entry)


def test_prompts_that_cannot_be_read_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert engine.prompt_logprobs([]) == []
    assert engine.prompt_logprobs([[5]], 2) == [[None]]
    assert len(engine.prompt_logprobs([[5] * 129])[0]) == 129  # the last token is not fed
    with pytest.raises(UserError, match="has 130 tokens; the model takes at most 129"):
        engine.prompt_logprobs([[5] * 130])
    with pytest.raises(UserError, match="prompt 2 is empty"):
        engine.prompt_logprobs([[5], []])
    with pytest.raises(UserError, match="has token 300"):
        engine.prompt_logprobs([[5, 300]])
    with pytest.raises(UserError, match="`top` is -1"):
        engine.prompt_logprobs([[5]], -1)
    with pytest.raises(UserError, match="has 41 tokens to be read; the cache holds 40"):
        make_engine(room=40).prompt_logprobs([[5] * 42])


def test_logits_that_are_not_finite_are_an_error_and_stay_out_of_the_cache(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    engine = Engine(backend, byte_level, [])
    backend.broken = {(5, 6, 7)}
    with pytest.raises(UserError, match="not finite"):
        engine.prompt_logprobs([[5, 6, 7, 8, 9, 10]])
    assert engine.pool.available == backend.num_pages
    backend.broken = set()
    assert len(engine.prompt_logprobs([[5, 6, 7, 8]])[0]) == 4


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=9),
    st.sampled_from([1, 3, 20, 64]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([12, 40]),
    st.integers(0, 9),
)
def test_reading_between_the_turns_of_requests_changes_nothing(
    byte_level: Tokenizer, prompts: list[list[int]], max_tokens: int, chunks: int, pages: int, turns: int
) -> None:
    """For any size of calls and cache: requests may be preempted, and end as if they ran alone."""
    sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
    requests = [Request((*range(10, 30), number), sampling) for number in range(3)]
    vocab = byte_level.vocab_size
    alone = Engine(FakeBackend(vocab, num_pages=200), byte_level, [])
    expected = [completion.tokens for completion in alone.generate(requests)]

    backend = FakeBackend(vocab, num_pages=pages, max_tokens=max_tokens, max_chunks=chunks)
    engine = Engine(backend, byte_level, [])
    handles = [engine.submit(request) for request in requests]
    deltas = [delta for _ in range(turns) for delta in engine.step()]
    results = engine.prompt_logprobs(prompts, 1)
    for prompt, entries in zip(prompts, results, strict=True):
        for place, entry in enumerate(entries[1:], 1):
            row = backend.logits(prompt[:place]).astype(np.float64)
            assert entry is not None
            assert entry.logprob == pytest.approx(row[prompt[place]] - np.log(np.exp(row).sum()), abs=1e-6)
            assert entry.top[0][0] == row.argmax()
    while engine.has_work:
        deltas += engine.step()
    ended = {delta.index: delta.completion.tokens for delta in deltas if delta.completion}
    assert [ended[handle] for handle in handles] == expected
    assert engine.pool.available == backend.num_pages


def test_few_logits_are_in_memory_at_once(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    prompts = random_prompts(5, 60, 300)
    expected = engine.prompt_logprobs(prompts, 2)
    monkeypatch.setattr(prompt_outputs, "LOGIT_VALUES", 7 * 300)
    rows: list[int] = []
    feed = engine.backend.feed
    monkeypatch.setattr(
        engine.backend, "feed", lambda chunks: rows.append(len(logits := feed(chunks))) or logits
    )
    for entries, expected_entries in zip(engine.prompt_logprobs(prompts, 2), expected, strict=True):
        logprobs = [
            [token.logprob for token in tokens[1:] if token] for tokens in (entries, expected_entries)
        ]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)
    assert max(rows) <= 7


def test_a_prompt_that_was_read_is_cached_for_the_next_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = list(range(20, 61))
    engine.prompt_logprobs([prompt])
    fed: list[int] = []
    feed = engine.backend.feed

    def counting(chunks: Any) -> Any:
        fed.append(sum(len(chunk.tokens) for chunk in chunks))
        return feed(chunks)

    engine.backend.feed = counting  # type: ignore[method-assign]
    engine.generate([Request(tuple(prompt), Sampling(max_tokens=1))])
    assert fed == [1], "40 of 41 tokens are in full pages of 4"


def test_scoring_does_not_wait_for_a_request_that_runs(byte_level: Tokenizer) -> None:
    """The pages that a request has begun are not finished before scoring ends."""
    engine = Engine(FakeBackend(byte_level.vocab_size, max_tokens=8), byte_level, [])
    text = "The quick brown fox jumps over the lazy dog. Once upon a time"
    [alone] = engine.score([(text, " there")])
    engine = Engine(FakeBackend(byte_level.vocab_size, max_tokens=8), byte_level, [])
    engine.submit(Request(tuple(byte_level.encode(text + " there was")), Sampling(max_tokens=3)))
    engine.step()
    assert engine.score([(text, " there")]) == [alone]
    while engine.has_work:
        engine.step()
