"""Test examples and near-copies of them are removed from a corpus; the rest of it stays."""

from __future__ import annotations

import random
import re
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.decontaminate import Decontaminator, passages, words
from tercet.data.document import Document

TEST = "Return the longest common prefix of the given list of path names, or an empty string."


def cleaned(text: str, *tests: str) -> str | None:
    document, _ = Decontaminator(tests).clean(Document(text, "s", "d"))
    return document.text if document else None


def squeezed(text: str) -> str:
    """Return an independent normal form: letters and digits only, words separated by single spaces."""
    return f" {' '.join(re.sub('[^a-z0-9]+', ' ', text.lower()).split())} "


def test_only_the_passage_with_the_test_text_is_removed() -> None:
    text = f"First things first.\n\n{TEST}\n\nLast of all.\n"
    document, removed = Decontaminator(["something else entirely here", TEST]).clean(Document(text, "s", "d"))
    assert document == Document("First things first.\n\nLast of all.\n", "s", "d")
    assert [(passage.passage, passage.test, passage.test_text, passage.document) for passage in removed] == [
        (TEST, 1, TEST, "d")
    ]
    assert removed[0].reason == "holds the whole test text"


@pytest.mark.parametrize(
    "copy",
    [
        TEST.upper(),
        TEST.replace(" ", "\n        "),
        f'def commonprefix(m):\n    """{TEST}"""\n    return m',
        "# " + TEST.replace("of ", "of\n# "),
        "*" + TEST.replace(",", "").replace(" ", " _") + "*",
        f"Before it. {TEST} After it.",
        TEST.replace("longest", "l\uff4fngest"),  # full-width o: the same under NFKC
    ],
)
def test_wrapping_indentation_case_and_punctuation_do_not_hide_a_copy(copy: str) -> None:
    assert cleaned(f"Keep.\n\n{copy}\n\nKeep too.", TEST) == "Keep.\n\nKeep too."


def test_a_copy_with_a_changed_word_is_removed_and_a_text_that_shares_half_a_sentence_stays() -> None:
    # 16 words make 12 5-grams. A change in the middle removes five of them: 7 of 12 remain.
    near = TEST.replace("given", "whole")
    _, removed = Decontaminator([TEST]).clean(Document(near, "s", "d"))
    assert removed[0].share == pytest.approx(7 / 12)
    assert removed[0].reason == "holds 58% of the test text's 5-grams"
    other = "Return the longest common prefix of the two sequences, or None where they differ at once."
    assert cleaned(other, TEST) == other  # 7 words of it: 3 of 12 5-grams


def test_a_copy_divided_by_blank_lines_is_removed_completely() -> None:
    middle = TEST.replace("given ", "given\n\n")
    assert cleaned(f"Keep.\n\n{middle}\n\nKeep too.", TEST) == "Keep.\n\nKeep too."


def test_a_removal_that_joins_the_parts_of_a_test_text_is_noticed() -> None:
    short = "alpha beta gamma delta"
    text = f"alpha beta\n\n{TEST}\n\ngamma delta"
    assert cleaned(text, TEST, short) is None


def test_texts_of_four_words_match_inside_a_passage_and_shorter_ones_only_a_whole_passage() -> None:
    assert cleaned("Then close the open file, please.\n\nKeep.", "Close the open file.") == "Keep."
    assert cleaned("Please close the file.\n\nClose the file!\n\nKeep.", "Close the file") == (
        "Please close the file.\n\nKeep."
    )
    assert cleaned("anything", "", "?!") == "anything"


def test_texts_of_five_to_seven_words_match_completely_or_not_at_all() -> None:
    test = "Raised when the queue is full."
    assert cleaned(f"x {test} y\n\nKeep.", test) == "Keep."
    part = "Raised when the queue is empty."
    assert cleaned(part, test) == part


def test_scripts_without_spaces_are_compared_by_character() -> None:
    test = "返回给定路径列表的最长公共前缀"
    assert cleaned(f"说明{test}结束。\n\n其他内容。", test) == "其他内容。"
    assert cleaned("返回一个空的列表。", test) == "返回一个空的列表。"


def test_an_empty_result_is_none_and_counted() -> None:
    decontaminator = Decontaminator([TEST, "no document has this sentence"])
    documents = [
        Document(TEST, "s", "gone"),
        Document(f"Keep.\n\n{TEST}\n", "s", "touched"),
        Document("Keep.", "s", "whole"),
    ]
    assert [document.id for document in decontaminator.clean_all(documents)] == ["touched", "whole"]
    summary = decontaminator.summary()
    examples = summary.pop("examples")
    assert summary == {
        "test_examples": 2,
        "test_examples_found": 1,
        "documents": 3,
        "documents_touched": 2,
        "documents_dropped": 1,
        "passages_removed": 2,
        "characters": len(TEST) + len(f"Keep.\n\n{TEST}\n") + 5,
        "characters_removed": 2 * len(TEST) + 1,
    }
    assert examples[1] == {
        "document": "touched",
        "passage": TEST,
        "test_text": TEST,
        "reason": "holds the whole test text",
    }


def test_passages_joined_are_the_text() -> None:
    text = "\n\na\n \t\n\nb\nc\n\n\n"
    assert passages(text) == ["\n\n", "a\n \t\n\n", "b\nc\n\n\n"]
    assert words("Don't stop_here: 3.5%") == ["dont", "stop", "here", "3", "5"]


# Few distinct words, so that random texts overlap in every possible way.
sentence = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=14).map(" ".join)
document_text = st.lists(st.tuples(sentence, st.sampled_from(["\n", "\n\n", ". ", "\n \n"])), max_size=8).map(
    lambda parts: "".join(part + end for part, end in parts)
)


@settings(max_examples=300, deadline=None)
@given(document_text, st.lists(sentence, min_size=1, max_size=4), st.data())
def test_a_cleaned_document_never_contains_a_test_text(
    text: str, tests: list[str], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(text)))
    inserted = data.draw(st.sampled_from(tests))
    holder = f"{text[:place]} {inserted} {text[place:]}"
    left, removed = Decontaminator(tests).clean(Document(holder, "s", "d"))
    if len(inserted.split()) >= 4:
        assert removed
    for test in tests:
        if left is not None and len(test.split()) >= 4:
            assert squeezed(test) not in squeezed(left.text)


@settings(max_examples=100, deadline=None)
@given(document_text, st.lists(sentence, min_size=1, max_size=4))
def test_texts_that_share_nothing_are_untouched(text: str, tests: list[str]) -> None:
    apart = [test.upper().translate(str.maketrans("ABCDEF", "UVWXYZ")) for test in tests]
    document = Document(text, "s", "d")
    assert Decontaminator(apart).clean(document) == (document, [])


def test_megabytes_take_seconds() -> None:
    chance = random.Random(0)
    vocabulary = [
        "".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9))) for _ in range(2000)
    ]
    text = "\n\n".join(" ".join(chance.choices(vocabulary, k=60)) for _ in range(5500))
    decontaminator = Decontaminator(" ".join(chance.choices(vocabulary, k=12)) for _ in range(500))
    started = time.process_time()
    decontaminator.clean(Document(text, "s", "d"))
    # 5 MB/s; the rate measured on documentation is 8 to 15 MB/s, so a slow machine passes too.
    assert time.process_time() - started < len(text) / 1e6 / 5 + 1.0
