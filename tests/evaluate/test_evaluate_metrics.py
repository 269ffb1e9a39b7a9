"""Metrics, against scikit-learn, the published definitions, and arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from tercet.errors import UserError
from tercet.evaluate.json_schema import check_schema, conforms
from tercet.evaluate.measure import score_interval
from tercet.evaluate.metrics import load_metric
from tercet.evaluate.result import Prediction
from tercet.ladder.comparison import add_differences, compare
from tercet.ladder.result import RungResult


def score(spec: str | dict[str, object], prediction: str, target: str) -> float:
    return load_metric(spec).score(prediction, target, {})


@pytest.mark.parametrize(
    ("metric", "prediction", "target", "expected"),
    [
        ("accuracy", " spam\n", "spam", 1),
        ("accuracy", "Spam", "spam", 0),
        ("exact_match", "New  York\n", "New York", 1),
        ("exact_match", "new york", "New York", 0),
        ("exact_match", '{"b": [1, 2], "a": "x"}', '{"a":"x","b":[1,2.0]}', 1),
        ("exact_match", '{"a": [2, 1]}', '{"a": [1, 2]}', 0),
        ("exact_match", '{"a": true}', '{"a": 1}', 0),
        ("exact_match", '{"a": 1', '{"a": 1}', 0),
        ("exact_match", "[NaN]", "[1]", 0),
        ("exact_match", "1.0", "1", 0),  # a bare number is text
        ("contains", "It is in  Paris, I think", "in paris", 1),
        ("contains", "It is in London", "paris", 0),
        ("regex", "call 555-1234 now", r"\d{3}-\d{4}", 1),
        ("regex", "call me", r"\d{3}", 0),
        # SQuAD: articles and punctuation out; 2 shared words of 2 and 3: 2*2/5
        ("f1", "The Eiffel Tower!", "eiffel tower paris", 0.8),
        ("f1", "cat cat", "cat", 2 / 3),
        ("f1", "the", "a", 1),
        ("f1", "", "cat", 0),
        # Lin 2004: police kill the gunman / police killed the gunman: LCS 3 of 4 and 4
        ("rouge_l", "police kill the gunman", "police killed the gunman", 0.75),
        ("rouge_l", "the gunman police killed", "police killed the gunman", 0.5),
        ("rouge_l", "", "police", 0),
    ],
)  # fmt: skip
def test_one_answer(metric: str, prediction: str, target: str, expected: float) -> None:
    assert score(metric, prediction, target) == pytest.approx(expected)


def test_rouge_equals_a_search_for_the_longest_common_subsequence() -> None:
    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))

    draw = np.random.default_rng(0)
    for _ in range(60):
        a, b = ([str(word) for word in draw.choice(list("abc"), draw.integers(1, 7))] for _ in range(2))
        assert score("rouge_l", " ".join(a), " ".join(b)) == pytest.approx(
            2 * longest(a, b) / (len(a) + len(b))
        )


def test_a_pattern_compares_its_last_match() -> None:
    metric: dict[str, object] = {"name": "regex", "pattern": r"#### (-?[\d,]+)"}
    assert score(metric, "first #### 3, no: #### 42", "6 * 7 = #### 42") == 1
    assert score(metric, "#### 42 then #### 3", "#### 42") == 0
    assert score(metric, "42", "#### 42") == 0
    with pytest.raises(UserError, match="does not match the target"):
        score(metric, "#### 42", "42")


def _answers(predictions: list[str], targets: list[str]) -> list[Prediction]:
    pairs = zip(predictions, targets, strict=True)
    return [Prediction(str(i), p, t, float(p == t)) for i, (p, t) in enumerate(pairs)]


@pytest.mark.parametrize("classes", [2, 5])
def test_closed_f1_is_scikit_learns_macro_f1(classes: int) -> None:
    labels = [f"class {i}" for i in range(classes)]
    draw = np.random.default_rng(classes)
    targets = [labels[i] for i in draw.integers(0, classes, 200)]
    predictions = [t if draw.random() < 0.6 else str(draw.choice([*labels, "other"])) for t in targets]
    metric = load_metric("f1", [*labels, "never seen"])
    expected = f1_score(
        targets, predictions, labels=[*labels, "never seen"], average="macro", zero_division=0
    )
    measured, low, high = score_interval(metric, _answers(predictions, targets))
    assert measured == pytest.approx(expected)
    assert low < measured < high
    # Each resample is scored as scikit-learn would score it.
    values = metric.values(predictions, targets, [])
    index = draw.integers(0, 200, (3, 200))
    for row, got in zip(index, metric.aggregate(values[index]), strict=True):
        ts, ps = [targets[i] for i in row], [predictions[i] for i in row]
        assert got == pytest.approx(
            f1_score(ts, ps, labels=[*labels, "never seen"], average="macro", zero_division=0)
        )


def test_which_metrics_are_binary() -> None:
    schema = {"name": "json_schema", "schema": {"type": "object"}}
    assert [
        load_metric(name).binary for name in ("accuracy", "exact_match", "contains", "regex", schema)
    ] == [True] * 5
    assert [load_metric(name).binary for name in ("f1", "rouge_l")] == [False, False]
    assert not load_metric("f1", ["a", "b"]).binary


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", "did you mean accuracy?"),
        ("xyzzy", "The metrics are accuracy"),
        ("judge", "needs a hosted model"),
        ({"name": "accuracy", "pattern": "x"}, "has no option 'pattern'; it takes no options"),
        ({"name": "regex", "patern": "x"}, "takes only pattern"),
        ({"name": "regex", "pattern": "("}, "not a regular expression"),
        ({"pattern": "x"}, "must be a name"),
        ("json_schema", "needs a schema"),
        ({"name": "json_schema", "schema": {"type": "strin"}}, "'strin' is not a JSON type"),
        (
            {"name": "json_schema", "schema": {"properties": {"a": {"$ref": "#"}}}},
            r"schema.properties.a: .*'\$ref'",
        ),
        ({"name": "json_schema", "schema": "nowhere.json"}, "cannot read nowhere.json"),
        ("python:nothing", "must be python:MODULE:FUNCTION"),
        ("python:no_such_module_here:f", "cannot import no_such_module_here"),
        ("python:math:cosinus", "math has no function cosinus"),
    ],
)
def test_a_wrong_metric_is_reported_in_one_line(spec: str | dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_metric(spec)
    assert "\n" not in str(caught.value)


def test_a_metric_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own_metric_a.py").write_text(
        "def length(prediction, target, fields):\n    return len(prediction) / fields['limit']\n"
        "def bad(prediction, target, fields):\n    return 7\n"
        "def broken(prediction, target, fields):\n    return fields['nothing']\n"
    )
    metric = load_metric("python:own_metric_a:length", directory=tmp_path)
    assert metric.score("abc", "x", {"limit": 4}) == 0.75
    for name, message in (
        ("bad", "returned 7; it must return a number from 0 to 1"),
        ("broken", "raised KeyError"),
    ):
        with pytest.raises(UserError, match=message):
            load_metric(f"python:own_metric_a:{name}", directory=tmp_path).score("a", "b", {})


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "pattern": "^[A-Z]"},
        "n": {"type": "integer", "minimum": 1, "exclusiveMaximum": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 1]}, "maxItems": 2, "uniqueItems": True},
        "either": {"oneOf": [{"type": "number"}, {"type": ["string", "null"]}]},
    },
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ({"city": "Rome"}, True),
        ({"city": "rome"}, False),
        ({"city": "R"}, False),
        ({}, False),
        ([], False),
        ({"city": "Rome", "n": 4.0}, True),
        ({"city": "Rome", "n": 5}, False),
        ({"city": "Rome", "n": 0}, False),
        ({"city": "Rome", "n": True}, False),
        ({"city": "Rome", "n": 1.5}, False),
        ({"city": "Rome", "tags": ["a", 1.0]}, True),
        ({"city": "Rome", "tags": ["a", "a"]}, False),
        ({"city": "Rome", "tags": [True]}, False),
        ({"city": "Rome", "tags": ["a", "b", 1]}, False),
        ({"city": "Rome", "either": None}, True),
        ({"city": "Rome", "either": []}, False),
        ({"city": "Rome", "more": 1}, False),
    ],
)
def test_json_schema_as_the_specification_says(value: object, valid: bool) -> None:
    check_schema(SCHEMA)
    assert conforms(value, SCHEMA) is valid
    assert score({"name": "json_schema", "schema": SCHEMA}, json.dumps(value), "") == float(valid)


def test_text_that_is_not_json_is_valid_under_no_schema() -> None:
    assert score({"name": "json_schema", "schema": {}}, "{'city': 1}", "") == 0


def test_binary_metrics_get_wilson_and_mcnemar() -> None:
    targets = ["a"] * 20
    metric = load_metric("accuracy", ["a", "b"])
    first, second = _answers(["a"] * 12 + ["b"] * 8, targets), _answers(["a"] * 18 + ["b"] * 2, targets)
    assert score_interval(metric, first) == pytest.approx((0.6, 0.3866, 0.7812), abs=1e-4)  # Wilson, 12 of 20
    gain = compare(metric, "first", first, second)
    assert gain.difference == pytest.approx(0.3)
    assert (gain.p, gain.test) == (2 / 2**6, "McNemar exact")  # 6 against 0
    assert gain.better
    other = compare(load_metric("f1", ["a", "b"]), "first", first, second)
    assert other.test == "paired bootstrap"


def test_predictions_are_paired_by_id_not_by_place() -> None:
    metric = load_metric("accuracy")
    answers = _answers(["a", "b", "c", "d"], ["a", "b", "x", "x"])
    assert compare(metric, "first", answers, list(reversed(answers))).difference == 0.0
    assert compare(metric, "first", answers, list(reversed(answers))).p == 1.0
    with pytest.raises(ValueError, match="not of the same examples"):
        compare(metric, "first", answers, answers[:3])


def test_the_difference_is_to_the_best_rung_before() -> None:
    targets = ["a"] * 30
    right = {"one": 20, "two": 10, "three": 15, "four": 25}
    predictions = {name: _answers(["a"] * n + ["b"] * (30 - n), targets) for name, n in right.items()}
    rungs = [RungResult(name, "baseline", score=n / 30, low=0, high=1) for name, n in right.items()]
    rungs.insert(1, RungResult("broken", "tune", "failed", reason="no memory"))
    add_differences(rungs, predictions, load_metric("accuracy"))
    best = {rung.name: rung.difference.to if rung.difference else None for rung in rungs}
    assert best == {"one": None, "broken": None, "two": "one", "three": "one", "four": "one"}
    assert [entry.to for entry in rungs[-1].differences] == ["one", "two", "three"]
