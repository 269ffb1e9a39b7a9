"""Estimates of training, from speeds that are known."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.finetune.estimate import Estimate
from tercet.finetune.result import training_outlook
from tercet.train.calibrate import Speed
from tercet.train.loop import Trained
from tercet.train.supervised import MARGIN

# A step of 16 examples of 50 tokens takes 10 s, 2 s of them to update the weights.
SPEED = Speed(80.0, "float32", 2, False, 2.0, 800)


def test_the_time_of_a_step_is_a_line_through_two_numbers_of_tokens() -> None:
    assert SPEED.step_seconds(800) == pytest.approx(10)
    assert SPEED.step_seconds(400) == pytest.approx(6)
    assert Speed(80.0, "float32", 2).step_seconds(400) == pytest.approx(5)


def test_a_short_time_gets_smaller_batches() -> None:
    estimate = Estimate(SPEED, tokens=50, examples=1600)
    assert estimate.steps(MARGIN, 16) == 6
    assert estimate.batch_size(60) == 16
    assert estimate.steps(10 * MARGIN, 16) == 60 and estimate.batch_size(10 * MARGIN) == 16
    assert estimate.batch_size(7 * MARGIN) == 8
    assert estimate.batch_size(0.1) == 4, "and no smaller one"
    assert estimate.minutes(3, 16) == pytest.approx(300 * 10 * MARGIN / 60, rel=0.01)


def run(losses: list[float], steps: int) -> Trained:
    every = steps // len(losses)
    history: list[dict[str, Any]] = [
        {"step": every * number, "loss": loss} for number, loss in enumerate(losses, start=1)
    ]
    return Trained(steps, 1, 1.0, min(losses), 1, history, False)


def test_the_outlook_says_how_far_training_got_and_what_more_would_give() -> None:
    text = training_outlook(run([2.0, 1.5, 1.25], 60), 60, 600, 2.0, 3)
    assert text.startswith("training reached 0.3 of 3 epochs; all of them take about 20 min 0 s here")
    assert "the held-out loss, 1.25 now, would be about 0." in text
    assert training_outlook(run([1.5, 1.4, 1.45], 60), 60, 600, 2.0, 3).endswith("20 min 0 s here")
    assert "no forecast: 2 evaluations are too few" in training_outlook(run([2.0, 1.5], 60), 60, 600, 2.0, 3)


def test_a_forecast_far_ahead_is_not_made() -> None:
    text = training_outlook(run([2.0, 1.5, 1.25], 60), 60, 900, 2.0, 3)
    assert "no forecast: the run was too short" in text


def test_a_complete_run_says_only_whether_the_loss_still_fell() -> None:
    assert "more epochs may help" in training_outlook(run([2.0, 1.5, 1.25], 60), 60, 60, 2.0, 3)
    assert training_outlook(run([1.5, 1.2, 1.3], 60), 60, 60, 2.0, 3) == ""
    assert training_outlook(run([1.5, 1.2, 1.3], 60), 90, 600, 2.0, 3) == "", "its patience was used up"
