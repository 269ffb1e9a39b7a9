from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import FakeBackend
from scipy.stats import chisquare

from tercet.engine.engine import Engine
from tercet.engine.request import Request, Sampling
from tercet.engine.sampling import Distribution, distribution, take_draft
from tercet.engine.speculative import DraftModel, DraftRequest, Pace, PromptLookup, check_same_vocabulary
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0, max_tokens=40, ignore_eos=True)


def draft_request(
    tokens: list[int], count: int, sequence: int = 0, sampling: Sampling = GREEDY
) -> DraftRequest:
    return DraftRequest(sequence, tokens, count, sampling, np.random.default_rng(0))


# Prompt lookup


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 3, [4, 9, 1]),
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1, [7]),  # a match of three tokens beats a later match of two
        ([5, 1, 6, 1, 7, 1], 2, [7, 1]),  # the latest of equal matches
        ([5, 6, 7], 2, []),
        ([5], 2, []),
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # repeated text is continued by repetition
        ([4, 4], 3, [4, 4, 4]),
    ],
)
def test_lookup_proposes_what_followed_the_longest_match(
    tokens: list[int], count: int, expected: list[int]
) -> None:
    assert PromptLookup().propose([draft_request(tokens, count)])[0].tokens == expected
    growing = PromptLookup()  # a draft is requested at every token, as in decoding
    for end in range(1, len(tokens) + 1):
        last = growing.propose(
            [draft_request(tokens[:end], count), draft_request(tokens[:1], count, sequence=1)]
        )[0].tokens
    assert last == expected
    growing.forget(0)
    assert list(growing._known) == [1]


# The length of drafts


def test_drafts_grow_while_accepted_and_pause_while_rejected() -> None:
    pace = Pace()
    assert pace.next() == 4
    pace.note(4, 4)
    assert pace.next() == 8
    pace.note(8, 2)
    assert pace.next() == 3
    fed = 0
    for _ in range(1000):
        count = pace.next()
        fed += count
        if count:
            pace.note(count, 0)
    assert fed < 1000 * 0.03, "rejected tokens, as a share of the output"
    pace.note(1, 1)
    assert any(pace.next() for _ in range(100)), "and drafts come back"


def test_drafts_that_are_never_accepted_cost_little(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level.vocab_size, num_pages=200, max_positions=700)
    draft = Engine(
        FakeBackend(byte_level.vocab_size, num_pages=200, max_positions=700, salt=1), byte_level, []
    )
    engine = Engine(backend, byte_level, [], speculation=draft)
    completion = engine.generate([Request((1, 2), Sampling(temperature=0, max_tokens=600))])[0]
    assert completion.accepted <= 5 and 0 < completion.drafted < 50
    assert sum(map(sum, backend.fed)) < 600 * 1.1


# Outputs


def test_greedy_tokens_are_the_same_and_take_fewer_feeds(byte_level: Tokenizer) -> None:
    accepted = 0
    for seed in range(20):
        prompt = tuple(np.random.default_rng(seed).integers(0, 300, 12).tolist())
        # Each token alone determines the next, so most outputs soon repeat.
        backends = [FakeBackend(byte_level.vocab_size, repeats=1, salt=seed) for _ in range(3)]
        own = Engine(FakeBackend(byte_level.vocab_size, repeats=1, salt=seed), byte_level, [])
        options: list[Any] = [None, "ngram", own]
        plain, ngram, draft = (
            Engine(backend, byte_level, [], speculation=option).generate([Request(prompt, GREEDY)])[0]
            for backend, option in zip(backends, options, strict=True)
        )
        assert plain.tokens == ngram.tokens == draft.tokens == backends[0].greedy(prompt, 40)
        assert (plain.drafted, plain.accepted) == (0, 0)
        accepted += ngram.accepted
        assert draft.accepted == draft.drafted, "drafts of the same model are always accepted"
        assert len(backends[0].fed) == 40
        assert len(backends[2].fed) <= 7, "one prompt, then 4 + 1, 8 + 1, ... tokens"
        assert len(ngram.tokens) == len(backends[1].fed) + ngram.accepted
    assert accepted > 100


def test_a_seed_gives_the_same_tokens_with_prompt_lookup_as_without(byte_level: Tokenizer) -> None:
    for seed in range(20):
        request = Request((1, 2, 3, 1, 2), Sampling(max_tokens=40, top_k=2, seed=seed, ignore_eos=True))
        with_lookup, without = (
            Engine(
                FakeBackend(byte_level.vocab_size, repeats=1), byte_level, [], speculation=option
            ).generate([request])[0]
            for option in ("ngram", None)
        )
        assert with_lookup.tokens == without.tokens
        assert with_lookup.drafted > 0


def joint(
    logits: Callable[[list[int]], Any], prompt: tuple[int, ...], sampling: Sampling, depth: int
) -> dict[tuple[int, ...], float]:
    """The exact probability of every output of ``depth`` tokens."""
    if depth == 0:
        return {(): 1.0}
    row = logits(list(prompt))
    probabilities = distribution(row, sampling).dense(len(row))
    return {
        (token, *rest): float(probabilities[token]) * share
        for token in np.flatnonzero(probabilities).tolist()
        for rest, share in joint(logits, (*prompt, token), sampling, depth - 1).items()
    }


@lru_cache
def exact_outputs(vocab_size: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Return the probability of every output of four tokens; it does not depend on the draft model."""
    large = FakeBackend(vocab_size, num_pages=2000, salt=0)
    return joint(lambda history: large.logits(tuple(history)), (1, 2), sampling, 4)


@pytest.mark.parametrize(
    "settings", [{"top_k": 3, "temperature": 1.5}, {"top_p": 0.8, "temperature": 0.4}, {"min_p": 0.2}]
)
@pytest.mark.parametrize("blend", [0.0, 0.7, 1.0])
def test_tokens_sampled_with_a_draft_model_follow_the_large_models_distribution(
    byte_level: Tokenizer, settings: dict[str, float], blend: float
) -> None:
    """Joint over four tokens, three of which may be drafted: chi-square against exact probabilities."""
    fakes = [FakeBackend(byte_level.vocab_size, num_pages=2000, blend=blend, salt=salt) for salt in (0, 1)]
    for fake in fakes:
        fake.logits = lru_cache(lambda history, fake=fake: FakeBackend.logits(fake, history))  # type: ignore[method-assign]
        inner = fake._places
        fake._places = lambda chunks, inner=inner: [tuple(history) for history in inner(chunks)]  # type: ignore[method-assign]
    count = 1000
    sampling = Sampling(max_tokens=4, **settings)  # type: ignore[arg-type]
    exact = exact_outputs(byte_level.vocab_size, sampling)
    engine = Engine(fakes[0], byte_level, [], speculation=Engine(fakes[1], byte_level, []))
    completions = engine.generate(
        [Request((1, 2), Sampling(max_tokens=4, seed=seed, **settings)) for seed in range(count)]  # type: ignore[arg-type]
    )
    assert sum(completion.drafted for completion in completions) > count
    seen = Counter(tuple(completion.tokens) for completion in completions)
    assert set(seen) <= set(exact)
    # Rare outputs together, because the chi-square test requires at least five of each.
    common = [tokens for tokens, share in exact.items() if share * count >= 5]
    observed = [seen[tokens] for tokens in common]
    expected = [exact[tokens] * count for tokens in common]
    observed, expected = [*observed, count - sum(observed)], [*expected, count - sum(expected)]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert chisquare(observed, expected).pvalue > 0.001


def test_taking_a_draft_keeps_the_targets_distribution() -> None:
    target = Distribution(np.array([1, 4, 6]), np.array([3.0, 1.0, 6.0]))
    for draft in (
        Distribution(None, np.array([1.0, 5, 0, 1, 2, 1, 1])),
        Distribution(np.array([4]), np.array([2.0])),
        target,
    ):
        rng = np.random.default_rng(0)
        drawn, accepted = Counter[int](), 0
        for _ in range(8000):
            token = draft.draw(rng)
            taken = take_draft(target, token, draft, rng)
            drawn[taken] += 1
            accepted += taken == token
        assert set(drawn) <= {1, 4, 6}
        assert chisquare([drawn[1], drawn[4], drawn[6]], [2400, 800, 4800]).pvalue > 0.001
        # Accepted with probability sum of min(p, q).
        p, q = target.dense(7), draft.dense(7)
        assert accepted / 8000 == pytest.approx(np.minimum(p, q).sum(), abs=0.02)


# The draft model's own pages


def test_a_draft_model_drafts_its_own_greedy_tokens(byte_level: Tokenizer) -> None:
    """Whatever part of its last draft was accepted, with room for one sequence or for several."""
    rng = np.random.default_rng(0)
    for pages in (9, 40):
        backend = FakeBackend(byte_level.vocab_size, num_pages=pages, max_tokens=5, max_chunks=2)
        model = DraftModel(backend, byte_level)
        texts = [rng.integers(0, 300, rng.integers(1, 12)).tolist() for _ in range(3)]
        for _ in range(8):
            draft_requests = [draft_request(list(text), 4, number) for number, text in enumerate(texts)]
            drafts = model.propose(draft_requests)
            for text, draft in zip(texts, drafts, strict=True):
                room = max(0, 4 * pages - len(text) + 1)
                assert draft.tokens == backend.greedy(text, min(4, room))
                right = int(rng.integers(0, 5))
                text += [*draft.tokens[:right], int(rng.integers(0, 300))][: int(rng.integers(1, 6))]
        for number in range(3):
            model.forget(number)
        assert not any(model._pool.users) and not model._known


def test_drafts_end_at_the_draft_models_last_position(byte_level: Tokenizer) -> None:
    short = Engine(FakeBackend(byte_level.vocab_size, max_positions=16), byte_level, [])
    backend = FakeBackend(byte_level.vocab_size)
    completion = Engine(backend, byte_level, [], speculation=short).generate([Request((1, 2, 3), GREEDY)])[0]
    assert completion.tokens == backend.greedy((1, 2, 3), 40)
    assert completion.accepted == completion.drafted > 0


def test_a_broken_draft_model_does_not_break_the_request(byte_level: Tokenizer) -> None:
    draft = FakeBackend(byte_level.vocab_size)
    draft.logits = lambda history: np.full(byte_level.vocab_size, np.nan, np.float32)  # type: ignore[method-assign]
    backend = FakeBackend(byte_level.vocab_size)
    engine = Engine(backend, byte_level, [], speculation=Engine(draft, byte_level, []))
    for sampling in (GREEDY, Sampling(max_tokens=10, seed=1)):
        assert engine.generate([Request((1, 2), sampling)])[0].drafted == 0


def test_another_vocabulary_is_refused(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    check_same_vocabulary(byte_level, byte_level)
    draft = Engine(FakeBackend(sentencepiece.vocab_size), sentencepiece, [])
    with pytest.raises(
        UserError, match=r"the draft model has another vocabulary \(\d+ tokens; the model has 300;"
    ):
        Engine(FakeBackend(byte_level.vocab_size), byte_level, [], speculation=draft)
    with pytest.raises(UserError, match="`speculation` is 'magic'; use 'ngram'"):
        Engine(FakeBackend(byte_level.vocab_size), byte_level, [], speculation="magic")  # type: ignore[arg-type]


# Networks


@pytest.mark.parametrize("changes", [{}, {"windows": (6, None)}, {"positions": "learned", "qk_norm": "none"}])
def test_networks_write_the_same_with_drafts_as_without(
    make_engine: Callable[..., Engine], changes: dict[str, Any]
) -> None:
    """A draft network whose weights are nearly those of the large one; greedy."""
    near = make_engine(**changes)
    with torch.no_grad():
        for parameter in near.backend.model.parameters():  # type: ignore[attr-defined]
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    prompts = [
        tuple(np.random.default_rng(seed).integers(0, 300, 5 + 9 * seed).tolist()) for seed in range(6)
    ]
    requests = [Request(prompt, GREEDY) for prompt in prompts]
    plain = make_engine(**changes).generate(requests)
    for speculation in ("ngram", near):
        drafted = make_engine(options={"speculation": speculation}, **changes).generate(requests)
        assert [completion.tokens for completion in drafted] == [completion.tokens for completion in plain]
        assert sum(completion.drafted for completion in drafted) > 0
        if speculation is near:
            assert (
                0
                < sum(completion.accepted for completion in drafted)
                < sum(completion.drafted for completion in drafted)
            )


def test_logprobs_are_the_same_with_drafts_as_without(byte_level: Tokenizer) -> None:
    sampling = Sampling(temperature=0, max_tokens=30, logprobs=2, ignore_eos=True)
    completion, plain = (
        Engine(FakeBackend(byte_level.vocab_size, repeats=1), byte_level, [], speculation=option).generate(
            [Request((1, 2), sampling)]
        )[0]
        for option in ("ngram", None)
    )
    assert completion.accepted > 0 and completion.logprobs == plain.logprobs
    assert completion.tokens == plain.tokens
