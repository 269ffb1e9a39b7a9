"""What would change a verdict, against simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tercet.evaluate.statistics import mcnemar_exact
from tercet.ladder.outlook import needed_examples, outlook
from tercet.ladder.result import Difference, RungResult


def rung(name: str, difference: Difference | None = None, **details: Any) -> RungResult:
    return RungResult(
        name,
        "prompt",
        score=0.7,
        low=0.6,
        high=0.8,
        differences=[difference] if difference else [],
        details=details,
    )


def test_the_number_of_examples_shows_the_difference_four_times_in_five() -> None:
    """Two rungs that differ on 16% of the examples, by 4 points: how often does McNemar's test see it?"""
    n, better, worse = 200, 0.10, 0.06
    difference = better - worse
    error = np.sqrt((better + worse - difference**2) / n)
    entry = Difference(
        "a", difference, difference - 1.96 * error, difference + 1.96 * error, 0.3, "McNemar exact"
    )
    needed = needed_examples(entry, n)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(needed, [better, worse, 1 - better - worse], 400)
    power = np.mean([mcnemar_exact(int(up), int(down)) < 0.05 for up, down, _ in counts])
    assert 0.72 < power < 0.86


def test_a_better_but_uncertain_rung_says_how_many_examples_are_needed() -> None:
    entry = Difference("cheap", 0.03, -0.01, 0.07, 0.15, "McNemar exact")
    [line] = outlook([rung("cheap"), rung("dear", entry)], "cheap", 300, 1000)
    assert line == (
        "dear scores 3.0 percentage points more than cheap here. If that is the true difference, about 1,100 test "
        "examples would show it; there were 300."
    )


@pytest.mark.parametrize("difference", [0.0, -0.05, 0.002])
def test_no_gain_gets_no_advice(difference: float) -> None:
    entry = Difference("cheap", difference, difference - 0.04, difference + 0.04, 0.5, "paired bootstrap")
    assert outlook([rung("cheap"), rung("dear", entry)], "cheap", 300, 1000) == []


def test_time_and_labels_are_named_where_they_were_measured() -> None:
    results = [
        rung("tfidf", dev_accuracy=0.74, dev_accuracy_with_half=0.70),
        rung("lora", **{"with more time": "3 epochs need 34 minutes"}),
        RungResult("full", "tune", "failed", reason="not enough memory"),  # listed with its reason elsewhere
    ]
    more, labels = outlook(results, "tfidf", 300, 2936)
    assert more == "lora: 3 epochs need 34 minutes."
    assert labels.startswith("More labelled examples would help: tfidf gained 4.0 percentage points on dev")
    [little] = outlook([rung("tfidf", dev_accuracy=0.74, dev_accuracy_with_half=0.738)], "tfidf", 300, 2936)
    assert little.startswith("More labelled examples promise little")
