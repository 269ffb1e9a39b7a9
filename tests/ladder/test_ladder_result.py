"""The rule that recommends a rung, and results before and after JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tercet.errors import UserError
from tercet.evaluate.result import Measurement, Prediction
from tercet.ladder.recommend import recommend
from tercet.ladder.result import RULE, Difference, Level, Report, RungResult, Step


def rung(name: str, score: float, level: Level = "tune", **gains: tuple[float, float, float]) -> RungResult:
    """gains: to each cheaper rung (low, high, p)."""
    differences = [
        Difference(to, (low + high) / 2, low, high, p, "McNemar exact")
        for to, (low, high, p) in gains.items()
    ]
    return RungResult(name, level, score=score, low=score - 0.05, high=score + 0.05, differences=differences)


def test_a_more_expensive_rung_must_be_significantly_better() -> None:
    ladder = [
        rung("majority", 0.3, "baseline"),
        rung("tfidf", 0.8, "baseline", majority=(0.4, 0.6, 0.0001)),
        rung("lora", 0.82, majority=(0.4, 0.6, 0.0001), tfidf=(-0.01, 0.05, 0.2)),
    ]
    name, reason = recommend(ladder)
    assert name == "tfidf"
    assert "80.0%" in reason and "50.0 percentage points more than majority" in reason
    assert "lora, scores 2.0 percentage points more, which is not a significant difference" in reason


def test_a_rung_is_compared_with_the_current_choice_and_not_with_the_best_before_it() -> None:
    # b is a little better than a, c a little better than b, and c measurably better than a.
    ladder = [
        rung("a", 0.70),
        rung("b", 0.72, a=(-0.01, 0.05, 0.2)),
        rung("c", 0.75, a=(0.01, 0.09, 0.01), b=(-0.01, 0.07, 0.1)),
    ]
    assert recommend(ladder)[0] == "c"


def test_with_few_examples_an_interval_above_zero_is_not_enough() -> None:
    # 3 against 0 of 3 examples: the bootstrap's interval is [1, 1], McNemar's p is 0.25.
    assert recommend([rung("a", 0.0), rung("b", 1.0, a=(1.0, 1.0, 0.25))])[0] == "a"


def test_failed_rungs_are_skipped() -> None:
    ladder = [
        RungResult("majority", "baseline", "failed", reason="no"),
        rung("a", 0.5),
        RungResult("b", "tune", "failed", reason="no"),
        rung("c", 0.9, a=(0.2, 0.6, 0.001)),
    ]
    assert recommend(ladder)[0] == "c"


def test_the_reason_says_that_no_rung_is_better_than_majority() -> None:
    name, reason = recommend(
        [rung("majority", 0.9, "baseline"), rung("lora", 0.89, majority=(-0.03, 0.01, 0.5))]
    )
    assert name == "majority"
    assert "majority (90.0%), which always gives the most frequent answer" in reason


def test_the_reason_names_a_single_rung_or_none() -> None:
    broken = RungResult("lora", "tune", "failed", reason="no memory")
    assert recommend([rung("tfidf", 0.8), broken]) == (
        "tfidf", "tfidf is the only rung that succeeded (80.0%), so there is nothing to compare it with.",
    )  # fmt: skip
    name, reason = recommend([broken])
    assert name is None and "No rung succeeded" in reason


def test_the_rule_names_its_conditions() -> None:
    assert "cheapest" in RULE and "95% interval" in RULE and "0.05" in RULE and "tie" in RULE


def test_a_report_is_equal_after_json() -> None:
    gain = Difference("majority", 0.5, 0.4, 0.6, 0.001, "McNemar exact")
    result = RungResult(
        "lora", "tune", score=0.8, low=0.7, high=0.9, differences=[gain], difference=gain, cost_per_thousand=0.2,
        details={"rank": 16, "targets": ["q_proj"]}, predictions="rungs/lora/predictions.jsonl",
    )  # fmt: skip
    failed = RungResult("full", "tune", "failed", reason="out of memory")
    report = Report(
        "t", 3, "accuracy", 10, 5, 5, [result, failed], "lora", "because", labels=["a", "b"], base={"tokens": 5},
        decontamination={"removed": 2}, machine={"cores": 2}, versions={"tercet": "0"}, notes=["n"],
        next_steps=[Step("w", "c")],
    )  # fmt: skip
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    prediction = Prediction("id", "text", "target", 1.0, 3, 0.1, None)
    assert Prediction.from_json(json.loads(json.dumps(prediction.to_json()))) == prediction


def test_results_that_contradict_themselves_are_refused() -> None:
    scored: dict[str, Any] = {"score": 1.0, "low": 1.0, "high": 1.0}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"level": "tune"}, "is ok but has no score"),
        ({"level": "tune", "status": "failed"}, "failed without a reason"),
        ({"level": "hill", **scored}, "level is 'hill'"),
        ({"level": "tune", "status": "maybe", **scored}, "status is 'maybe'"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            RungResult("a", **fields)
    with pytest.raises(UserError, match="failed without a reason"):
        RungResult.from_json({"name": "a", "level": "tune", "status": "failed"})
    with pytest.raises(UserError, match="not a prediction: it has no field 'score'"):
        Prediction.from_json({"id": "1", "text": "", "target": ""})


def test_an_evaluation_has_the_form_of_a_rung_in_the_report() -> None:
    measurement = Measurement(
        "3-shot", score=0.5, low=0.4, high=0.6, latency_p50=0.1, latency_p95=0.2, prompt_tokens=30,
        completion_tokens=3, cost_per_thousand=None, size_bytes=7, details={"split": "dev"},
    )  # fmt: skip
    result = RungResult.measured("prompt", measurement)
    assert RungResult.from_json(measurement.to_json()) == result
    assert measurement.to_json() == result.to_json() and list(measurement.to_json()) == list(result.to_json())
