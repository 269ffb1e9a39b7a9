"""Outputs under a constraint, with a matcher that is a list of the tokens allowed at each place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.engine import Engine
from tercet.engine.request import Completion, Request, Sampling
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

Places = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class FakeGrammar:
    places: Places
    endless: bool = False  # whether anything, or only the end, may follow the places


class FakeMatcher:
    def __init__(self, grammar: FakeGrammar, vocab_size: int, stops: Sequence[int]) -> None:
        self.grammar, self.vocab_size, self.stops, self.taken = grammar, vocab_size, list(stops), []

    def _allowed(self, place: int) -> set[int]:
        if place < len(self.grammar.places):
            return set(self.grammar.places[place])
        return {*(range(self.vocab_size) if self.grammar.endless else ()), *self.stops}

    def mask(self) -> Any:
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        mask[list(self._allowed(len(self.taken)))] = True
        return mask

    def forced(self) -> list[int]:
        forced: list[int] = []
        for allowed in self.grammar.places[len(self.taken) :]:
            if len(allowed) != 1:
                break
            forced += allowed
        return forced

    def accept(self, token: int) -> None:
        assert token in self._allowed(len(self.taken)), "the engine chose a token that is not allowed"
        self.taken.append(token)

    def valid(self, tokens: Sequence[int]) -> int:
        for count, token in enumerate(tokens):
            if token not in self._allowed(len(self.taken) + count):
                return count
        return len(tokens)

    @property
    def ended(self) -> bool:
        return len(self.taken) >= len(self.grammar.places) and not self.grammar.endless


class FakeConstraints:
    def __init__(self, vocab_size: int, stops: Sequence[int]) -> None:
        self.vocab_size, self.stops = vocab_size, stops

    def matcher(self, grammar: FakeGrammar) -> FakeMatcher:
        if frozenset() in grammar.places:
            raise UserError("the grammar allows nothing")
        return FakeMatcher(grammar, self.vocab_size, self.stops)


def engine_on(backend: FakeBackend, tokenizer: Tokenizer, **options: Any) -> Engine:
    engine = Engine(backend, tokenizer, [299], **options)
    engine.constraints = FakeConstraints(backend.vocab_size, [299])  # type: ignore[assignment]
    return engine


def request(prompt: Sequence[int], places: Places, sampling: Sampling, endless: bool = False) -> Request:
    return Request(tuple(prompt), sampling, FakeGrammar(places, endless))  # type: ignore[arg-type]


def by_hand(backend: FakeBackend, prompt: Sequence[int], places: Places, sampling: Sampling) -> list[int]:
    tokens = list(prompt)
    for allowed in places[: sampling.max_tokens]:
        logits = backend.logits(tokens)
        tokens.append(max(allowed, key=lambda token: logits[token]))
    return tokens[len(prompt) :]


places = st.lists(
    st.one_of(
        st.integers(5, 90).map(lambda token: frozenset([token])),
        st.frozensets(st.integers(5, 90), min_size=2),
    ),
    min_size=1,
    max_size=14,
).map(tuple)


@settings(derandomize=True, max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=9), places), min_size=1, max_size=5),
    st.sampled_from([None, 1]),
    st.integers(1, 20),
    st.sampled_from([2, 20, 64]),
    st.sampled_from([None, "ngram", "model"]),
)
def test_greedy_outputs_are_the_best_allowed_tokens(
    byte_level: Tokenizer,
    cases: list[tuple[list[int], Places]],
    logprobs: int | None,
    max_tokens: int,
    feed_tokens: int,
    speculation: Any,
) -> None:
    backend = FakeBackend(300, max_tokens=feed_tokens, num_pages=30)
    if speculation == "model":
        speculation = Engine(FakeBackend(300, blend=0.5, salt=1), byte_level, [])
    engine = engine_on(backend, byte_level, speculation=speculation)
    sampling = Sampling(temperature=0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=True)
    completions = engine.generate([request(prompt, places, sampling) for prompt, places in cases])
    for (prompt, places), completion in zip(cases, completions, strict=True):
        assert completion.tokens == by_hand(backend, prompt, places, sampling)
        assert completion.finish_reason == ("stop" if len(places) <= max_tokens else "length")
        check_logprobs(backend, prompt, completion, logprobs)
    assert not any(engine.pool.users)


def check_logprobs(
    backend: FakeBackend, prompt: Sequence[int], completion: Completion, top: int | None
) -> None:
    if top is None:
        assert completion.logprobs is None
        return
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.tokens
    for place, entry in enumerate(completion.logprobs):
        logits = backend.logits([*prompt, *completion.tokens[:place]]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=1e-6)
        assert entry.top[0][0] == int(logits.argmax()), "the likeliest token of the model, allowed or not"


ONE, TWO = frozenset([40]), frozenset([50, 60])


def test_forced_tokens_need_no_feed_of_their_own(byte_level: Tokenizer) -> None:
    for logprobs, feeds in ((None, [[7], [5]]), (1, [[7], [5], [4]])):
        backend = FakeBackend(300)
        # Three forced tokens, one of two, four forced ones, one of two, three forced ones.
        places: Places = (ONE,) * 3 + (TWO,) + (ONE,) * 4 + (TWO,) + (ONE,) * 3
        sampling = Sampling(temperature=0, logprobs=logprobs)
        completion = engine_on(backend, byte_level).generate([request([1, 2, 3, 4], places, sampling)])[0]
        assert completion.tokens == by_hand(backend, [1, 2, 3, 4], places, sampling)
        assert completion.finish_reason == "stop" and completion.usage.completion_tokens == 12
        assert backend.fed == feeds
        check_logprobs(backend, [1, 2, 3, 4], completion, logprobs)


def test_an_output_that_is_forced_entirely_needs_no_model(byte_level: Tokenizer) -> None:
    backend = FakeBackend(300)
    engine = engine_on(backend, byte_level)
    handle = engine.submit(request([1], (ONE,) * 3, Sampling()))
    deltas = [delta for _ in range(3) for delta in engine.step()]
    assert [delta.index for delta in deltas] == [handle] and deltas[0].completion is not None
    assert deltas[0].completion.tokens == [40] * 3 and backend.fed == [] and not engine.has_work


def test_a_stop_token_ends_the_output_where_the_grammar_allows_it(byte_level: Tokenizer) -> None:
    backend = FakeBackend(300)
    original = backend.logits
    # The stop token is always the likeliest; it must not come before the grammar allows it.
    backend.logits = lambda history: original(history) + 50 * (np.arange(300) == 299)  # type: ignore[method-assign]
    for ignore in (True, False):
        sampling = Sampling(max_tokens=20, temperature=0, ignore_eos=ignore)
        completion = engine_on(backend, byte_level).generate(
            [request([1], (TWO, ONE, TWO), sampling, endless=True)]
        )[0]
        assert len(completion.tokens) == 4 and completion.tokens[3] == 299
        assert completion.finish_reason == "stop"


def test_sampled_tokens_are_allowed_and_repeat_with_their_seed(byte_level: Tokenizer) -> None:
    places: Places = (frozenset(range(5, 60)), ONE, frozenset(range(70, 90)), TWO) * 4
    outputs = []
    for speculation in (None, "ngram", Engine(FakeBackend(300, blend=0.9, salt=1), byte_level, [])):
        for _ in range(2):
            engine = engine_on(FakeBackend(300, blend=0.9), byte_level, speculation=speculation)  # type: ignore[arg-type]
            sampled = [request([1, 2], places, Sampling(temperature=1, seed=seed)) for seed in range(5)]
            outputs.append([completion.tokens for completion in engine.generate(sampled)])
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert outputs[4] == outputs[5]
    for tokens in itertools.chain.from_iterable(outputs):
        assert all(token in allowed for token, allowed in zip(tokens, places, strict=True))


def test_an_invalid_constraint_is_refused_at_once_and_a_dead_end_fails_alone(
    byte_level: Tokenizer,
) -> None:
    engine = engine_on(FakeBackend(300), byte_level)
    with pytest.raises(UserError, match="allows nothing"):
        engine.submit(request([1], (frozenset(),), Sampling()))
    engine.constraints.stops = []  # type: ignore[attr-defined]

    class Dead(FakeMatcher):
        ended = False  # type: ignore[assignment]

    engine.constraints.matcher = lambda grammar: Dead(grammar, 300, [])  # type: ignore[assignment, method-assign]
    dead = engine.submit(request([1], (TWO,), Sampling(temperature=0)))
    engine.submit(Request((1, 2), Sampling(temperature=0, max_tokens=5)))
    ends = [delta for _ in range(10) for delta in engine.step() if delta.completion or delta.error]
    assert ends[0].index == dead and "no token may come next" in str(ends[0].error)
    assert ends[1].completion is not None
    assert not any(engine.pool.users)
