"""Measure answers to a task: their score with its interval, latency, tokens and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tercet.evaluate import statistics
from tercet.evaluate.answer import Answer
from tercet.evaluate.metrics import Metric
from tercet.evaluate.result import Measurement, Prediction
from tercet.evaluate.task import Example, Task
from tercet.progress import Progress
from tercet.train.calibrate import use_all_cores

LATENCY_CALLS = 30  # single answers that are timed: enough for a 95th percentile, and quick
BATCH = 64  # examples in one call, so that the progress bar moves

Answering = Callable[[Sequence[Example]], list[Answer]]


def measure(
    name: str, respond: Answering, task: Task, examples: Sequence[Example], seed: int = 0
) -> tuple[Measurement, list[Prediction]]:
    """Answer the examples, score the answers and time single answers.

    Args:
        name: of what is measured.
        respond: returns one answer for each example, in order.
        task: whose metric scores the answers.
        examples: one split of the task, not empty.
        seed: of the bootstrap.

    Returns:
        The measurement, without a size, and one prediction for each example. Latency is the time of
        single answers after the batches; the times that a hosted model reports are used instead.
    """
    use_all_cores()  # training may have chosen fewer; all measurements run under the same conditions
    answers: list[Answer] = []
    start_time = time.monotonic()
    with Progress(f"{name}: answering", len(examples), "examples") as bar:
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            answers += respond(batch)
            bar.advance(len(batch))
    average = (time.monotonic() - start_time) / max(1, len(examples))
    predictions = [
        Prediction(
            id=example.id, text=answer.text, target=example.target,
            score=task.metric.score(answer.text, example.target, example.fields),
            tokens=answer.prompt_tokens + answer.completion_tokens,
            seconds=round(average if answer.seconds is None else answer.seconds, 6), cost=answer.cost,
        )
        for answer, example in zip(answers, examples, strict=True)
    ]  # fmt: skip
    score, low, high = score_interval(task.metric, predictions, seed)
    latencies = [answer.seconds for answer in answers if answer.seconds is not None]
    latencies = latencies or _single_latencies(respond, examples[:LATENCY_CALLS])
    costs = [answer.cost for answer in answers if answer.cost is not None]
    shortened = sum(answer.shortened for answer in answers)
    measurement = Measurement(
        name=name, score=score, low=low, high=high,
        latency_p50=statistics.percentile(latencies, 50), latency_p95=statistics.percentile(latencies, 95),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        cost_per_thousand=1000 * sum(costs) / len(costs) if costs and len(costs) == len(answers) else None,
        details={"inputs shortened to fit the context": shortened} if shortened else {},
    )  # fmt: skip
    return measurement, predictions


def _single_latencies(respond: Answering, examples: Sequence[Example]) -> list[float]:
    """Return the seconds that each example takes in a call of its own."""
    latencies = []
    for example in examples:
        start = time.monotonic()
        respond([example])
        latencies.append(time.monotonic() - start)
    return latencies


def score_interval(
    metric: Metric, predictions: Sequence[Prediction], seed: int = 0
) -> tuple[float, float, float]:
    """Return the score and its 95% interval (score, low, high): Wilson's for a binary metric, else a bootstrap."""
    values = metric_values(metric, predictions)
    score = float(metric.aggregate(values))
    if metric.binary:
        return score, *statistics.wilson_interval(round(values.sum()), len(values))
    return score, *statistics.bootstrap_interval(values, metric.aggregate, seed)


def metric_values(metric: Metric, predictions: Sequence[Prediction]) -> statistics.Values:
    """Return the number of each prediction, [n], that ``metric.aggregate`` works on."""
    texts, targets, scores = zip(*((p.text, p.target, p.score) for p in predictions), strict=True)
    return metric.values(texts, targets, scores)
