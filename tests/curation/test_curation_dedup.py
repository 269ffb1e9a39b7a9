"""Copies: the hashes against words and sets in plain Python, the detection rate against the formula."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.curation import dedup, hashing
from tercet.curation.dedup import (
    Columns,
    MinHash,
    band_keys,
    exact_duplicates,
    exact_keys,
    near_duplicates,
)
from tercet.curation.hashing import Hashes, gram_hashes, word_hashes
from tercet.data.decontaminate import grams, words

ALPHABET = "aBé ß'’_-.\n\t7٣日本ไทยǄﬁ😀\u0301\U00020000İ"
TEXTS = st.lists(st.text(alphabet=ALPHABET, max_size=40), max_size=8)


class MemoryColumns(Columns):
    """Hashes of documents in memory, in parts of three."""

    def __init__(self, texts: list[str], minhash: MinHash) -> None:
        self._rows = dict(
            zip(
                ["exact0", "exact1", *(f"band{band}" for band in range(minhash.bands))],
                [*exact_keys(texts), *band_keys(texts, minhash)[0]],
                strict=True,
            )
        )

    def parts(self, name: str) -> Iterator[Hashes]:
        row = self._rows[name]
        for start in range(0, len(row), 3):
            yield row[start : start + 3]


def firsts(texts: list[str], minhash: MinHash | None = None) -> list[int]:
    minhash = minhash or MinHash()
    columns = MemoryColumns(texts, minhash)
    return near_duplicates(columns, exact_duplicates(columns, len(texts)), minhash).first.tolist()


def sentence(generator: random.Random, length: int) -> list[str]:
    """Return different words, so that the sizes of sets are known."""
    return [f"w{number}" for number in generator.sample(range(10**9), length)]


def shingles(text: str) -> set[tuple[str, ...]]:
    return set(grams(words(text), 5))


def jaccard(left: str, right: str) -> float:
    first, second = shingles(left), shingles(right)
    return len(first & second) / len(first | second)


@given(TEXTS)
def test_words_are_those_of_decontamination(texts: list[str]) -> None:
    hashes, bounds = word_hashes(texts)
    expected = [words(text) for text in texts]
    assert np.diff(bounds).tolist() == [len(tokens) for tokens in expected]
    by_word: dict[str, int] = {}
    for word, value in zip(itertools.chain(*expected), hashes.tolist(), strict=True):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


@given(TEXTS, st.integers(1, 6))
def test_ngrams_stay_within_their_text_and_depend_on_order(texts: list[str], n: int) -> None:
    hashes, starts = gram_hashes(*word_hashes(texts), n)
    expected = [list(grams(words(text), n)) for text in texts]
    assert np.diff(starts).tolist() == [len(text_grams) for text_grams in expected]
    by_gram: dict[tuple[str, ...], int] = {}
    for gram, value in zip(itertools.chain(*expected), hashes.tolist(), strict=True):
        assert by_gram.setdefault(gram, value) == value
    assert len(set(by_gram.values())) == len(by_gram)


def test_a_text_longer_than_a_chunk_has_the_same_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = random.Random(1)
    texts = [" ".join(sentence(generator, length)) for length in (300, 3, 0, 40, 2000)]
    whole, bounds = word_hashes(texts)
    monkeypatch.setattr(hashing, "_CHUNK", 64)
    chunked, chunked_bounds = word_hashes(texts)
    assert np.array_equal(whole, chunked)
    assert np.array_equal(bounds, chunked_bounds)


def test_exact_keys_ignore_only_white_space() -> None:
    same, spaced, other, case = exact_keys(["a b\nc", " a  b c\n", "a b d", "A b c"]).T.tolist()
    assert same == spaced
    assert len({tuple(same), tuple(other), tuple(case)}) == 3


@pytest.mark.parametrize("changed", [5, 15, 25, 40])
def test_pairs_are_found_at_the_rate_of_the_formula(changed: int) -> None:
    generator = random.Random(changed)
    pairs, length = 700, 150
    texts: list[str] = []
    for _ in range(pairs):
        original = sentence(generator, length)
        texts += [" ".join(original), " ".join(original[:-changed] + sentence(generator, changed))]
    shared, size = length - changed - 4, length - 4
    similarity = shared / (2 * size - shared)
    assert jaccard(texts[0], texts[1]) == pytest.approx(similarity)
    keys, counts = band_keys(texts, MinHash(seed=3))
    assert (counts == length).all()
    rate = np.mean((keys[:, ::2] == keys[:, 1::2]).any(axis=0))
    expected = 1 - (1 - similarity**8) ** 14
    assert MinHash().probability(similarity) == pytest.approx(expected)
    assert abs(rate - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 1e-3


def test_the_probability_at_the_threshold_is_one_half() -> None:
    minhash = MinHash()
    assert 0.68 < minhash.threshold < 0.70
    assert minhash.probability(minhash.threshold) == pytest.approx(0.5)
    assert minhash.probability(0.75) == pytest.approx(0.772, abs=1e-3)
    assert minhash.probability(0.8) == pytest.approx(0.924, abs=1e-3)


def test_clusters_of_a_small_corpus_match_all_pairwise_similarities() -> None:
    generator = random.Random(7)
    texts = []
    for _ in range(60):
        original = sentence(generator, generator.randint(80, 200))
        texts.append(" ".join(original))
        for _ in range(generator.randint(0, 2)):
            copy = list(original)
            for place in generator.sample(range(len(copy)), generator.choice([0, 1, 1, 30])):
                copy[place] = "other"
            texts.append(" ".join(copy))
    generator.shuffle(texts)
    first = firsts(texts)
    similar_count = different_count = 0
    for later in range(len(texts)):
        similar = [jaccard(texts[earlier], texts[later]) for earlier in range(later)]
        if max(similar, default=0) > 0.9:  # missed with a probability of 1 in 3,000
            similar_count += 1
            assert first[later] == first[int(np.argmax(similar))]
        if max([*similar, *(jaccard(texts[later], text) for text in texts[later + 1 :])], default=0) < 0.1:
            different_count += 1
            assert first[later] == later
    assert similar_count > 10
    assert different_count > 10
    assert all(first[head] == head for head in first)
    assert all(head <= place for place, head in enumerate(first))


def test_the_first_of_a_chain_of_copies_stays() -> None:
    generator = random.Random(3)
    a = sentence(generator, 400)
    b = a[:385] + sentence(generator, 15)
    c = b[15:] + sentence(generator, 15)
    other = " ".join(sentence(generator, 50))
    texts = [other, " ".join(a), " ".join(c), other + "!", " ".join(b), " ".join(b)]
    assert firsts(texts) == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_the_size_of_sorted_pieces_does_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    generator = random.Random(5)
    originals = [" ".join(sentence(generator, 40)) for _ in range(30)]
    texts = [generator.choice(originals) + generator.choice(["", " ", " again"]) for _ in range(80)]
    whole = firsts(texts)
    monkeypatch.setattr(dedup, "_SORTED_AT_ONCE", at_once)
    assert firsts(texts) == whole
    assert len(set(whole)) <= 30


def test_short_texts_are_compared_whole_and_texts_without_words_are_not_compared() -> None:
    texts = ["Good day.", "good day", "day good", "...", "!!!", "", "good", "Good?", "a b c d e", "a b c d"]
    assert firsts(texts) == [0, 0, 2, 3, 4, 5, 6, 6, 8, 9]


def test_an_empty_corpus_has_no_duplicates() -> None:
    assert firsts([]) == []
    assert exact_keys([]).shape == (2, 0)


def test_signatures_depend_on_text_and_seed_only() -> None:
    texts = ["some words that are here to be hashed"]
    keys = [band_keys(texts, MinHash(seed=seed))[0].tolist() for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]
    alone = band_keys(texts, MinHash())[0]
    among = band_keys(["", "other words that stand before it", *texts, "x"], MinHash())[0]
    assert np.array_equal(alone[:, 0], among[:, 2])
