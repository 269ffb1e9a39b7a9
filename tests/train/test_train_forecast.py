"""Forecasts of held-out loss, on curves that are known."""

from __future__ import annotations

import numpy as np
import pytest

from tercet.train.forecast import forecast_loss


def curve(steps: list[int], exponent: float, noise: float = 0.0) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    return [
        {"step": step, "loss": 4 * step**-exponent * float(np.exp(noise * rng.normal()))} for step in steps
    ]


def test_a_power_law_is_continued() -> None:
    forecast = forecast_loss(curve([10, 20, 30, 40], 0.4), 300)
    assert forecast.loss == pytest.approx(4 * 300**-0.4) and forecast.reason is None


def test_noise_moves_the_forecast_little() -> None:
    forecast = forecast_loss(curve([10, 20, 30, 40, 50, 60], 0.4, 0.03), 200)
    assert forecast.loss == pytest.approx(4 * 200**-0.4, rel=0.1)


def test_the_evaluation_before_the_first_step_does_not_count() -> None:
    assert forecast_loss([{"step": 0, "loss": 9.0}, *curve([10, 20, 40], 0.4)], 80).loss == pytest.approx(
        4 * 80**-0.4
    )


@pytest.mark.parametrize(
    ("history", "steps", "reason"),
    [
        (curve([10, 20], 0.4), 100, "2 evaluations are too few"),
        (curve([10, 20, 30], 0.4), 1000, "too short for a forecast so far ahead"),
        (curve([10, 20, 30], -0.1), 100, "does not fall any more"),
        (curve([1, 2, 4, 8, 16, 32], 0.1, 0.6), 100, "too uneven"),
    ],
)
def test_no_forecast_is_made_where_it_would_be_a_guess(
    history: list[dict[str, float]], steps: int, reason: str
) -> None:
    forecast = forecast_loss(history, steps)
    assert forecast.loss is None and reason in str(forecast.reason)
