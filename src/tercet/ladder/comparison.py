"""From predictions to results: each rung's score with its interval, and how rungs differ."""

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
    """How much better ``dearer`` is than ``cheaper``, which is called ``name``, on the same examples.

    The interval is the paired bootstrap's; p is McNemar's exact one for a binary metric.

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
    """Fill in ``differences`` and ``difference`` of every rung that is ok.

    ``rungs`` stand in the order of the ladder. The best cheaper rung is the best-scoring one among
    those before it, the first of them where scores are equal.
    """
    before: list[RungResult] = []
    for rung in rungs:
        if not rung.ok:
            continue
        own = predictions[rung.name]
        rung.differences = [
            compare(metric, other.name, predictions[other.name], own, seed) for other in before
        ]
        best = max(range(len(before)), key=lambda index: before[index].score or 0.0, default=None)
        rung.difference = None if best is None else rung.differences[best]
        before.append(rung)
