"""The scheduler on a backend in which every wrong page gives a wrong token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.engine.continuations import Continuation, score_continuations
from tercet.engine.engine import Engine, QueueFull
from tercet.engine.request import Completion, Delta, Request, Sampling
from tercet.engine.speculative import Drafter, DraftModel
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)


def engine_on(backend: FakeBackend, tokenizer: Tokenizer, **options: Any) -> Engine:
    assert tokenizer.eos_id is not None
    return Engine(backend, tokenizer, [tokenizer.eos_id], **options)


def outcome(completion: Completion) -> tuple[Any, ...]:
    return completion.tokens, completion.text, completion.finish_reason, completion.logprobs, completion.usage


def nothing_is_left(engine: Engine) -> None:
    assert not any(engine.pool.users) and engine.pool.available == engine.pool.num_pages
    assert not engine.pool._coming and not engine._generations and not engine._inboxes and not engine.has_work
    drafter = engine._drafter
    if drafter is not None:
        assert not drafter._known  # type: ignore[attr-defined]
        if isinstance(drafter, DraftModel):
            assert not any(drafter._pool.users)


def every_page_is_accounted_for(engine: Engine) -> None:
    held = [page for generation in engine._scheduler.running for page in generation.pages.pages]
    assert [held.count(page) for page in range(engine.pool.num_pages)] == engine.pool.users
    assert not any(generation.pages.pages for generation in engine._scheduler.waiting)


def test_usage_reports_the_cached_tokens_of_a_prompt(byte_level: Tokenizer) -> None:
    prompt = tuple(range(11))
    for reuse, expected in ((True, 8), (False, 0)):  # pages of 4; the last token is always fed
        engine = engine_on(FakeBackend(byte_level.vocab_size), byte_level, reuse_prefixes=reuse)
        first, again = (engine.generate([Request(prompt, GREEDY)])[0].usage for _ in range(2))
        assert (first.cached_tokens, again.cached_tokens) == (0, expected)


# Any mixture

samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e", "th")]),
    logprobs=st.sampled_from([None, 1]),
    ignore_eos=st.booleans(),
)
headers = st.sampled_from([(), tuple(range(10, 19)), tuple(range(10, 26))])
requests = st.builds(
    lambda header, tail, sampling: Request((*header, *tail), sampling),
    headers,
    st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple),
    samplings,
)
shapes = st.fixed_dictionaries(
    {
        "num_pages": st.sampled_from([12, 20, 200]),  # the longest request needs 11
        "page_size": st.just(4),
        "max_tokens": st.sampled_from([1, 3, 20, 64]),
        "max_chunks": st.sampled_from([1, 3, 16]),
    }
)
speculations = st.sampled_from([None, "ngram", "greedy", "drawn"])


def drafter(kind: str | None, tokenizer: Tokenizer) -> Any:
    if kind in (None, "ngram"):
        return kind
    # A draft model that agrees sometimes, with few pages of its own.
    return engine_on(FakeBackend(tokenizer.vocab_size, num_pages=14, salt=1, blend=0.8), tokenizer)


@settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(requests, min_size=1, max_size=7),
    shapes,
    st.sampled_from([6, 64]),
    st.integers(1, 6),
    st.booleans(),
    speculations,
    st.dictionaries(st.integers(0, 6), st.integers(0, 12), max_size=3),
    st.lists(st.integers(0, 4), min_size=7, max_size=7),
)
def test_a_request_gets_the_same_alone_and_in_any_mixture(
    byte_level: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    requests: list[Request],
    shape: dict[str, int],
    guessed: int,
    max_batch: int,
    reuse: bool,
    speculation: str | None,
    cancelled: dict[int, int],
    pauses: list[int],
) -> None:
    """For any order of requests and cancellations, and for few pages and few tokens in a turn."""
    vocab = byte_level.vocab_size
    if speculation != "drawn":
        alone = engine_on(FakeBackend(vocab, num_pages=200, blend=0.8), byte_level, reuse_prefixes=False)
    if speculation == "greedy":
        requests = [Request(request.tokens, Sampling(temperature=0, max_tokens=9)) for request in requests]
    if speculation == "drawn":
        # Sampled drafts change the output of a seed, but it does not depend on other requests.
        shape |= {"max_tokens": max(shape["max_tokens"], 40)}  # room for the longest draft
        alone = engine_on(
            FakeBackend(vocab, num_pages=200, blend=0.8),
            byte_level,
            speculation=drafter(speculation, byte_level),
        )
    monkeypatch.setattr("tercet.engine.engine.DRAFTED_TOKENS", 64)
    expected = [outcome(alone.generate([request])[0]) for request in requests]

    engine = engine_on(
        FakeBackend(vocab, **shape, blend=0.8),
        byte_level,
        max_batch=max_batch,
        reuse_prefixes=reuse,
        speculation=drafter(speculation, byte_level),
    )
    monkeypatch.setattr("tercet.engine.engine.DRAFTED_TOKENS", guessed)
    handles: dict[int, int] = {}
    deltas: dict[int, list[Delta]] = {}
    done: dict[int, Completion] = {}
    ended: set[int] = set()
    for turn in range(2000):
        if len(handles) < len(requests) and (turn >= sum(pauses[: len(handles)]) or not engine.has_work):
            handles[engine.submit(requests[len(handles)])] = len(handles)
        for handle, index in handles.items():
            if cancelled.get(index) == turn:
                engine.cancel(handle)
                ended.add(handle)
        for delta in engine.step():
            assert delta.index not in ended and delta.error is None
            deltas.setdefault(delta.index, []).append(delta)
            if delta.completion is not None:
                done[handles[delta.index]] = delta.completion
                ended.add(delta.index)
        every_page_is_accounted_for(engine)
        if len(handles) == len(requests) and not engine.has_work:
            break
    for index, completion in done.items():
        assert outcome(completion) == expected[index]
    for handle, index in handles.items():
        assert index in done or index in cancelled
        if index in done:
            assert "".join(delta.text for delta in deltas[handle]) == done[index].text
            assert [token for delta in deltas[handle] for token in delta.tokens] == done[index].tokens
    nothing_is_left(engine)


@st.composite
def continuations(draw: st.DrawFn) -> list[Continuation]:
    """Continuations of few different tokens, so that many share a prefix, scored from any place on."""
    pieces = []
    for _ in range(draw(st.integers(1, 9))):
        tokens = [*draw(headers), *draw(st.lists(st.integers(0, 1), min_size=2, max_size=9))]
        begin = draw(st.integers(1, len(tokens) - 1))
        pieces.append(Continuation(draw(st.integers(0, 2)), tokens, begin))
    return pieces


@settings(derandomize=True, max_examples=100, deadline=None)
@given(continuations(), continuations(), shapes, st.booleans())
def test_scores_do_not_depend_on_the_room(
    byte_level: Tokenizer,
    before: list[Continuation],
    continuations: list[Continuation],
    shape: dict[str, int],
    reuse: bool,
) -> None:
    """Beside a running request, which is preempted when there is no room for both."""
    backend = FakeBackend(byte_level.vocab_size, **shape)
    engine = engine_on(backend, byte_level, reuse_prefixes=reuse)
    handle = engine.submit(Request((1, 2, 3) * 8, GREEDY))
    for _ in range(3):
        engine.step()
    score_continuations(backend, engine.pool, before, engine._make_room)
    score_continuations(backend, engine.pool, continuations, engine._make_room)
    for continuation in continuations:
        expected = []
        for place in range(continuation.begin, len(continuation.tokens)):
            logits = backend.logits(continuation.tokens[:place]).astype(np.float64)
            expected.append(logits[continuation.tokens[place]] - np.log(np.exp(logits).sum()))
        assert continuation.logprobs == pytest.approx(expected, abs=1e-5)
    completions = [delta for _ in range(200) for delta in engine.step() if delta.completion]
    assert [delta.index for delta in completions] == [handle]
    assert completions[0].completion is not None
    assert completions[0].completion.tokens == backend.greedy((1, 2, 3) * 8, 12)
    nothing_is_left(engine)


# Shared prefixes


def test_a_conversation_reuses_the_pages_of_its_earlier_turns(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    engine = engine_on(backend, byte_level)
    prompt = tuple(range(20))
    answer = engine.generate([Request(prompt, GREEDY)])[0].tokens
    backend.fed.clear()
    again = engine.generate([Request((*prompt, *answer, 5, 6), GREEDY)])[0]
    assert again.tokens == backend.greedy((*prompt, *answer, 5, 6), 12)
    # 31 positions were computed, 28 of them in whole pages; the prompt has 34 tokens.
    assert backend.fed[0] == [34 - 28]


def test_without_reuse_every_prompt_is_computed(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    engine = engine_on(backend, byte_level, reuse_prefixes=False)
    for _ in range(2):
        engine.generate([Request(tuple(range(20)), GREEDY)])
    assert backend.fed[0] == backend.fed[12] == [20]


def test_the_same_prompt_many_times_is_computed_once(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    engine = engine_on(backend, byte_level)
    sampled = [Request(tuple(range(21)), Sampling(max_tokens=3, seed=seed)) for seed in range(4)]
    engine.generate(sampled)
    assert backend.fed[0] == [21] and sorted(backend.fed[1]) == [1, 1, 1, 1]


# Turns


def test_a_long_prompt_does_not_stall_requests_that_decode(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size, num_pages=400, max_tokens=1000, max_positions=1200)
    engine = engine_on(backend, byte_level)
    first = engine.submit(Request((1, 2), Sampling(temperature=0, max_tokens=9, ignore_eos=True)))
    engine.step()
    engine.submit(Request((5, 6, 7) * 300, GREEDY))
    fed = len(backend.fed)
    while engine.has_work:
        engine.step()
    assert backend.fed[fed : fed + 4] == [[1, 255], [1, 255], [1, 255], [1, 135]]
    assert first == 0
    nothing_is_left(engine)


def test_the_last_request_is_preempted_when_pages_run_out_and_none_is_lost(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size, num_pages=9, max_tokens=64)
    engine = engine_on(backend, byte_level)
    prompts = [tuple(range(n, n + 8)) for n in (0, 20, 40)]
    sampling = Sampling(temperature=0, max_tokens=25, ignore_eos=True)  # eight pages each in the end
    handles = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
    order = []
    while engine.has_work:
        order += [delta for delta in engine.step() if delta.completion]
    assert [delta.index for delta in order] == handles, "requests end in order of arrival"
    for delta, prompt in zip(order, prompts, strict=True):
        assert delta.completion is not None and delta.completion.tokens == backend.greedy(prompt, 25)
    nothing_is_left(engine)


def test_a_request_that_can_never_fit_is_refused_in_one_line(byte_level: Tokenizer) -> None:
    engine = engine_on(FakeBackend(byte_level.vocab_size, num_pages=5), byte_level)
    assert engine.generate([Request((1,) * 9, GREEDY)])[0].usage.completion_tokens == 12  # 20 positions
    with pytest.raises(
        UserError, match=r"has 10 tokens and may get 12 more; the cache holds 20 in all; [^\n]+$"
    ):
        engine.submit(Request((1,) * 10, GREEDY))
    with pytest.raises(UserError, match="has 22 tokens; the cache holds 20"):
        score_continuations(engine.backend, engine.pool, [Continuation(0, [1] * 22, 1)])


def test_a_request_preempted_during_scheduling_is_not_fed(byte_level: Tokenizer) -> None:
    """With few tokens in a turn, later requests are sometimes scheduled first; about every tenth run shows it."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        backend = FakeBackend(
            byte_level.vocab_size,
            num_pages=int(rng.integers(10, 21)),
            page_size=2,
            max_tokens=int(rng.integers(3, 5)),
        )
        engine = engine_on(backend, byte_level)
        prompts = [tuple(rng.integers(0, 6, rng.integers(1, 6)).tolist()) for _ in range(5)]
        handles = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
        done = {}
        while engine.has_work:
            done |= {delta.index: delta.completion for delta in engine.step() if delta.completion}
            every_page_is_accounted_for(engine)
        for handle, prompt in zip(handles, prompts, strict=True):
            assert done[handle].tokens == backend.greedy(prompt, 12)


# The queue


def test_a_full_queue_refuses_requests(byte_level: Tokenizer) -> None:
    engine = engine_on(FakeBackend(byte_level.vocab_size), byte_level, max_batch=1, max_waiting=2)
    engine.submit(Request((1,), GREEDY))
    engine.step()
    for _ in range(2):
        engine.submit(Request((1,), GREEDY))
    with pytest.raises(QueueFull, match="2 requests are waiting already; send this one again later"):
        engine.submit(Request((1,), GREEDY))
    done = 0
    while engine.has_work:
        done += sum(delta.completion is not None for delta in engine.step())
    assert done == 3
    assert len(engine.generate([Request((1,), GREEDY)] * 5)) == 5, "a call's own list is not bounded"


def test_a_cancelled_request_ends_at_once(byte_level: Tokenizer) -> None:
    engine = engine_on(FakeBackend(byte_level.vocab_size), byte_level, max_batch=1)
    running, waiting = (engine.submit(Request((1, 2, 3, n), GREEDY)) for n in (4, 5))
    engine.step()
    assert engine.cancel(running) and engine.cancel(waiting) and not engine.cancel(running)
    assert engine.step() == []
    nothing_is_left(engine)


def test_closing_a_stream_frees_its_pages(byte_level: Tokenizer) -> None:
    engine = engine_on(FakeBackend(byte_level.vocab_size), byte_level, max_batch=2)
    stream = engine.stream([Request((1, n), GREEDY) for n in range(5)])
    next(stream)
    assert any(engine.pool.users)
    stream.close()  # type: ignore[attr-defined]
    nothing_is_left(engine)


def test_streams_and_submitted_requests_run_side_by_side(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    engine = engine_on(backend, byte_level)
    handle = engine.submit(Request((9, 9), GREEDY))
    streams = [engine.stream([Request((n,), GREEDY), Request((n, n), GREEDY)]) for n in (1, 2)]
    completions: list[list[Delta]] = [[], []]
    for _ in range(100):
        for stream, ends in zip(streams, completions, strict=True):
            delta = next(stream, None)
            if delta is not None and delta.completion is not None:
                ends.append(delta)
    for n, ends in enumerate(completions, 1):
        for delta in ends:
            assert delta.completion is not None
            assert delta.completion.tokens == backend.greedy((n,) * (delta.index + 1), 12)
        assert len(ends) == 2
    submitted = engine.step()
    assert {delta.index for delta in submitted} == {handle} and submitted[-1].completion is not None
    assert submitted[-1].completion.tokens == backend.greedy((9, 9), 12)
    nothing_is_left(engine)


# Errors


def test_a_request_that_fails_fails_alone(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    expected = backend.greedy((1, 2, 3, 4, 5), 12)
    backend.broken.add((7, 7, 7, 7, 7, *backend.greedy((7, 7, 7, 7, 7), 2)))
    engine = engine_on(backend, byte_level)
    good, bad = (engine.submit(Request(tokens, GREEDY)) for tokens in ((1, 2, 3, 4, 5), (7,) * 5))
    ends = {}
    while engine.has_work:
        ends |= {delta.index: delta for delta in engine.step() if delta.completion or delta.error}
    assert isinstance(ends[bad].error, UserError) and "not finite" in str(ends[bad].error)
    assert ends[good].completion is not None and ends[good].completion.tokens == expected
    nothing_is_left(engine)
    sequence = engine.pool.sequence()
    sequence.reuse([7] * 5, 4)
    assert sequence.pages == [], "no request reuses the broken pages"
    with pytest.raises(UserError, match="not finite"):
        engine.generate([Request((1,), GREEDY), Request((7,) * 5, GREEDY)])
    nothing_is_left(engine)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 25), min_size=1, max_size=4), st.booleans(), speculations)
def test_a_step_that_raises_can_be_repeated(
    byte_level: Tokenizer, failing: set[int], after: bool, speculation: str | None
) -> None:
    """The backend fails before or after it computes, because an interrupt may come at any time."""
    sampled = [Request((1, 2, 3, n), Sampling(max_tokens=9, seed=n, temperature=1)) for n in range(4)]
    sampled.append(Request(tuple(range(30)), GREEDY))
    backend = FakeBackend(byte_level.vocab_size, max_tokens=24, blend=0.8)
    plain = engine_on(backend, byte_level, speculation=drafter(speculation, byte_level))
    expected = [outcome(completion) for completion in plain.generate(sampled)]
    calls = iter(range(10_000))
    feed = backend.feed

    def failing_feed(chunks: Sequence[Any]) -> Any:
        wrong = next(calls) in failing
        if wrong and not after:
            raise KeyboardInterrupt
        logits = feed(chunks)
        if wrong:
            raise KeyboardInterrupt
        return logits

    engine = engine_on(backend, byte_level, speculation=drafter(speculation, byte_level))
    backend.feed = failing_feed  # type: ignore[method-assign]
    handles = [engine.submit(request) for request in sampled]
    done = {}
    while engine.has_work:
        try:
            done |= {delta.index: delta.completion for delta in engine.step() if delta.completion}
        except KeyboardInterrupt:
            every_page_is_accounted_for(engine)
    assert [outcome(done[handle]) for handle in handles] == expected
    nothing_is_left(engine)


def test_an_interrupt_between_the_tokens_of_a_turn_loses_nothing(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size)
    engine = engine_on(backend, byte_level)
    handles = [engine.submit(Request((n, n, n, n), GREEDY)) for n in range(3)]
    engine.step()
    victim = engine._scheduler.running[1]
    advance = victim.advance

    def interrupted(logits: Any) -> int:
        victim.advance = advance  # type: ignore[method-assign]
        raise KeyboardInterrupt

    victim.advance = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    done = {}
    while engine.has_work:
        done |= {delta.index: delta.completion for delta in engine.step() if delta.completion}
    for n, handle in enumerate(handles):
        assert done[handle].tokens == backend.greedy((n, n, n, n), 12)


def test_an_interrupt_during_admission_loses_no_deferred_request(byte_level: Tokenizer) -> None:
    """The second request waits for the pages of the first while the third is interrupted."""
    backend = FakeBackend(byte_level.vocab_size)
    engine = engine_on(backend, byte_level)
    prompts = [(*range(20), 1), (*range(20), 2), (5,)]
    handles = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    third = engine._scheduler.waiting[2]
    prepare = third.prepare

    def interrupted() -> None:
        third.prepare = prepare  # type: ignore[method-assign]
        raise KeyboardInterrupt

    third.prepare = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    done = {}
    while engine.has_work:
        done |= {delta.index: delta.completion for delta in engine.step() if delta.completion}
    for handle, prompt in zip(handles, prompts, strict=True):
        assert done[handle].tokens == backend.greedy(prompt, 12)
    nothing_is_left(engine)


def test_the_error_of_a_drafter_is_raised(byte_level: Tokenizer) -> None:
    class Failing:
        def samples(self, sampling: Sampling) -> bool:
            return False

        def propose(self, requests: Any) -> Any:
            raise OSError("no draft")

        def forget(self, sequence: int) -> None:
            pass

    failing: Drafter = Failing()
    engine = engine_on(FakeBackend(byte_level.vocab_size), byte_level, speculation=failing)
    with pytest.raises(OSError, match="no draft"):
        engine.generate([Request((1,), GREEDY)])
    assert not any(engine.pool.users)
