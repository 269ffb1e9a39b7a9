from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tercet.data.fewshot import Example, Method, ShotSelector, few_shot_messages, few_shot_text, separator
from tercet.errors import UserError


def choose(
    train: list[Example],
    k: int,
    labels: list[str] | None = None,
    seed: int = 0,
    method: Method = "balanced",
    query: str | None = None,
) -> list[Example]:
    return ShotSelector(train, k, labels, seed, method).choose(query)


TRAIN = [Example(f"text {number}", "spam" if number % 5 == 0 else "ham") for number in range(50)]
LABELS = ["ham", "spam"]


def test_balanced_shots_take_the_labels_in_turn() -> None:
    shots = choose(TRAIN, 6, LABELS, seed=1)
    assert Counter(shot.target for shot in shots) == {"ham": 3, "spam": 3}
    assert len(set(shots)) == 6
    assert set(shots) <= set(TRAIN)


def test_a_label_without_examples_left_is_passed_over() -> None:
    train = [*[Example(f"h{n}", "ham") for n in range(8)], Example("s", "spam")]
    assert Counter(shot.target for shot in choose(train, 6, LABELS)) == {"ham": 5, "spam": 1}


def test_shots_depend_only_on_the_seed() -> None:
    assert choose(TRAIN, 6, LABELS, seed=3) == choose(TRAIN, 6, LABELS, seed=3)
    assert len({tuple(choose(TRAIN, 6, LABELS, seed=seed)) for seed in range(5)}) == 5


def test_open_tasks_draw_from_all_examples() -> None:
    train = [Example(str(n), f"answer {n}") for n in range(10)]
    assert len(set(choose(train, 4, seed=2))) == 4


def test_nearest_shots_end_with_the_nearest() -> None:
    train = [
        Example("open a network socket to a server", "network"),
        Example("parse the date and time of day", "time"),
        Example("listen on a socket of the network", "network"),
        Example("bake bread in an oven", "food"),
    ]
    selector = ShotSelector(train, 2, method="characters")
    shots = selector.choose("listen on a network socket")
    assert [shot.input for shot in shots] == [
        "open a network socket to a server",
        "listen on a socket of the network",
    ]
    assert selector.choose("what time of day")[-1].target == "time"


def test_nearest_works_on_texts_of_one_character_and_on_empty_ones() -> None:
    train = [Example("好", "a"), Example("", "b"), Example("坏", "c")]
    assert choose(train, 1, method="characters", query="好")[0].target == "a"
    assert len(choose(train, 3, method="characters", query="")) == 3


def test_retrieval_compares_the_text_and_not_the_words_that_all_inputs_share() -> None:
    train = [
        Example("Text: apple pie. Label:", "food", "apple pie"),
        Example("Text: Label:", "none", "text label"),
    ]
    assert choose(train, 1, method="bm25", query="an apple")[0].target == "food"
    assert choose(train, 1, method="bm25", query="label")[0].target == "none"


def test_the_nearest_can_come_first() -> None:
    train = [Example("red car", "a"), Example("red cars drive", "b"), Example("blue sky", "c")]
    last = ShotSelector(train, 2, method="characters").choose("red car")
    first = ShotSelector(train, 2, method="characters", order="nearest first").choose("red car")
    assert last == first[::-1]
    assert first[0].target == "a"


def test_diverse_shots_are_near_and_unlike_each_other() -> None:
    same = [Example(f"open the red door {word}", word) for word in ("now", "now!", "now.")]
    train = [*same, Example("open a window", "window"), Example("bake bread", "bread")]
    near = {shot.target for shot in choose(train, 2, method="characters", query="open the red door now")}
    diverse = {shot.target for shot in choose(train, 2, method="diverse", query="open the red door now")}
    assert near <= {"now", "now!", "now."}
    assert "window" in diverse


def test_the_nearest_by_vectors_ignore_what_all_vectors_share() -> None:
    directions = {
        "cat": [5, 1, 0],
        "lion": [5, 0.9, 0.1],
        "car": [5, 0, 1],
        "bus": [5, 0.1, 0.9],
        "tiger": [5, 1, 0.2],
    }

    def embed(texts: Sequence[str]) -> Any:
        return np.array([directions[text] for text in texts], np.float32)

    train = [Example(f"{text}?", text, text) for text in ("car", "lion", "bus", "cat")]
    shots = ShotSelector(train, 2, method="embedding", embed=embed).choose("tiger")
    assert {shot.target for shot in shots} == {"lion", "cat"}
    with pytest.raises(UserError, match="needs `embed`"):
        ShotSelector(train, 2, method="embedding")


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(UserError, match="9 shots from 3 train examples"):
        choose(TRAIN[:3], 9, LABELS)
    with pytest.raises(UserError, match="balanced, characters, bm25"):
        choose(TRAIN, 2, method="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="for a query"):
        choose(TRAIN, 2, method="characters")
    with pytest.raises(UserError, match="'spam', which is not among"):
        choose(TRAIN, 2, ["ham", "eggs"])


def test_the_text_for_a_base_model_ends_with_the_unanswered_query() -> None:
    shots = [Example("Text: a\nLabel:", "ham"), Example("Text: b\nLabel:\n", "spam")]
    assert few_shot_text(shots, "Text: c\nLabel:", "Sort these.") == (
        "Sort these.\n\nText: a\nLabel: ham\n\nText: b\nLabel:\nspam\n\nText: c\nLabel:"
    )
    assert few_shot_text([], "Text: c\nLabel:") == "Text: c\nLabel:"
    assert separator("Label:") == " "
    assert separator("Label:\n") == ""


def test_the_conversation_for_a_chat_model_shows_shots_as_exchanges() -> None:
    assert few_shot_messages([Example("a?", "b")], "c?", "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
