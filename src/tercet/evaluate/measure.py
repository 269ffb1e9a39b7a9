"""Measuring one rung on the locked test: its answers, their score, and what they took."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tercet.evaluate.statistics import percentile
from tercet.evaluate.task import Example, Task
from tercet.ladder import comparison
from tercet.ladder.result import Prediction, RungResult
from tercet.ladder.rungs.base import Answer, Rung
from tercet.progress import Progress
from tercet.train.calibrate import use_all_cores

LATENCY_CALLS = 30  # calls made one at a time; enough for a p95, few enough to wait for
BATCH = 64  # examples a call, so that progress shows


def measure_rung(
    rung: Rung, task: Task, seed: int = 0, examples: Sequence[Example] | None = None
) -> tuple[RungResult, list[Prediction]]:
    """Answer every test example (or ``examples``), score the answers, time single calls.

    The score's interval is Wilson's for binary metrics and a bootstrap otherwise. Latency is of calls
    made alone after the batch; a hosted model's own times are used as they were.
    """
    use_all_cores()  # whatever training chose: rungs are compared under the same conditions
    examples = task.test if examples is None else examples
    answers: list[Answer] = []
    begun = time.monotonic()
    with Progress(f"{rung.name}: answering", len(examples), "examples") as bar:
        for start in range(0, len(examples), BATCH):
            piece = examples[start : start + BATCH]
            answers += rung.predict(piece)
            bar.advance(len(piece))
    each = (time.monotonic() - begun) / max(1, len(examples))
    predictions = [
        Prediction(
            id=example.id, text=answer.text, target=example.target,
            score=task.metric.score(answer.text, example.target, example.fields),
            tokens=answer.prompt_tokens + answer.completion_tokens,
            seconds=round(each if answer.seconds is None else answer.seconds, 6), cost=answer.cost,
        )
        for answer, example in zip(answers, examples, strict=True)
    ]  # fmt: skip
    score, low, high = comparison.measure(task.metric, predictions, seed)
    latencies = [answer.seconds for answer in answers if answer.seconds is not None]
    if not latencies:
        for example in examples[:LATENCY_CALLS]:
            begun = time.monotonic()
            rung.predict([example])
            latencies.append(time.monotonic() - begun)
    costs = [answer.cost for answer in answers if answer.cost is not None]
    details = dict(rung.details)
    if shortened := sum(answer.shortened for answer in answers):
        details["inputs shortened to fit the context"] = shortened
    result = RungResult(
        name=rung.name, level=rung.level, score=score, low=low, high=high,
        latency_p50=percentile(latencies, 50), latency_p95=percentile(latencies, 95),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        size_bytes=rung.size_bytes(),
        cost_per_thousand=1000 * sum(costs) / len(costs) if costs and len(costs) == len(answers) else None,
        details=details,
    )  # fmt: skip
    return result, predictions
