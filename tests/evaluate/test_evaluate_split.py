"""The split: it depends on the content of an example only, not on order, other rows or the prompt."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.evaluate.split import assign, content_id, normalise, position

TEXTS = [f"question number {i} about subject {i * 7919 % 1009}" for i in range(2000)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello, World!", "hello world"),
        ("  spaces\tand\nlines ", "spaces and lines"),
        ("don't", "dont"),
        ("well-known", "well known"),
        ("ＦＵＬＬ width", "full width"),
        ("STRASSE", "straße"),
    ],
)
def test_case_spaces_and_punctuation_make_no_difference(first: str, second: str) -> None:
    assert normalise(first) == normalise(second)
    assert content_id(first) == content_id(second) and position(first) == position(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("3 - 4", "3 * 4"),
        ("3+4", "3-4"),
        ("1.5", "15"),
        (":)", ":("),
        ("good 😀", "good 😡"),
        ("a < b", "a > b"),
    ],
)
def test_symbols_with_a_meaning_stay(first: str, second: str) -> None:
    assert normalise(first) != normalise(second)


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert content_id(text) == content_id(text.upper().lower()) or text.lower() != text.upper().lower()
    assert 0 <= position(text) < 1
    assert len(content_id(text)) == 16
    assert "  " not in normalise(text) and normalise(text) == normalise(text).strip()


def test_the_position_is_the_published_hash() -> None:
    digest = hashlib.sha256(b"hello world").digest()
    assert content_id("Hello, world!") == digest.hex()[:16]
    assert position("Hello, world!") == pytest.approx(int.from_bytes(digest[:8], "big") / 2**64)


def test_splits_have_about_their_shares() -> None:
    splits = assign(TEXTS)
    assert 250 <= splits.count("test") <= 350  # 300 expected; three standard deviations
    assert 160 <= splits.count("dev") <= 240
    assert splits.count("train") == len(TEXTS) - splits.count("test") - splits.count("dev")


@given(st.randoms(use_true_random=False), st.integers(1, 300))
def test_neither_order_nor_other_rows_matter(shuffle: random.Random, keep: int) -> None:
    whole = dict(zip(TEXTS[:300], assign(TEXTS[:300]), strict=True))
    sample = shuffle.sample(TEXTS[:300], keep)
    assert assign(sample) == [whole[text] for text in sample]


def test_a_cap_takes_the_smallest_positions_and_leaves_the_rest_to_train() -> None:
    texts = [f"text {i}" for i in range(12_000)]
    splits = assign(texts)
    assert splits.count("test") == 1000 and splits.count("dev") == 500
    test = [position(text) for text, split in zip(texts, splits, strict=True) if split == "test"]
    rest = [position(text) for text, split in zip(texts, splits, strict=True) if split != "test"]
    assert max(test) < min(rest)


def test_sizes_may_be_numbers_or_shares() -> None:
    splits = assign(TEXTS, test=50, dev=20)
    assert (splits.count("test"), splits.count("dev")) == (50, 20)
    half = assign(TEXTS, test=0.5, dev=0.25)
    assert 930 <= half.count("test") <= 1070 and 440 <= half.count("dev") <= 560
    order = sorted(TEXTS, key=position)
    assert {text for text, split in zip(TEXTS, splits, strict=True) if split == "test"} == set(order[:50])
    assert {text for text, split in zip(TEXTS, splits, strict=True) if split == "dev"} == set(order[50:70])


def test_a_given_test_file_leaves_only_dev_to_choose() -> None:
    splits = assign(TEXTS, given_test=True)
    assert splits.count("test") == 0 and 160 <= splits.count("dev") <= 240
    assert {text for text, split in zip(TEXTS, splits, strict=True) if split == "dev"} == {
        text for text in TEXTS if position(text) < 0.10
    }
