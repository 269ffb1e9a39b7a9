"""Intervals and tests, against scipy, statsmodels' published numbers, formulas and arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, norm  # type: ignore[import-untyped]

from tercet.evaluate.statistics import (
    bootstrap_interval,
    mcnemar_exact,
    paired_bootstrap,
    paired_bootstrap_p,
    paired_difference,
    percentile,
    wilson_interval,
)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(case: tuple[int, int]) -> None:
    successes, n = case
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.71674, half 1.96/1.38416*sqrt(0.016 + 0.0096) = 0.22659
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 5)[0] == 0.0 and wilson_interval(5, 5)[1] == 1.0
    assert wilson_interval(0, 5)[1] > 0.4


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=80, deadline=None)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(b: int, c: int) -> None:
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_mcnemar_by_hand() -> None:
    # 5 against 0: 2 * (1/2)^5. 6 against 1: 2 * (1 + 7) / 2^7.
    assert mcnemar_exact(5, 0) == 0.0625
    assert mcnemar_exact(1, 6) == 0.125
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    assert 0 <= mcnemar_exact(3000, 100) < 1e-300


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).random(800)
    half = norm.ppf(0.975) * values.std() / math.sqrt(800)
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_bootstrap_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(2).exponential(size=60)
    theirs = bootstrap((values,), np.median, n_resamples=5000, method="percentile", random_state=0)
    ours = bootstrap_interval(values, lambda drawn: np.median(drawn, axis=-1))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.1 * width)


def test_pairing_shows_a_difference_that_the_scores_alone_do_not() -> None:
    # The same examples are hard for both; b is right on 12 of 200 more and wrong on none that a has.
    draw = np.random.default_rng(3)
    a = (draw.random(200) < 0.6).astype(float)
    b = a.copy()
    b[np.flatnonzero(a == 0)[:12]] = 1.0
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(0.06)
    assert 0 < low < 0.06 < high
    assert bootstrap_interval(a)[1] > bootstrap_interval(b)[0]  # unpaired intervals overlap


def test_the_difference_changes_sign_with_the_order() -> None:
    draw = np.random.default_rng(4)
    a, b = draw.random(150), draw.random(150)
    forward, backward = paired_bootstrap(a, b, seed=7), paired_bootstrap(b, a, seed=7)
    assert forward.difference == -backward.difference
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert forward.p == backward.p


def test_the_bootstrap_p_is_uniform_when_there_is_no_difference() -> None:
    draw = np.random.default_rng(5)
    below = sum(paired_bootstrap(draw.random(60), draw.random(60), resamples=400).p < 0.1 for _ in range(400))
    assert 20 <= below <= 65  # 40 expected; the bounds are four standard deviations away


def test_p_and_interval_agree() -> None:
    draw = np.random.default_rng(6)
    for shift in (0.0, 0.02, 0.04, 0.08, 0.2):
        a = draw.random(120)
        b = a + shift + draw.normal(0, 0.2, 120)
        result = paired_bootstrap(a, b)
        if not 0.04 < result.p < 0.06:
            assert (result.p < 0.05) == (result.low > 0 or result.high < 0)


def test_the_same_seed_gives_the_same_numbers() -> None:
    values = np.random.default_rng(8).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_samples_that_are_small_or_equal(n: int) -> None:
    assert bootstrap_interval(np.ones(n)) == (1.0, 1.0)
    same = paired_bootstrap(np.full(n, 0.3), np.full(n, 0.3))
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    # All better, by the same amount: the interval is a point, and p is the chance of n equal coins.
    better = paired_bootstrap(np.zeros(n), np.ones(n))
    assert (better.difference, better.low, better.high) == (1.0, 1.0, 1.0)
    assert better.p == pytest.approx(2 / 2**n)


def test_rounding_in_sums_is_no_difference() -> None:
    a = np.array([0.1, 0.2, 0.3] * 30)
    assert paired_bootstrap_p(a, a + 0.0) == 1.0


def test_latency_percentiles() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([0.0, 100.0], 95) == pytest.approx(95.0)
    assert percentile([7.0], 95) == 7.0


def test_values_that_form_no_sample_are_refused() -> None:
    for wrong in (
        lambda: wilson_interval(3, 2),
        lambda: bootstrap_interval([]),
        lambda: mcnemar_exact(-1, 2),
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="do not form pairs"):
        paired_bootstrap([1.0], [1.0, 0.0])
