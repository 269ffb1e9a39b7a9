"""Held-out bits per byte and minimal pairs, against transformers on the same tokens and sums by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tercet.data.minimal_pairs import Pair
from tercet.errors import UserError
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.train.compilation import compile_blocks
from tercet.train.evaluate import heldout_bits, pair_accuracy, token_losses
from tiny_checkpoints import Make

sys.path.insert(0, str(Path(__file__).parents[1] / "prompt"))  # holds a model with a tokenizer

from tiny_model import CONTEXT, write_model

END = 2
VOCABULARY = 61
# Token t stands for t % 4 bytes; the end-of-text token is special.
BYTES = np.array([0 if token == END else token % 4 for token in range(VOCABULARY)])


def corpus(lengths: list[int], seed: int = 0) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """A stream of random documents with these lengths, their ends not counted, and where each begins."""
    draw = np.random.default_rng(seed)
    pieces, starts = [np.array([END])], []
    for length in lengths:
        starts.append(sum(map(len, pieces)))
        pieces.append(np.append(draw.integers(3, VOCABULARY, length), END))
    return np.concatenate(pieces).astype(np.uint16), np.array(starts)


def reference(theirs: Any, ids: NDArray[Any], begin: int = 1) -> NDArray[np.float64]:
    """-log p of ``ids[begin:]``, one row at a time, by transformers."""
    row = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        logits = theirs(row[None, :-1]).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    return losses.numpy()[begin - 1 :]


@pytest.fixture
def both(make: Make) -> tuple[Any, Transformer]:
    theirs, directory = make("qwen3")
    return theirs, load_model(directory)


def test_losses_equal_those_of_transformers_row_by_row(both: tuple[Any, Transformer]) -> None:
    theirs, model = both
    draw = np.random.default_rng(1)
    rows = [draw.integers(0, VOCABULARY, length) for length in (2, 17, 5, 60, 5, 33, 2)]
    begins = [1, 4, 4, 1, 2, 32, 1]
    for batch_tokens in (1, 64, 4096):
        results = token_losses(model, rows, begins, batch_tokens=batch_tokens)
        for row, begin, losses in zip(rows, begins, results, strict=True):
            assert losses.dtype == np.float32 and len(losses) == len(row) - begin
            np.testing.assert_allclose(losses, reference(theirs, row, begin), atol=2e-4)


def test_rotary_frequencies_that_depend_on_the_length_do_not_see_the_padding(make: Make) -> None:
    scaled = {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}
    theirs, directory = make("llama", **scaled)
    # Ascending: transformers keeps the frequencies of the longest row it has seen.
    rows = [np.arange(3, 3 + length) for length in (9, 25, 40)]
    for row, losses in zip(rows, token_losses(load_model(directory), rows, 1), strict=True):
        np.testing.assert_allclose(losses, reference(theirs, row), atol=2e-4)


def test_a_row_without_scored_tokens_is_refused(both: tuple[Any, Transformer]) -> None:
    assert token_losses(both[1], [], 1) == []
    for row, begin in (([1], 1), ([1, 2], 0), ([1, 2], 2)):
        with pytest.raises(ValueError, match="each row must have an unscored first token"):
            token_losses(both[1], [np.array(row)], begin)


def test_the_model_is_left_as_it_was(both: tuple[Any, Transformer]) -> None:
    model = both[1].train()
    model.compute_dtype = torch.bfloat16
    token_losses(model, [np.array([1, 2, 3])], 1, dtype=torch.float32)
    assert model.training and model.compute_dtype is torch.bfloat16
    model.hidden(torch.tensor([[1, 2, 3]])).sum().backward()  # type: ignore[no-untyped-call]


def test_compiled_blocks_do_not_meet_the_many_shapes_of_held_out_text(both: tuple[Any, Transformer]) -> None:
    model = both[1]
    rows = [np.arange(3, 5 + length) for length in range(12)]
    plain = token_losses(model, rows, 1, batch_tokens=1)
    compile_blocks(model, backend="eager")
    compiled = token_losses(model, rows, 1, batch_tokens=1)
    assert all(np.array_equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_heldout_sums_by_hand(both: tuple[Any, Transformer]) -> None:
    theirs, model = both
    stream, starts = corpus([5, 0, 30, 9, 1])
    sources = np.array([1, 1, 0, 1, 0], dtype=np.uint16)
    result = heldout_bits(model, stream, starts, sources, ["web", "books"], BYTES, 8, tokens_per_source=None)
    sums = {"web": np.zeros(4), "books": np.zeros(4)}
    for start, length, source in zip(starts, [5, 0, 30, 9, 1], sources, strict=True):
        for first in range(start, start + length + 1, 8):  # windows of 8 predictions, the end one of them
            window = stream[first - 1 : min(first + 8, start + length + 1)]
            losses, sizes = reference(theirs, window), BYTES[window[1:]]
            text = losses[sizes > 0].sum()
            sums[["web", "books"][source]] += [losses.sum(), len(losses), text, sizes.sum()]
    for report, (nats, tokens, text, size) in [
        (result, sum(sums.values())),
        *((result["sources"][name], sums[name]) for name in sums),
    ]:
        assert report["tokens"] == tokens and report["bytes"] == size
        assert report["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert report["bits_per_byte"] == pytest.approx(text / math.log(2) / size, rel=1e-5)
    assert result["tokens"] == len(stream) - 1


def test_the_last_start_may_be_the_end_of_the_stream(both: tuple[Any, Transformer]) -> None:
    stream, starts = corpus([5, 7])
    sources = np.zeros(2, dtype=np.uint16)
    without_end = heldout_bits(both[1], stream, starts, sources, ["all"], BYTES, 8)
    with_end = heldout_bits(both[1], stream, np.append(starts, len(stream)), sources, ["all"], BYTES, 8)
    assert without_end == with_end


def test_a_stride_gives_every_token_more_of_its_past(both: tuple[Any, Transformer]) -> None:
    theirs, model = both
    stream, starts = corpus([40])
    result = heldout_bits(
        model,
        stream,
        starts,
        np.zeros(1, dtype=np.uint16),
        ["all"],
        BYTES,
        16,
        stride=4,
        tokens_per_source=None,
    )
    total = 0.0
    for first in range(1, len(stream), 4):
        begin = max(0, first - 1 - 12)
        total += reference(theirs, stream[begin : min(first + 4, len(stream))], first - begin).sum()
    assert result["tokens"] == 41 and result["loss"] == pytest.approx(total / 41, rel=1e-5)
    with pytest.raises(ValueError, match="the stride is 17"):
        heldout_bits(model, stream, starts, np.zeros(1, dtype=int), ["all"], BYTES, 16, stride=17)


def test_documents_see_nothing_of_each_other(both: tuple[Any, Transformer]) -> None:
    """A document's own numbers are the same whatever stands before it."""
    stream, starts = corpus([6, 11, 4])
    sources = np.array([0, 1, 0])
    result = heldout_bits(both[1], stream, starts, sources, ["a", "b"], BYTES, 32)["sources"]["b"]
    alone = stream[starts[1] - 1 : starts[2]]
    assert (
        result == heldout_bits(both[1], alone, np.array([1]), np.array([0]), ["b"], BYTES, 32)["sources"]["b"]
    )


def test_a_sample_is_fixed_and_sources_are_weighted_by_their_held_out_tokens(
    both: tuple[Any, Transformer],
) -> None:
    model = both[1]
    stream, starts = corpus([12] * 40 + [9] * 10)
    sources = np.array([0] * 40 + [1] * 10)
    arguments = (model, stream, starts, sources, ["large", "small"], BYTES, 8)
    result = heldout_bits(*arguments, tokens_per_source=100)
    assert result == heldout_bits(*arguments, tokens_per_source=100)
    large, small = result["sources"]["large"], result["sources"]["small"]
    assert 92 < large["tokens"] <= 100 and small["tokens"] == 100
    assert result["tokens"] == large["tokens"] + 100
    # 40 documents of 13 tokens and 10 of 10.
    assert result["loss"] == pytest.approx((520 * large["loss"] + 100 * small["loss"]) / 620)
    every = heldout_bits(*arguments, tokens_per_source=None)
    assert every["sources"]["large"]["tokens"] == 520
    assert large["loss"] != every["sources"]["large"]["loss"]
    # A quarter of the windows, from everywhere: first and last windows of documents alike.
    assert large["loss"] == pytest.approx(every["sources"]["large"]["loss"], rel=0.15)
    smallest = heldout_bits(*arguments, tokens_per_source=1)
    assert 1 <= smallest["sources"]["large"]["tokens"] <= 8


def test_float32_is_asked_for_by_dtype(both: tuple[Any, Transformer]) -> None:
    model = both[1]
    stream, starts = corpus([30, 30])
    arguments = (model, stream, starts, np.zeros(2, dtype=int), ["all"], BYTES, 32)
    exact = heldout_bits(*arguments)
    model.compute_dtype = torch.bfloat16
    rounded = heldout_bits(*arguments)["bits_per_byte"]
    assert rounded != exact["bits_per_byte"] and rounded == pytest.approx(exact["bits_per_byte"], rel=0.05)
    assert heldout_bits(*arguments, dtype=torch.float32) == exact


def test_a_corpus_without_held_out_text_is_refused(both: tuple[Any, Transformer]) -> None:
    with pytest.raises(UserError, match="no text is held out"):
        heldout_bits(both[1], np.array([END]), np.array([]), np.array([]), [], BYTES, 8)
    with pytest.raises(UserError, match="no text is held out"):
        heldout_bits(both[1], np.array([], dtype=np.uint16), np.array([]), np.array([]), [], BYTES, 8)


# Minimal pairs

SENTENCES = [
    "the cat sat.",
    "the cat sit.",
    "dogs run",
    "dogs runs",
    "Ünïcode 日本",
    "two",
    "two mats",
    "a",
    "b b b",
]
PAIRS = [
    Pair(good, bad, f"group {n % 3}")
    for n, good in enumerate(SENTENCES)
    for m, bad in enumerate(SENTENCES)
    if good != bad
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat=False)


def test_pairs_equal_the_sums_of_transformers(directory: Path) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(directory)
    cost = {text: reference(theirs, np.array(tokens(text)["input_ids"])).sum() for text in SENTENCES}
    right: dict[str, list[bool]] = {}
    for pair in PAIRS:
        right.setdefault(pair.group, []).append(cost[pair.good] < cost[pair.bad])
    result = pair_accuracy(load_model(directory), Tokenizer.load(directory), PAIRS)
    assert result["groups"] == {
        group: {"accuracy": sum(rows) / len(rows), "pairs": len(rows)} for group, rows in right.items()
    }
    assert result["pairs"] == len(PAIRS) == 72
    assert result["accuracy"] == 0.5  # each pair is there in both directions
    assert len({group["accuracy"] for group in result["groups"].values()}) > 1


def test_a_prefix_of_the_other_sentence_wins_and_a_tie_is_wrong(directory: Path) -> None:
    model, tokenizer = load_model(directory), Tokenizer.load(directory)
    assert pair_accuracy(model, tokenizer, [Pair("two", "two mats", "a")])["accuracy"] == 1.0
    assert pair_accuracy(model, tokenizer, [Pair("two mats", "two", "a")])["accuracy"] == 0.0
    assert pair_accuracy(model, tokenizer, [Pair("two", "two", "a")])["accuracy"] == 0.0


def test_a_tokenizer_that_adds_nothing_begins_with_the_end_of_text(directory: Path) -> None:
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.post_processor = tokenizers.processors.Sequence([])
    model, usual = load_model(directory), Tokenizer.load(directory)
    # With <s> as end of text the rows are those that the usual tokenizer writes.
    same = Tokenizer.from_backend(plain, eos="<s>")
    assert same.encode("a") == usual.encode("a")[1:]
    assert pair_accuracy(model, same, PAIRS) == pair_accuracy(model, usual, PAIRS)


def test_pairs_that_cannot_be_compared_are_refused(directory: Path) -> None:
    model, tokenizer = load_model(directory), Tokenizer.load(directory)
    with pytest.raises(UserError, match="no minimal pairs"):
        pair_accuracy(model, tokenizer, [])
    long = "x" * (CONTEXT + 1)
    with pytest.raises(
        UserError, match=f"'xxx.* has {CONTEXT + 1} tokens; the model takes at most {CONTEXT}"
    ):
        pair_accuracy(model, tokenizer, [Pair("y", long, "a")])
