from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.backend import Chunk
from tercet.engine.engine import Engine
from tercet.engine.request import Completion, Delta, Request, Sampling
from tercet.engine.torch_backend import TorchBackend
from tercet.errors import UserError
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer

Make = Callable[..., Engine]
GREEDY = Sampling(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True)


def prompts(
    count: int, vocab: int = 300, shortest: int = 1, longest: int = 30, seed: int = 0
) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def same(completion: Completion, expected: Completion) -> None:
    assert (completion.tokens, completion.text, completion.finish_reason) == (
        expected.tokens,
        expected.text,
        expected.finish_reason,
    )
    assert (completion.usage, completion.logprobs is None) == (expected.usage, expected.logprobs is None)
    for entry, expected_entry in zip(completion.logprobs or [], expected.logprobs or [], strict=True):
        assert entry.logprob == pytest.approx(expected_entry.logprob, abs=1e-5)
        assert [token[:2] for token in entry.top] == [token[:2] for token in expected_entry.top]


# Against transformers


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def reference_model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 300,
        "bos_token_id": None,
        "eos_token_id": 299,
        "initializer_range": 0.3,
    }
    decoder: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config: Any
    if request.param == "llama":
        config = transformers.LlamaConfig(**common, **decoder)
    elif request.param == "mistral":
        config = transformers.MistralConfig(**common, **decoder, sliding_window=8)
    else:
        config = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_config(config, attn_implementation="eager").eval()


def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    reference_model: Any, tmp_path: Path, byte_level: Tokenizer
) -> None:
    reference_model.save_pretrained(tmp_path)
    engine = Engine(TorchBackend(load_model(tmp_path)), byte_level, [299])
    batch = prompts(6)
    completions = engine.generate([Request(tuple(tokens), GREEDY) for tokens in batch])
    for tokens, completion in zip(batch, completions, strict=True):
        ids = torch.tensor([tokens])
        reference = reference_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            pad_token_id=0,
            suppress_tokens=None,
        )[0]
        generated = reference[len(tokens) :].tolist()
        if (
            299 in completion.tokens
        ):  # transformers forbids the stop token, and this request continues after it
            place = completion.tokens.index(299)
            assert completion.tokens[:place] == generated[:place]
            continue
        assert completion.tokens == generated
        with torch.no_grad():
            logprobs = reference_model(reference[None]).logits[0].log_softmax(-1)
        assert completion.logprobs is not None
        for place, (token, entry) in enumerate(zip(generated, completion.logprobs, strict=True), len(tokens)):
            assert entry.logprob == pytest.approx(float(logprobs[place - 1, token]), abs=2e-4)
            likeliest = logprobs[place - 1].topk(2)
            assert [alternative[0] for alternative in entry.top] == likeliest.indices.tolist()


def test_sampled_tokens_follow_transformers_distribution_step_by_step(
    reference_model: Any, tmp_path: Path, byte_level: Tokenizer
) -> None:
    """Two tokens deep, 4,000 requests in one call: shares equal the exact joint probabilities."""
    reference_model.save_pretrained(tmp_path)
    engine = Engine(TorchBackend(load_model(tmp_path)), byte_level, [])
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 3, "max_tokens": 2}
    requests = [Request((5, 6, 7), Sampling(**sampling, seed=seed)) for seed in range(4000)]
    drawn = [tuple(completion.tokens) for completion in engine.generate(requests)]

    def top3(ids: list[int]) -> dict[int, float]:
        with torch.no_grad():
            values, tokens = (reference_model(torch.tensor([ids])).logits[0, -1] / 0.8).topk(3)
        return dict(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))

    joint = {
        (first, second): p * q
        for first, p in top3([5, 6, 7]).items()
        for second, q in top3([5, 6, 7, first]).items()
    }
    assert set(drawn) <= set(joint)
    for pair, probability in joint.items():
        assert drawn.count(pair) / 4000 == pytest.approx(probability, abs=0.04)


# Batches


samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), ("e", "th"), ("a",)]),
    logprobs=st.sampled_from([None, 3]),
    ignore_eos=st.booleans(),
)
requests = st.builds(Request, st.lists(st.integers(0, 298), min_size=1, max_size=20).map(tuple), samplings)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=7),
    st.sampled_from([80, 120, 10_000]),
    st.integers(1, 5),
    st.sampled_from([[], list(range(10, 50))]),
)
def test_a_request_gets_the_same_alone_and_in_any_batch(
    make_engine: Make, requests: list[Request], room: int, max_batch: int, header: list[int]
) -> None:
    """For any mixture, cache size and batch size, with and without a shared prefix."""
    requests = [Request((*header, *request.tokens), request.sampling) for request in requests]
    engine = make_engine(room=room, max_batch=max_batch)
    for together, request in zip(engine.generate(requests), requests, strict=True):
        same(together, make_engine().generate([request])[0])


@pytest.mark.parametrize("changes", [{"windows": (4, None)}, {"positions": "learned", "qk_norm": "none"}])
def test_sliding_windows_and_learned_positions_batch_too(make_engine: Make, changes: dict[str, Any]) -> None:
    batch = [Request(tuple(tokens), GREEDY) for tokens in prompts(9, longest=117)]
    engine = make_engine(room=400, max_batch=4, **changes)
    for together, request in zip(engine.generate(batch), batch, strict=True):
        same(together, make_engine(**changes).generate([request])[0])


class Recording:
    """A backend that records the shape of every feed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.feeds: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def feed(self, chunks: Sequence[Chunk]) -> Any:
        self.feeds.append([len(chunk.tokens) for chunk in chunks])
        assert all(0 <= page < self.num_pages for chunk in chunks for page in chunk.pages)
        return self.inner.feed(chunks)


def test_finished_requests_end_at_once_and_waiting_ones_are_admitted(make_engine: Make) -> None:
    engine = make_engine(max_batch=4)
    recording = engine.backend = Recording(engine.backend)
    batch = [Request((5 + n,), Sampling(max_tokens=n, temperature=0, ignore_eos=True)) for n in range(1, 7)]
    engine.generate(batch)
    decodes = sum(len(feed) for feed in recording.feeds)
    assert decodes == 1 + 2 + 3 + 4 + 5 + 6, "no row is computed after its last token"
    assert max(map(len, recording.feeds)) <= 4
    # The fifth and sixth follow the first and second: 1 + 5 and 2 + 6 turns beside 3 and 4.
    assert len(recording.feeds) == 8, "waiting requests run beside the running ones, not after them"


def test_the_cache_budget_bounds_every_batch(make_engine: Make) -> None:
    engine = make_engine(room=100)
    recording = engine.backend = Recording(engine.backend)  # asserts the bound at every feed
    batch = [Request(tuple(tokens), GREEDY) for tokens in prompts(20, shortest=8)]
    assert len(engine.generate(batch)) == 20
    assert max(map(len, recording.feeds)) > 1


def test_a_prefix_shared_by_all_prompts_is_fed_once(make_engine: Make) -> None:
    header = prompts(1, shortest=60, longest=60)[0]
    batch = [Request((*header, *tokens), GREEDY) for tokens in prompts(5, shortest=3, longest=9, seed=1)]
    engine = make_engine()
    recording = engine.backend = Recording(engine.backend)
    together = engine.generate(batch)
    # The first request computes all of its prompt; the rest share the full pages of the header, 60 tokens.
    assert len(recording.feeds[0]) == 1 and 63 <= recording.feeds[0][0] <= 69
    assert len(recording.feeds[1]) == 5 and max(recording.feeds[1]) <= 9
    for completion, request in zip(together, batch, strict=True):
        same(completion, make_engine().generate([request])[0])


# Ends of outputs


def test_stop_tokens_end_the_output_and_add_no_text(make_engine: Make, byte_level: Tokenizer) -> None:
    prompt = tuple(byte_level.encode("The quick"))
    free = make_engine().generate([Request(prompt, GREEDY)])[0]
    assert free.finish_reason == "length" and free.usage.completion_tokens == 12 == len(free.tokens)
    stop = free.tokens[4]
    place = free.tokens.index(stop)
    engine = make_engine()
    engine.stop_ids = frozenset([stop])
    ended = engine.generate([Request(prompt, Sampling(temperature=0, max_tokens=12))])[0]
    assert ended.finish_reason == "stop"
    assert ended.tokens == free.tokens[: place + 1]
    assert ended.text == byte_level.decode(free.tokens[:place])
    assert (ended.usage.prompt_tokens, ended.usage.completion_tokens) == (len(prompt), place + 1)
    same(engine.generate([Request(prompt, GREEDY)])[0], free)  # ignore_eos


def test_stop_strings_end_the_output_before_them(make_engine: Make, byte_level: Tokenizer) -> None:
    prompt = tuple(byte_level.encode("The quick"))
    for seed in range(5):
        plain = Sampling(max_tokens=60, temperature=1.5, seed=seed, ignore_eos=True)
        free = make_engine().generate([Request(prompt, plain)])[0]
        stop = free.text[10:13]
        stopping = Sampling(max_tokens=60, temperature=1.5, seed=seed, ignore_eos=True, stop=(stop,))
        ended = make_engine().generate([Request(prompt, stopping)])[0]
        assert ended.text == free.text[: free.text.index(stop)]
        assert ended.finish_reason == "stop"
        assert ended.tokens == free.tokens[: len(ended.tokens)] and len(ended.tokens) < 60


def test_outputs_end_at_the_models_last_position(make_engine: Make) -> None:
    longest = tuple(prompts(1, shortest=128, longest=128)[0])
    for size in (120, 127, 128):
        completion = make_engine().generate(
            [Request(longest[:size], Sampling(max_tokens=500, temperature=0, ignore_eos=True))]
        )[0]
        # The last token is never fed, so it may lie one beyond the last position.
        assert len(completion.tokens) == 128 - size + 1
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "prompt 2 is empty (0 tokens)"),
        ((5,) * 129, "prompt 2 has 129 tokens; the model takes at most 128"),
        ((5, 300), "prompt 2 has token 300, and the model knows 0 to 299"),
        ((-1,), "prompt 2 has token -1"),
    ],
)
def test_an_invalid_prompt_is_refused_before_any_request_runs(
    make_engine: Make, tokens: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError) as problem:
        make_engine().stream([Request((5,), GREEDY), Request(tokens, GREEDY)])
    assert message in str(problem.value)


def test_no_requests_give_no_completions(make_engine: Make) -> None:
    assert make_engine().generate([]) == []


# Streaming


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_deltas_joined_are_the_completion(
    make_engine: Make, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    engine = make_engine(tokenizer, max_batch=3)
    prompt = tuple(tokenizer.encode("Once upon"))
    requests = [
        Request(
            prompt, Sampling(max_tokens=25, temperature=2.0, seed=seed, logprobs=1, stop=("e",) * (seed % 2))
        )
        for seed in range(8)
    ]
    deltas: dict[int, list[Delta]] = {}
    for delta in engine.stream(requests):
        deltas.setdefault(delta.index, []).append(delta)
    assert sorted(deltas) == list(range(8))
    for index, pieces in deltas.items():
        completion = pieces[-1].completion
        assert completion is not None and all(piece.completion is None for piece in pieces[:-1])
        assert all(piece.text for piece in pieces[:-1]), "a delta comes only when there is text to show"
        assert "".join(piece.text for piece in pieces) == completion.text
        assert [token for piece in pieces for token in piece.tokens] == completion.tokens
        assert [entry for piece in pieces for entry in piece.logprobs or []] == completion.logprobs
        assert not (requests[index].sampling.stop and "e" in completion.text)
        if not requests[index].sampling.stop:
            joined = b"".join(entry.bytes for entry in completion.logprobs or [])
            assert joined.decode(errors="replace") == completion.text
            assert tokenizer.decode([*prompt, *completion.tokens]).startswith("Once upon")


class Scripted:
    """A backend that generates a given script after any prompt of one token."""

    max_positions, page_size, num_pages, max_tokens, max_chunks = 128, 16, 8, 64, 8

    def __init__(self, vocab_size: int, script: list[int]) -> None:
        self.vocab_size, self.script = vocab_size, script

    def feed(self, chunks: Sequence[Chunk]) -> Any:
        logits = np.zeros((1, self.vocab_size), dtype=np.float32)
        logits[0, self.script[chunks[0].start]] = 9
        return logits

    def release(self, sequence: int) -> None:
        pass


def scripted(tokenizer: Tokenizer, prompt: int, script: list[int]) -> list[Delta]:
    engine = Engine(Scripted(tokenizer.vocab_size, script), tokenizer, [])  # type: ignore[arg-type]
    sampling = Sampling(temperature=0, max_tokens=len(script), logprobs=0)
    return list(engine.stream([Request((prompt,), sampling)]))


def test_a_leading_space_is_kept_after_text_and_dropped_after_special_tokens(
    sentencepiece: Tokenizer,
) -> None:
    script = sentencepiece.encode("the the fox", special=False)
    word, bos = script[0], sentencepiece.bos_id
    assert bos is not None and len(script) > 2
    for prompt, text in ((bos, "the the fox"), (word, " the the fox")):
        assert "".join(delta.text for delta in scripted(sentencepiece, prompt, script)) == text
        whole = sentencepiece.decode([prompt, *script])
        assert whole == sentencepiece.decode([prompt]) + text


def test_logprobs_show_parts_of_characters_as_bytes(byte_level: Tokenizer) -> None:
    fox = byte_level.encode("🦊")
    assert len(fox) > 1
    deltas = scripted(byte_level, 5, fox)
    assert [delta.text for delta in deltas] == ["🦊"], "the whole character at once"
    entries = deltas[0].logprobs
    assert entries is not None and b"".join(entry.bytes for entry in entries) == "🦊".encode()
    assert "\ufffd" in entries[0].token


def test_closing_the_stream_cancels(make_engine: Make) -> None:
    engine = make_engine()
    recording = engine.backend = Recording(engine.backend)
    stream = engine.stream([Request((5,), Sampling(max_tokens=100, temperature=0, ignore_eos=True))])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(recording.feeds) < 10
    assert next(stream, None) is None


def test_an_interrupt_is_raised_and_the_engine_still_works(make_engine: Make) -> None:
    engine = make_engine()
    request = Request((5, 6), GREEDY)
    expected = engine.generate([request])[0]
    original = engine.backend.feed

    def interrupted(chunks: Sequence[Chunk]) -> Any:
        if chunks[0].start > 3:
            raise KeyboardInterrupt
        return original(chunks)

    engine.backend.feed = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.generate([request])
    engine.backend.feed = original  # type: ignore[method-assign]
    same(engine.generate([request])[0], expected)
