"""Forecast the held-out loss of a longer run from the evaluations of a short one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 3  # evaluations after the first step; two points fit any power law
WORST_FIT = 0.1  # largest mean deviation from the line in log loss; beyond it the losses follow no power law
FARTHEST = 10  # times the steps taken; farther away the forecast means nothing


@dataclass(frozen=True)
class Forecast:
    """What training for longer would give.

    Attributes:
        steps: of the longer run.
        loss: its held-out loss, nats a token; None where the evaluations allow no forecast.
        reason: why there is no loss, in words; None where there is one.
    """

    steps: int
    loss: float | None = None
    reason: str | None = None


def forecast_loss(history: Sequence[Mapping[str, Any]], steps: int) -> Forecast:
    """Return the held-out loss after ``steps`` steps, by a power law in the number of steps.

    The loss of a fine-tuned model falls as a power of the examples seen (Hernandez et al. 2021, arXiv:2102.01293);
    a line through log loss over log steps extends it. The last part of a schedule, where the rate falls, is a
    little better than the law, and a law without a floor is too good far away, so the number is a guide.

    Args:
        history: evaluations with ``step`` and ``loss``, in order.
        steps: of the longer run.
    """
    points = [(entry["step"], entry["loss"]) for entry in history if entry["step"] > 0]
    if len(points) < FEWEST:
        return Forecast(steps, reason=f"{len(points)} evaluations are too few for a forecast")
    if steps > FARTHEST * points[-1][0]:
        return Forecast(steps, reason="the run was too short for a forecast so far ahead")
    x, y = np.log([step for step, _ in points]), np.log([max(loss, 1e-6) for _, loss in points])
    slope, start = np.polyfit(x, y, 1)
    if slope >= 0:
        return Forecast(steps, reason="the held-out loss does not fall any more")
    if float(np.abs(y - (start + slope * x)).mean()) > WORST_FIT:
        return Forecast(steps, reason="the held-out losses are too uneven for a forecast")
    return Forecast(steps, loss=float(math.exp(start + slope * math.log(steps))))
