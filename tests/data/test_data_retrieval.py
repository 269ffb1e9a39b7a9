from __future__ import annotations

import math

import numpy as np
import pytest

from tercet.data import retrieval
from tercet.data.retrieval import METHODS, Method, Retriever, words
from tercet.errors import UserError

TEXTS = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "cats and dogs",
    "a long text about the habits of a cat and of a second cat",
]


def by_hand(query: list[str], text: list[str], texts: list[list[str]]) -> float:
    """Return Okapi BM25 as equations 3.3 and 3.15 of Robertson & Zaragoza (2009), with 1 added within the log."""
    mean = sum(map(len, texts)) / len(texts)
    total = 0.0
    for term in query:
        containing = sum(term in other for other in texts)
        count = text.count(term)
        weight = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
        total += count / (count + 1.2 * (0.25 + 0.75 * len(text) / mean)) * weight
    return total


def test_bm25_agrees_with_the_formula() -> None:
    query, split = "the cat and the log", [text.split() for text in TEXTS]
    expected = [by_hand(query.split(), text, split) for text in split]
    assert Retriever(TEXTS, "bm25").similarities([query])[0] == pytest.approx(expected)


def test_the_cosine_of_a_text_with_itself_is_one_and_with_an_unrelated_text_zero() -> None:
    for method in ("tfidf", "characters"):
        retriever = Retriever(TEXTS, method)  # type: ignore[arg-type]
        assert np.diag(retriever.similarities(TEXTS)) == pytest.approx(1)
        assert not retriever.similarities(["xyzzy"]).any()


def test_character_n_grams_match_inflected_words_and_words_do_not() -> None:
    texts = ["a walk", "the moon"]
    assert Retriever(texts, "characters").similarities(["walked"])[0].argmax() == 0
    assert not Retriever(texts, "bm25").similarities(["walked"]).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_nearest_come_first_and_equal_ones_in_the_order_of_the_texts(method: Method) -> None:
    texts = ["other words", "red apple", "green pear", "red apple", "red apple tree"] * 3
    retriever = Retriever(texts, method)
    neighbours = retriever.nearest(["red apple", "nothing at all shared"], 15)
    row = retriever.similarities(["red apple"])[0]
    assert neighbours.indices[0].tolist() == sorted(range(15), key=lambda index: (-row[index], index))
    assert neighbours.indices[0, :6].tolist() == [1, 3, 6, 8, 11, 13]
    assert neighbours.similarities[0].tolist() == row[neighbours.indices[0]].tolist()
    few = retriever.nearest(["red apple", "nothing at all shared"], 4)
    assert few.indices.tolist() == neighbours.indices[:, :4].tolist()


def test_more_neighbours_than_texts_are_all_texts() -> None:
    assert Retriever(TEXTS).nearest(["cat"], 9).indices.shape == (1, 4)
    assert Retriever(TEXTS).nearest([], 2).indices.shape == (0, 2)


def test_scripts_without_spaces_are_compared_by_characters_and_pairs() -> None:
    assert words("Tercet 梯级") == ["tercet", "梯", "级", "梯级"]
    texts = ["今天天气很好", "我想订一张机票", "ห้องสมุดปิดกี่โมง"]
    for method in METHODS:
        nearest = Retriever(texts, method).nearest(["明天天气怎么样", "帮我订机票", "ห้องสมุดอยู่ที่ไหน"], 1)
        assert nearest.indices[:, 0].tolist() == [0, 1, 2], method


@pytest.mark.parametrize("method", METHODS)
def test_texts_without_words_can_be_searched(method: Method) -> None:
    assert Retriever([":)", "", ":("], method).nearest([":(", "  "], 1).indices[:, 0].tolist() == [2, 1]
    assert Retriever([""], method).nearest(["", "text"], 1).indices[:, 0].tolist() == [0, 0]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="the methods are bm25, tfidf, characters"):
        Retriever(TEXTS, "bm26")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no texts to retrieve from"):
        Retriever([])
    with pytest.raises(UserError, match="0 nearest texts; take 1 or more"):
        Retriever(TEXTS).nearest(["cat"], 0)


def test_the_number_of_queries_at_once_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = Retriever(TEXTS)
    together = retriever.nearest(TEXTS, 2)
    monkeypatch.setattr(retrieval, "_CELLS", 8)  # two queries at once
    assert retriever.nearest(TEXTS, 2).indices.tolist() == together.indices.tolist()
