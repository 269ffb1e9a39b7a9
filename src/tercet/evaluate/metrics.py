"""Metrics: the score of one answer, and the score of all answers.

A metric maps every answer to a number (``values``), and an array of such numbers to the score
(``aggregate``). So resampling examples only indexes that array. For every metric but macro-F1 the
numbers are the scores of the answers and the aggregate is their mean.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tercet.errors import UserError, nearest
from tercet.evaluate import statistics
from tercet.evaluate.json_schema import canonical, check_schema, conforms, parse_json

Score = Callable[[str, str, Mapping[str, Any]], float]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: as in the task file.
        binary: whether every answer is correct or wrong. Then two rungs are compared with McNemar's
            test, and a score has a Wilson interval. Otherwise both come from the bootstrap.
        score: (prediction, target, fields of the example) -> 0 to 1, for one answer.
        labels: the classes of macro-F1; None for a metric that is a mean.
        definition: equal for metrics that score in the same way: the name with its options, and for a
            ``python:`` metric a hash of the module's file.
    """

    name: str
    binary: bool
    score: Score
    labels: tuple[str, ...] | None = None
    definition: str = ""

    def values(self, predictions: Sequence[str], targets: Sequence[str], scores: Sequence[float]) -> Values:
        """Return the numbers, [n], that ``aggregate`` takes."""
        if self.labels is None:
            return np.asarray(scores, dtype=np.float64)
        # A pair of classes as one whole number. Text that is no label is one more class.
        code = {label: index for index, label in enumerate(self.labels)}
        base = len(self.labels) + 1
        pairs = zip(targets, predictions, strict=True)
        codes = [code.get(t.strip(), base - 1) * base + code.get(p.strip(), base - 1) for t, p in pairs]
        return np.array(codes, dtype=np.float64)

    def aggregate(self, values: Values) -> Values:
        """Return the score of each set of examples: [..., n] -> [...]."""
        if self.labels is None:
            return statistics.mean(values)
        return macro_f1(values.astype(np.int64), len(self.labels))


def accuracy(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
    """Return 1 if the answer equals the target, without the spaces around both."""
    return float(prediction.strip() == target.strip())


def exact_match(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
    """Return 1 if both are the same text, with runs of spaces as one, or the same JSON object or list.

    JSON is compared by value: the order of keys, spaces and 1 or 1.0 make no difference.
    """
    is_json, target_value = parse_json(target)
    if is_json and isinstance(target_value, dict | list):
        is_json, answer = parse_json(prediction)
        return float(is_json and canonical(answer) == canonical(target_value))
    return float(prediction.split() == target.split())


def token_f1(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
    """Return the F1 of the shared words, as SQuAD scores answers (Rajpurkar et al. 2016, arXiv:1606.05250).

    Words are in lower case, without punctuation and the articles a, an, the.
    """
    answer, correct = _answer_words(prediction), _answer_words(target)
    if not answer or not correct:
        return float(answer == correct)
    shared = sum((Counter(answer) & Counter(correct)).values())
    return 2 * shared / (len(answer) + len(correct))


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _answer_words(text: str) -> list[str]:
    bare = text.lower().translate(_PUNCTUATION)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def contains(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
    """Return 1 if the answer contains the target; case and runs of spaces make no difference."""
    return float(" ".join(target.casefold().split()) in " ".join(prediction.casefold().split()))


def target_matches(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
    """Return 1 if the target, a regular expression, matches somewhere in the answer."""
    try:
        return float(re.search(target, prediction) is not None)
    except re.error as problem:
        raise UserError(
            f"metric regex: the target {target!r} is not a regular expression: {problem}"
        ) from problem


def rouge_l(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004, "ROUGE", section 3, beta 1).

    Words are runs of letters and digits in lower case, without stemming.
    """
    answer, correct = re.findall(r"[^\W_]+", prediction.lower()), re.findall(r"[^\W_]+", target.lower())
    if not answer or not correct:
        return float(answer == correct)
    return 2 * _common_subsequence(answer, correct) / (len(answer) + len(correct))


def _common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)  # row[j]: the longest length for the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def macro_f1(pairs: npt.NDArray[np.int64], classes: int) -> Values:
    """Return the mean of the labels' F1 scores; a label that neither occurs nor is predicted has 0.

    It equals scikit-learn's f1_score(average="macro", zero_division=0) with the same labels.

    Args:
        pairs: [..., n], target * (classes + 1) + prediction; the last class means no label.
        classes: the number of labels.
    """
    base = classes + 1
    flat = pairs.reshape(-1, pairs.shape[-1])
    rows = (np.arange(len(flat)) * base)[:, None]  # each row's classes get a range of their own
    target, prediction = flat // base, flat % base

    def count(shifted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.bincount(shifted.ravel(), minlength=len(flat) * base).reshape(-1, base)[:, :classes]

    correct = count((target + rows)[target == prediction])
    total = count(target + rows) + count(prediction + rows)
    f1 = np.divide(2 * correct, total, out=np.zeros(correct.shape), where=total > 0)
    return np.asarray(f1.mean(axis=1).reshape(pairs.shape[:-1]))


_PLAIN: dict[str, tuple[Score, bool]] = {
    "accuracy": (accuracy, True),
    "exact_match": (exact_match, True),
    "contains": (contains, True),
    "regex": (target_matches, True),
    "rouge_l": (rouge_l, False),
}
METRICS = (*_PLAIN, "f1", "json_schema", "python:MODULE:FUNCTION")
_OPTIONS = {"regex": "pattern", "json_schema": "schema"}


def load_metric(
    spec: str | Mapping[str, Any],
    labels: Sequence[str] | None = None,
    *,
    where: str = "metric",
    directory: Path | None = None,
) -> Metric:
    """Return the metric of a task.

    Args:
        spec: a name of ``METRICS``; ``{name: regex, pattern: ...}``, where the last match of the pattern
            in the answer (its first group if there is one) must equal that in the target; or
            ``{name: json_schema, schema: mapping or file}``.
        labels: of a closed task. With labels f1 means macro-F1, without labels SQuAD's F1.
        where: the name of the metric in messages.
        directory: ``python:`` modules and schema files are looked for here first.

    Raises:
        UserError: an unknown metric, a missing or unknown option, or a module that cannot be loaded.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"{where} must be a name, or a mapping with a name; the metrics are {', '.join(METRICS)}"
        )
    option = _OPTIONS.get(name)
    unknown = [key for key in options if key != option]
    if unknown:
        takes = f"takes only {option}" if option else "takes no options"
        raise UserError(f"{where} {name} has no option {unknown[0]!r}; it {takes}")
    if name == "judge":
        raise UserError(
            f"{where}: judge is not implemented yet, because it needs a hosted model; "
            f"the metrics are {', '.join(METRICS)}"
        )
    if name.startswith("python:"):
        return _from_python(name, where, directory)
    if name == "f1":
        if labels is None:
            return Metric("f1", False, token_f1)
        return Metric("f1", False, accuracy, tuple(labels))
    if name == "json_schema":
        return _from_schema(options.get("schema"), where, directory)
    if name == "regex" and "pattern" in options:
        return _from_pattern(options["pattern"], where)
    if name not in _PLAIN:
        near = nearest(name, METRICS)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"{where} {name!r} is unknown{hint} The metrics are {', '.join(METRICS)}")
    score, binary = _PLAIN[name]
    return Metric(name, binary, score)


def _from_pattern(pattern: Any, where: str) -> Metric:
    try:
        expression = re.compile(pattern)
    except (re.error, TypeError) as problem:
        raise UserError(f"{where}: pattern {pattern!r} is not a regular expression: {problem}") from problem

    def last_match(text: str) -> str | None:
        # Models reason first and answer last.
        matches = list(expression.finditer(text))
        return (matches[-1].group(1 if expression.groups else 0) or "").strip() if matches else None

    def score(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
        correct = last_match(target)
        if correct is None:
            raise UserError(f"{where}: the pattern {pattern!r} does not match the target {target!r}")
        return float(last_match(prediction) == correct)

    return Metric("regex", True, score, definition=f"regex {pattern}")


def _from_schema(schema: Any, where: str, directory: Path | None) -> Metric:
    from tercet.files import read_json

    if schema is None:
        raise UserError(
            f"{where}: json_schema needs a schema: {{name: json_schema, schema: a mapping or a file}}"
        )
    if isinstance(schema, str):
        schema = read_json((directory or Path()) / schema)
    check_schema(schema, f"{where}.schema")

    def score(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
        valid, value = parse_json(prediction)
        return float(valid and conforms(value, schema))

    return Metric("json_schema", True, score, definition=f"json_schema {canonical(schema)}")


def _from_python(name: str, where: str, directory: Path | None) -> Metric:
    parts = name.split(":")
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"{where} {name!r} must be python:MODULE:FUNCTION, such as python:my_metrics:closeness"
        )
    _, module_name, function_name = parts
    places = [str((directory or Path()).resolve()), str(Path.cwd())]
    sys.path[:0] = places
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:  # the user's own file may raise any error
        raise UserError(
            f"{where} {name}: cannot import {module_name}: {type(problem).__name__}: {problem}"
        ) from problem
    finally:
        for place in places:
            sys.path.remove(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        raise UserError(
            f"{where} {name}: {module_name} has no function {function_name}; "
            f"its functions are {', '.join(functions) or 'none'}"
        )

    def score(prediction: str, target: str, fields: Mapping[str, Any]) -> float:
        try:
            value = function(prediction, target, dict(fields))
        except Exception as problem:
            raise UserError(f"{where} {name} raised {type(problem).__name__}: {problem}") from problem
        if not isinstance(value, bool | int | float | np.number | np.bool_) or not 0 <= float(value) <= 1:
            raise UserError(f"{where} {name} returned {value!r}; it must return a number from 0 to 1")
        return float(value)

    source = getattr(module, "__file__", None)
    content = Path(source).read_bytes() if source else b""
    return Metric(name, False, score, definition=f"{name} {hashlib.sha256(content).hexdigest()}")
