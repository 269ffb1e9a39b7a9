"""Compare the rungs of a ladder on the same test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tercet.evaluate import statistics
from tercet.evaluate.measure import metric_values
from tercet.evaluate.metrics import Metric
from tercet.evaluate.result import Prediction
from tercet.ladder.result import Difference, RungResult


def compare(
    metric: Metric, name: str, cheaper: Sequence[Prediction], dearer: Sequence[Prediction], seed: int = 0
) -> Difference:
    """Return the difference in score between a more expensive rung and a cheaper one.

    The interval is from the paired bootstrap, and so is p; for a binary metric p is from McNemar's exact test.

    Args:
        metric: of the task.
        name: of the cheaper rung.
        cheaper: the predictions of the cheaper rung.
        dearer: the predictions of the more expensive rung.
        seed: of the bootstrap.

    Raises:
        ValueError: the predictions are not of the same examples.
    """
    first = {prediction.id: prediction for prediction in cheaper}
    if len(first) != len(cheaper) or sorted(first) != sorted(prediction.id for prediction in dearer):
        raise ValueError(f"the predictions compared with {name} are not of the same examples")
    paired = [first[prediction.id] for prediction in dearer]
    a, b = metric_values(metric, paired), metric_values(metric, dearer)
    result = statistics.paired_bootstrap(a, b, metric.aggregate, seed)
    p, test = result.p, "paired bootstrap"
    if metric.binary:
        p, test = statistics.mcnemar_exact(int((a > b).sum()), int((b > a).sum())), "McNemar exact"
    return Difference(name, result.difference, result.low, result.high, p, test)


def add_differences(
    rungs: Sequence[RungResult],
    predictions: Mapping[str, Sequence[Prediction]],
    metric: Metric,
    seed: int = 0,
) -> None:
    """Set ``differences`` and ``difference`` of every measured rung.

    ``difference`` is the one to the cheaper rung with the highest score, the first of those if scores are equal.

    Args:
        rungs: in the order of the ladder.
        predictions: of each measured rung, by its name.
        metric: of the task.
        seed: of the bootstrap.
    """
    cheaper: list[RungResult] = []
    for rung in rungs:
        if not rung.ok:
            continue
        own = predictions[rung.name]
        rung.differences = [
            compare(metric, entry.name, predictions[entry.name], own, seed) for entry in cheaper
        ]
        best = max(range(len(cheaper)), key=lambda index: cheaper[index].score or 0.0, default=None)
        rung.difference = None if best is None else rung.differences[best]
        cheaper.append(rung)
