"""The corpus of a build: texts on disk, the held-out part, the stream of tokens."""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_text import SMALL, spool_of, text_of

from tercet.compose import build
from tercet.pretrain.corpus import PIECE, pieces, split, write_stream
from tercet.pretrain.vocabulary import train_tokenizer


def test_a_spool_returns_its_texts_and_deletes_its_file(tmp_path: Path) -> None:
    texts = ["one", "", "zwei é 北京 🙂", "\n"]
    with spool_of(tmp_path / "texts", texts) as spool:
        assert list(spool) == texts and spool[2] == texts[2]
        assert list(spool.lengths) == list(map(len, texts))
        assert spool.total_bytes == len("".join(texts).encode())
    assert not list(tmp_path.iterdir())


def test_held_out_documents_are_chosen_by_content(tmp_path: Path) -> None:
    texts = [text_of(seed) for seed in range(400)]

    def held_of(texts: list[str]) -> tuple[list[str], list[str]]:
        with spool_of(tmp_path / "texts", texts) as spool:
            parts = split(spool)
            return [text for _, text in parts.train(spool)], [text for _, text in parts.heldout(spool)]

    train, held = held_of(texts)
    assert sorted(train + held) == sorted(texts)
    assert 0.09 < sum(map(len, held)) / sum(map(len, texts)) < 0.12, "a tenth of a small corpus"
    assert set(held_of(texts[::-1])[1]) == set(held), "in any order"
    extended = held_of([*texts, "another document"])[1]
    assert len(set(held) ^ set(extended)) <= 2, "an added document moves no other, except at the edge"


def test_at_most_twice_the_share_is_held_out_of_long_texts(tmp_path: Path) -> None:
    """A book of 4% of a corpus was once held out whole, for a share of 1%."""
    books = ["".join(f"line {number} of {book}\n" for number in range(4000)) for book in range(30)]
    chapters = [text_of(seed, 600) for seed in range(60)]
    for texts in (books, books + chapters):
        with spool_of(tmp_path / "texts", texts) as spool:
            parts = split(spool)
            held = sum(len(text) for _, text in parts.heldout(spool))
            train = sum(len(text) for _, text in parts.train(spool))
        total = sum(map(len, texts))
        assert train + held == total
        assert 0.005 < held / total < 0.025


def test_a_passage_of_a_single_long_text_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(10_000))
    with spool_of(tmp_path / "texts", [text]) as spool:
        parts = split(spool)
        train, [(_, held)] = [part for _, part in parts.train(spool)], list(parts.heldout(spool))
    assert held.join(train) == text and len(train) == 2
    assert held.startswith("line ") and held.endswith("\n")
    assert 0.05 < len(held) / len(text) < 0.2


def test_a_passage_of_each_of_a_few_books_is_held_out(tmp_path: Path) -> None:
    """One book of 48 was once held out, and its loss was reported for all."""
    books = [
        "".join(f"line {number} of {book}\n" for number in range(4000 + 50 * book)) for book in range(48)
    ]
    with spool_of(tmp_path / "texts", books) as spool:
        parts = split(spool)
        train, held = list(parts.train(spool)), list(parts.heldout(spool))
        assert split(spool) == parts
    assert [index for index, _ in held] == list(range(48))
    for index, part in held:
        assert part.join(text for owner, text in train if owner == index) == books[index]
        assert 0.005 < len(part) / len(books[index]) < 0.02
    places = [books[index].index(part) / len(books[index]) for index, part in held]
    assert min(places) < 0.2 and max(places) > 0.8, "from anywhere in a book"


def test_only_the_longest_of_very_short_texts_are_held_out(tmp_path: Path) -> None:
    texts = ["x" * 30] * 5 + ["".join(f"line {number}\n" for number in range(1000))] + ["yy"] * 3
    with spool_of(tmp_path / "texts", texts) as spool:
        held = list(split(spool).heldout(spool))
    assert [index for index, _ in held] == [5] and len(held[0][1]) > 500


def test_documents_are_separated_by_end_of_text_tokens() -> None:
    tokenizer = train_tokenizer([text_of(seed) for seed in range(50)], 300)
    file = io.BytesIO()
    starts = write_stream(tokenizer, ["the cat", "a dog"], file)
    first, second = tokenizer.encode("the cat"), tokenizer.encode("a dog")
    assert np.frombuffer(file.getvalue(), np.uint16).tolist() == [0, *first, 0, *second, 0]
    assert starts.tolist() == [1, 2 + len(first), len(file.getvalue()) // 2]


@functools.cache
def own_tokenizer(whitespace: Any) -> Any:
    """Return a tokenizer trained on the text that it will read, so that its merges are as long as words allow."""
    texts = ["a.\n\nit's 12\n a\t\n\n\na  .\r\n\u00a0a\n" * 100]
    return train_tokenizer(texts, 400, whitespace=whitespace)


WHITE = ["\n", "\n\n", " ", "\t", "\r\n", "\u00a0", "\u2028"]


@given(
    st.lists(st.sampled_from([*WHITE, "a", "it's", ".", "'", "12", "\u00e9\u0301"]), max_size=60),
    st.integers(1, 12),
    st.sampled_from(["word", "apart"]),
)
@settings(max_examples=200, deadline=None)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(words: list[str], size: int, whitespace: Any) -> None:
    tokenizer = own_tokenizer(whitespace)
    text = "".join(words)
    parts = pieces(text, size)
    assert "".join(parts) == text
    whole = tokenizer.encode(text, special=False)
    assert [token for part in parts for token in tokenizer.encode(part, special=False)] == whole


def test_a_text_without_word_boundaries_is_still_cut() -> None:
    text = "A" * (4 * PIECE + 10)
    assert [len(piece) for piece in pieces(text)] == [2 * PIECE, 2 * PIECE, 10]


def test_a_very_long_line_is_read_as_far_as_the_budget_needs(tmp_path: Path) -> None:
    """Memory and time once grew with the line: 200 MB took all memory of a machine."""
    line = " ".join(text_of(seed, 1000).replace("\n", " ") for seed in range(20)) * 40
    assert len(line) > 3_000_000
    (tmp_path / "line.txt").write_text(line)
    made = build(tmp_path / "line.txt", tmp_path / "run", tokens=512, **SMALL)
    read = made.corpus.bytes + made.corpus.heldout_bytes
    assert not made.corpus.complete
    assert 400_000 < read < 700_000
