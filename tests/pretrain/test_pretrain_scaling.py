"""The scaling law: recovered from exact points, refused where it cannot be fitted."""

import math
from pathlib import Path

import pytest

from tercet.errors import UserError
from tercet.pretrain.hardware import HARDWARE
from tercet.pretrain.scaling import Point, fit, store_law, stored_law


def law_points(floor: float, scale: float, exponent: float, budgets: list[float]) -> list[Point]:
    return [Point(c, floor + scale * (c / 1e12) ** -exponent) for c in budgets]


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(0.8, 1.5, 0.2), (0.0, 2.5, 0.1), (1.2, 0.6, 0.35)])
def test_a_law_is_recovered_from_four_points_and_holds_beyond_them(
    floor: float, scale: float, exponent: float
) -> None:
    points = law_points(floor, scale, exponent, [1e12, 2e12, 4e12, 8e12])
    law = fit(points)
    assert law.error < 1e-3
    for budget in (3e12, 3e13, 1e14):
        [truth] = law_points(floor, scale, exponent, [budget])
        assert law.predict(budget) == pytest.approx(truth.bits_per_byte, rel=0.01)


def test_one_percent_of_noise_changes_the_prediction_by_a_few_percent() -> None:
    points = law_points(0.8, 1.5, 0.2, [1e12, 2e12, 4e12, 8e12])
    noisy = [
        Point(p.flops, p.bits_per_byte * (1 + e))
        for p, e in zip(points, (0.005, -0.005, 0.004, -0.003), strict=True)
    ]
    [truth] = law_points(0.8, 1.5, 0.2, [4e13])
    assert fit(noisy).predict(4e13) == pytest.approx(truth.bits_per_byte, rel=0.08)


def test_points_that_cannot_be_fitted_are_refused() -> None:
    with pytest.raises(UserError, match="at least three"):
        fit(law_points(1, 1, 0.1, [1e12, 2e12]))
    rising = [Point(1e12, 2.0), Point(2e12, 2.1), Point(4e12, 1.9)]
    with pytest.raises(UserError, match="a larger budget gave a higher loss"):
        fit(rising)


def test_a_law_is_stored_for_its_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    law = fit(law_points(0.8, 1.5, 0.2, [1e12, 2e12, 4e12]))
    assert stored_law("a") is None
    store_law("a", law)
    assert stored_law("a") == law


def test_training_time_on_an_accelerator_is_as_computed_by_hand() -> None:
    # 124M weights on 2.5 billion tokens: 6 N D operations at 40% of 312e12 a second.
    assert HARDWARE["a100"].seconds(6 * 124e6 * 2.5e9) == pytest.approx(14903, rel=1e-3)
    assert all(math.isfinite(hardware.memory) for hardware in HARDWARE.values())
