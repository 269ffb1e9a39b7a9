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
from tercet.engine.continuations import Continuation, score_continuations
from tercet.engine.engine import Engine
from tercet.engine.torch_backend import TorchBackend
from tercet.errors import UserError
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer

Make = Callable[..., Engine]
LABELS = [" dog", " fox", " the", " the other", " the other one", " small model", "日本"]


def by_hand(engine: Engine, tokens: Sequence[int], begin: int) -> list[float]:
    """One forward pass over all tokens, without a cache."""
    with torch.no_grad():
        logprobs = engine.backend.model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)  # type: ignore[attr-defined]
    return [float(logprobs[place - 1, tokens[place]]) for place in range(begin, len(tokens))]


class Recording:
    """A backend that counts its feeds, tokens and pages."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.fed, self.feeds, self.pages = inner, 0, 0, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def logprobs(self, chunks: Sequence[Chunk], targets: Any) -> Any:
        self.fed += sum(len(chunk.tokens) for chunk in chunks)
        self.feeds += 1
        self.pages |= {page for chunk in chunks for page in chunk.pages}
        return self.inner.logprobs(chunks, targets)


# Scores


def test_a_score_is_the_log_probability_of_the_continuations_tokens(
    make_engine: Make, byte_level: Tokenizer
) -> None:
    engine = make_engine()
    pairs = [("The quick brown", " fox jumps"), ("日本", "語の"), ("a", "b" * 50), ("Once", " upon")]
    for (prompt, continuation), score in zip(pairs, engine.score(pairs), strict=True):
        before, whole = byte_level.encode(prompt), byte_level.encode(prompt + continuation)
        assert whole[: len(before)] == before
        expected = by_hand(engine, whole, len(before))
        assert score.tokens == whole[len(before) :]
        assert score.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert score.logprob == pytest.approx(sum(expected), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_transformers_loss(family: str, tmp_path: Path, byte_level: Tokenizer) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    }
    config: Any = (
        transformers.GPT2Config(**small)
        if family == "gpt2"
        else transformers.LlamaConfig(**small, intermediate_size=64)
    )
    auto: Any = transformers.AutoModelForCausalLM
    reference_model = auto.from_config(config).eval()
    reference_model.save_pretrained(tmp_path)
    engine = Engine(TorchBackend(load_model(tmp_path)), byte_level, [])
    prompt, continuation = "The quick brown fox", " jumps over the lazy dog"
    ids = torch.tensor([byte_level.encode(prompt + continuation)])
    labels = ids.clone()
    labels[0, : len(byte_level.encode(prompt))] = -100
    with torch.no_grad():
        loss = float(reference_model(ids, labels=labels).loss)
    score = engine.score([(prompt, continuation)])[0]
    assert -score.logprob / len(score.tokens) == pytest.approx(loss, abs=1e-4)


def test_a_prompt_that_ends_inside_a_token_has_the_tokens_that_it_has_for_generation(
    make_engine: Make, byte_level: Tokenizer
) -> None:
    engine = make_engine()
    the = byte_level.id_of("Ġthe")
    assert the is not None and byte_level.encode("over the") == [*byte_level.encode("over"), the]
    for prompt, continuation in (("over ", "the"), ("ov", "er the")):
        before, after = byte_level.encode(prompt), byte_level.encode(continuation)
        assert [*before, *after] != byte_level.encode(prompt + continuation)
        score = engine.score([(prompt, continuation)])[0]
        assert score.tokens == after
        assert score.token_logprobs == pytest.approx(
            by_hand(engine, [*before, *after], len(before)), abs=1e-5
        )
        assert engine.choose([prompt], [[continuation]])[0][0] == pytest.approx(score.logprob, abs=1e-5)


def test_an_empty_prompt_conditions_on_bos_or_else_on_eos(
    make_engine: Make, byte_level: Tokenizer, sentencepiece: Tokenizer
) -> None:
    assert byte_level.bos_id is None
    for tokenizer, first in ((byte_level, byte_level.eos_id), (sentencepiece, sentencepiece.bos_id)):
        engine = make_engine(tokenizer)
        tokens = tokenizer.encode("the fox", special=False)
        score = engine.score([("", "the fox")])[0]
        assert first is not None and score.tokens == tokens
        assert score.token_logprobs == pytest.approx(by_hand(engine, [first, *tokens], 1), abs=1e-5)


def test_special_false_adds_no_bos_to_a_text_that_has_it(make_engine: Make, sentencepiece: Tokenizer) -> None:
    engine = make_engine(sentencepiece)
    plain = engine.score([("the", " fox")])[0]
    assert engine.score([("<s>the", " fox")], special=False)[0].tokens == plain.tokens
    assert engine.choose(["<s>the"], [[" fox"]], special=False)[0][0] != pytest.approx(
        engine.choose(["<s>the"], [[" fox"]])[0][0], abs=1e-4
    ), "encoding adds a second BOS"


def test_greedy_means_that_greedy_decoding_writes_it(make_engine: Make, byte_level: Tokenizer) -> None:
    engine = make_engine()
    whole = byte_level.encode("The quick brown")
    with torch.no_grad():
        best = int(engine.backend.model(torch.tensor([whole]))[0, -1].argmax())  # type: ignore[attr-defined]
    worse = (best + 1) % 300
    pieces = [Continuation(0, [*whole, token], len(whole)) for token in (best, worse)]
    score_continuations(engine.backend, engine.pool, pieces)
    assert [piece.is_greedy for piece in pieces] == [True, False]


def test_texts_that_cannot_be_scored_are_refused(make_engine: Make) -> None:
    engine = make_engine()
    with pytest.raises(UserError, match="continuation '' is empty"):
        engine.score([("The", "")])
    with pytest.raises(UserError, match="has 129 tokens; the model takes at most 128"):
        engine.score([("\x00" * 128, "xy")])
    with pytest.raises(UserError, match="2 prompts with 1 lists"):
        engine.choose(["a", "b"], [["c"]])
    engine.tokenizer = engine.tokenizer.with_template("")
    engine.tokenizer.eos_id = None
    with pytest.raises(UserError, match="`end=False`"):
        engine.choose(["a"], [["b"]], end=True)
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        engine.score([("", "b")])


# Any sequences with any shared prefixes


@st.composite
def continuations(draw: st.DrawFn) -> list[Continuation]:
    """Groups of few different tokens, so that prefixes of every kind are shared."""
    header = draw(st.sampled_from([[], list(range(20, 60))]))
    few = st.integers(3, 5)
    pieces = []
    for group in range(draw(st.integers(1, 5))):
        prompt = draw(st.lists(few, min_size=1, max_size=5))
        for _ in range(draw(st.integers(1, 4))):
            tokens = [*header, *prompt, *draw(st.lists(few, min_size=1, max_size=5))]
            begin = draw(st.integers(1, len(tokens) - 1))
            pieces.append(Continuation(group, tokens, begin))
    return pieces


@settings(derandomize=True, max_examples=80, deadline=None)
@given(continuations(), st.sampled_from([52, 100, 10_000]))
def test_sharing_changes_no_score(make_engine: Make, pieces: list[Continuation], room: int) -> None:
    """Each score equals that of a forward pass of its own, for any sharing and any size of the cache."""
    engine = make_engine(room=room)
    score_continuations(engine.backend, engine.pool, pieces)
    for piece in pieces:
        assert piece.logprobs == pytest.approx(by_hand(engine, piece.tokens, piece.begin), abs=1e-5)


def test_a_prompt_may_fill_all_positions_while_others_continue(make_engine: Make) -> None:
    """128 positions, all fed; learned positions have no entry beyond them."""
    engine = make_engine(positions="learned", qk_norm="none")
    full = [5] * 128
    pieces = [
        Continuation(0, [*full, 6], 128),
        Continuation(0, [*full, 7], 128),
        Continuation(1, [6, 7, 8, 9], 2),
        Continuation(1, [6, 7, 9, 9], 2),
    ]
    score_continuations(engine.backend, engine.pool, pieces)
    for piece in pieces:
        assert piece.logprobs == pytest.approx(by_hand(engine, piece.tokens, piece.begin), abs=1e-5)


# Choices


@pytest.mark.parametrize("count", [1, 40])  # few prompts: their rows are repeated; many: choices take turns
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_choices_are_scored_as_one_by_one(
    make_engine: Make, count: int, end: bool, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    engine = make_engine(tokenizer)
    header = "Once upon a time there was. "
    prompts = [header + "The quick "[: number % 10] + "x" * (number // 10) + ":" for number in range(count)]
    chosen = engine.choose(prompts, [LABELS] * count, end=end)
    assert tokenizer.eos_id is not None
    ending = [tokenizer.eos_id] if end else []
    for prompt, values in zip(prompts, chosen, strict=True):
        for label, value in zip(LABELS, values, strict=True):
            score = engine.score([(prompt, label)])[0]
            whole = [*tokenizer.encode(prompt + label), *ending]
            expected = by_hand(engine, whole, len(whole) - len(ending) - len(score.tokens))
            assert value == pytest.approx(sum(expected), abs=1e-4)


def test_each_prompt_may_have_choices_of_its_own(make_engine: Make) -> None:
    engine = make_engine()
    prompts, choices = ["The", "Once", "a"], [[" dog"], [" upon a", " fox", " time"], []]
    chosen = engine.choose(prompts, choices)
    assert [len(values) for values in chosen] == [1, 3, 0]
    for prompt, labels, values in zip(prompts, choices, chosen, strict=True):
        for label, value in zip(labels, values, strict=True):
            assert value == pytest.approx(engine.score([(prompt, label)])[0].logprob, abs=1e-5)


def test_shared_tokens_are_computed_once(make_engine: Make, byte_level: Tokenizer) -> None:
    header = "The quick brown fox jumps over the lazy dog. " * 2
    prompts = [f"{header}{number}:" for number in range(40)]
    lengths = [len(byte_level.encode(prompt)) for prompt in prompts]
    shared = len(byte_level.encode(header)) // 4 * 4  # whole pages
    assert shared >= 32 and len(byte_level.encode("7:!")) == 3

    engine = make_engine()
    recording = engine.backend = Recording(engine.backend)
    engine.choose(prompts, [["!", "?"]] * 40)
    # One token each: the choices need no feed of their own, and no prompt is fed twice.
    assert recording.fed == shared + sum(lengths) - 40 * shared
    assert recording.feeds == 2, "the first prompt with the header, and the others"

    engine = make_engine()
    recording = engine.backend = Recording(engine.backend)
    engine.choose(prompts, [["!", "?"]] * 40, end=True)
    assert recording.fed == shared + sum(lengths) - 40 * shared + 40 * 2
    assert recording.feeds == 2 * 2, "and all choices at once after each"


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    continuations(), st.sampled_from([52, 100, 10_000]), st.lists(st.floats(-8, 8), min_size=20, max_size=20)
)
def test_the_best_continuation_is_that_of_all_scores(
    make_engine: Make, pieces: list[Continuation], room: int, offsets: list[float]
) -> None:
    """Whatever is dropped, the best of each group is the one that complete scores give."""
    engine = make_engine(room=room)
    for piece, offset in zip(pieces, offsets, strict=False):
        piece.offset = offset
    score_continuations(engine.backend, engine.pool, pieces, best_only=True)
    for group in {piece.group for piece in pieces}:
        members = [piece for piece in pieces if piece.group == group]
        totals = [sum(by_hand(engine, member.tokens, member.begin)) + member.offset for member in members]
        kept = [member for member in members if not member.dropped]
        assert max(member.bound for member in kept) == pytest.approx(max(totals), abs=1e-4)
        for member, total in zip(members, totals, strict=True):
            assert member.bound >= total - 1e-4
            assert not member.dropped or total <= max(totals) + 1e-4


def test_the_best_choice_is_that_of_choose_with_offsets(make_engine: Make) -> None:
    engine = make_engine()
    prompts = [f"{start}:" for start in ("The", "Once", "a", "日本", "")]
    offsets = [0.0, 3.0, -2.0, 5.0, 1.0, 0.5, 4.0]
    for added in (None, offsets):
        for end in (False, True):
            scores = np.array(engine.choose(prompts, [LABELS] * 5, end=end)) + (0 if added is None else added)
            best = engine.best_choice(prompts, [LABELS] * 5, None if added is None else [added] * 5, end=end)
            assert best == scores.argmax(axis=1).tolist()
    assert engine.best_choice(["The"], [[" fox", " dog", " dog"]], [[-99.0, 0.0, 0.0]]) == [1], (
        "the first of equals"
    )
    with pytest.raises(UserError, match="prompt 2 has no choices"):
        engine.best_choice(["a", "b"], [["x"], []])


def test_choices_that_cannot_be_the_best_are_not_computed_to_their_end(make_engine: Make) -> None:
    engine = make_engine()
    long = [f" {word}" + " and so on" * 4 for word in ("fox", "dog", "time", "one")]
    recording = engine.backend = Recording(engine.backend)
    engine.choose(["The quick brown"], [long])
    all_fed, recording.fed = recording.fed, 0
    assert engine.best_choice(["The quick brown "], [long], [[0.0, -500.0, -500.0, -500.0]]) == [0]
    assert recording.fed < 0.5 * all_fed


def test_the_choices_of_one_prompt_share_a_feed(make_engine: Make) -> None:
    engine = make_engine()
    recording = engine.backend = Recording(engine.backend)
    engine.choose(["The"], [LABELS], end=True)
    assert recording.feeds == 2


def test_the_cache_budget_bounds_scoring(make_engine: Make) -> None:
    engine = make_engine(room=150)
    recording = engine.backend = Recording(engine.backend)
    prompts = [f"The quick {number}" for number in range(30)]
    bounded = engine.choose(prompts, [LABELS] * 30)
    assert 1 < len(recording.pages) <= 150 // 4
    np.testing.assert_allclose(bounded, make_engine().choose(prompts, [LABELS] * 30), atol=1e-5)
