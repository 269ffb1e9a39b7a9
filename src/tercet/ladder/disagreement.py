"""Find the test examples on which the rungs disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tercet.evaluate.result import Prediction
from tercet.ladder.result import Report

LIMIT = 30  # examples shown; readers rarely look at more
SHOWN_CHARACTERS = 700  # of an input or an answer

Predictions = Mapping[str, Sequence[Prediction]]  # of each measured rung, by its name


@dataclass(frozen=True)
class SharedAnswer:
    """An answer that one or more rungs gave."""

    text: str
    score: float
    rungs: tuple[str, ...]


@dataclass(frozen=True)
class Disagreement:
    """One test example on which the scores of the rungs differ."""

    id: str
    input: str
    target: str
    answers: tuple[SharedAnswer, ...]  # highest score first


def disagreements(report: Report, predictions: Predictions, inputs: Mapping[str, str]) -> list[Disagreement]:
    """Return the examples with the largest variance of scores between rungs, at most `LIMIT`.

    The order is by variance, then by id, so that it is the same in every run.

    Args:
        report: with the names of the rungs.
        predictions: of each measured rung, by its name.
        inputs: the text to show for each example, by its id.
    """
    by_example: dict[str, dict[str, Prediction]] = {}
    for rung in report.rungs:
        if rung.ok:
            for prediction in predictions[rung.name]:
                by_example.setdefault(prediction.id, {})[rung.name] = prediction
    ranked: list[tuple[float, str]] = []
    for example, by_rung in by_example.items():
        scores = [prediction.score for prediction in by_rung.values()]
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        if max(scores) - min(scores) > 1e-9:
            ranked.append((round(-variance, 9), example))
    return [
        Disagreement(
            example,
            _shortened(inputs.get(example, "")),
            _shortened(next(iter(by_example[example].values())).target),
            _shared_answers(by_example[example]),
        )
        for _, example in sorted(ranked)[:LIMIT]
    ]


def _shared_answers(by_rung: Mapping[str, Prediction]) -> tuple[SharedAnswer, ...]:
    """Group the predictions of one example by answer."""
    groups: dict[tuple[float, str], list[str]] = {}
    for name, prediction in by_rung.items():
        groups.setdefault((prediction.score, prediction.text.strip()), []).append(name)
    answers = [SharedAnswer(_shortened(text), score, tuple(names)) for (score, text), names in groups.items()]
    return tuple(sorted(answers, key=lambda answer: -answer.score))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return text[:SHOWN_CHARACTERS].rstrip() + " ..."
