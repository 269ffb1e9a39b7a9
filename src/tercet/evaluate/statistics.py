"""Intervals and tests for scores on one test set. numpy only; every function is deterministic.

Two rungs answer the same examples, so they are compared example by example: the pairing removes
what makes one example harder than another, and is what lets 500 examples tell small differences
(Dror et al. 2018, "The Hitchhiker's Guide to Testing Statistical Significance in NLP").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
# From per-example values [..., n] to a score [...]: the mean, or one like macro-F1 that is no mean.
Aggregate = Callable[[Values], Values]

RESAMPLES = 5_000  # the ends of a 95% interval then vary by about 2% of its width from seed to seed
_CHUNK = 2_000_000  # values resampled at a time: 16 MB
_Z = 1.959963984540054  # the 97.5% point of the normal distribution


def mean(values: Values) -> Values:
    """The aggregate of most metrics: [..., n] -> [...]."""
    return np.asarray(values.mean(axis=-1))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927, JASA 22, 209-212).

    Unlike the interval p ± 1.96 standard errors it stays in [0, 1] and has a width at 0 and at n.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no proportion")
    share, z2 = successes / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and n the formula gives exactly 0 and 1; floating point only nearly so.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def bootstrap_interval(
    values: npt.ArrayLike, aggregate: Aggregate = mean, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile bootstrap interval of ``aggregate(values)`` (Efron and Tibshirani 1993, ch. 13).

    With fewer than about 10 examples it is too narrow, as every bootstrap is; when all values are
    equal it has no width at all.

    Args:
        values: one number an example, [n].
        aggregate: over the last axis.
    """
    array = _values(values)
    scores = _resampled([array], lambda drawn: aggregate(drawn[0]), seed, resamples)
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """b's score minus a's, its 95% interval, and a two-sided p for no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, aggregate: Aggregate = mean, seed: int = 0, resamples: int = RESAMPLES
) -> Paired:
    """``aggregate(b) - aggregate(a)``, resampling examples, both rungs' values together.

    p is twice the smaller share of resampled differences on either side of zero, with one added to
    count and total so that it is never 0 (Davison and Hinkley 1997, section 4.2). It agrees with the
    interval but for one thing: m pairs that differ give no p below 2 / 2^m, the chance that m fair
    coins all fall alike, however sure the bootstrap of a handful of examples may be.

    Args:
        a, b: one number an example, [n], the same examples in the same order.
    """
    first, second = _values(a), _values(b)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} values are not pairs")
    differences = _resampled(
        [first, second], lambda drawn: aggregate(drawn[1]) - aggregate(drawn[0]), seed, resamples
    )
    # Sums of the same numbers in another order differ in the last digits: that is no difference.
    differences[np.abs(differences) < 1e-12] = 0.0
    low, high = np.percentile(differences, [2.5, 97.5])
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    differing = int((first != second).sum())
    p = min(1.0, max(2 * (tail + 1) / (resamples + 1), 2.0 ** (1 - differing)))
    return Paired(float(aggregate(second) - aggregate(first)), float(low), float(high), p)


def paired_difference(
    scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, seed: int = 0
) -> tuple[float, float, float]:
    """(difference, low, high) of the means, b minus a, by ``paired_bootstrap``."""
    result = paired_bootstrap(scores_a, scores_b, seed=seed)
    return result.difference, result.low, result.high


def paired_bootstrap_p(scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, seed: int = 0) -> float:
    """Two-sided p for equal means, by ``paired_bootstrap``."""
    return paired_bootstrap(scores_a, scores_b, seed=seed).p


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's test (McNemar 1947, Psychometrika 12, 153-157).

    Of the b + c examples that just one rung gets right, each is a fair coin if the rungs are equal.

    Args:
        b, c: how many only the first, and only the second, gets right. The order does not matter.
    """
    n, k = b + c, min(b, c)
    if k < 0:
        raise ValueError(f"counts {b} and {c} must not be negative")
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    # Whole numbers up to the division, 2 tail / 2^n: exact, and nothing leaves the range of a float.
    return min(1.0, 2 * tail / (1 << n))


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` percentile (50 is the median), interpolated; for latencies in seconds."""
    if not len(values):
        raise ValueError("no values")
    return float(np.percentile(np.asarray(values, dtype=np.float64), share))


def _values(values: npt.ArrayLike) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"one number an example is needed, and at least one; the shape is {array.shape}")
    return array


def _resampled(
    columns: list[Values], score: Callable[[list[Values]], Values], seed: int, resamples: int
) -> Values:
    """``score`` of each resample of the examples, [resamples]; one draw indexes all columns alike."""
    n = columns[0].size
    generator = np.random.default_rng(seed)
    parts = []
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, n, size=(min(step, resamples - start), n))
        parts.append(score([column[drawn] for column in columns]))
    return np.concatenate(parts)
