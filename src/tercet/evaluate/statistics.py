"""Confidence intervals and significance tests for scores on one test set.

Two rungs answer the same examples, so they are compared example by example. The pairing removes the
variance that comes from some examples being harder, so that 500 examples can show small differences
(Dror et al. 2018, "The Hitchhiker's Guide to Testing Statistical Significance in NLP"). All functions
are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
# From per-example values [..., n] to a score [...]: the mean, or a score like macro-F1.
Aggregate = Callable[[Values], Values]

RESAMPLES = 5_000  # the ends of a 95% interval vary by about 2% of its width between seeds
_CHUNK = 2_000_000  # values resampled at a time: 16 MB
_Z = 1.959963984540054  # the 97.5% point of the normal distribution


def mean(values: Values) -> Values:
    """Return the mean over the last axis, the aggregate of most metrics: [..., n] -> [...]."""
    return np.asarray(values.mean(axis=-1))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% score interval of a proportion (Wilson 1927, JASA 22, 209-212).

    Unlike p ± 1.96 standard errors, it stays in [0, 1] and has a width at 0 and at n successes.

    Raises:
        ValueError: the numbers are no proportion.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a proportion")
    share, z2 = successes / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and n the formula gives exactly 0 and 1, but floating-point arithmetic only nearly.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def bootstrap_interval(
    values: npt.ArrayLike, aggregate: Aggregate = mean, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of ``aggregate(values)`` (Efron and Tibshirani 1993, ch. 13).

    As for every bootstrap, it is too narrow with fewer than about 10 examples. If all values are equal,
    its width is 0.

    Args:
        values: one number for each example, [n].
        aggregate: the score, over the last axis.
        seed: of the resampling.
        resamples: the number of resamples.
    """
    array = _values(values)
    scores = _resampled([array], lambda drawn: aggregate(drawn[0]), seed, resamples)
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """The score of b minus the score of a, with its 95% interval and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, aggregate: Aggregate = mean, seed: int = 0, resamples: int = RESAMPLES
) -> Paired:
    """Compare ``aggregate(b)`` with ``aggregate(a)`` by resampling the examples, with both values of each.

    p is twice the smaller share of resampled differences on either side of zero, with 1 added to the
    count and the total so that it is never 0 (Davison and Hinkley 1997, section 4.2). It agrees with the
    interval with one exception: m pairs that differ give no p below 2 / 2^m, the probability that m fair
    coins all show the same side, because the bootstrap of few examples is too certain.

    Args:
        a: one number for each example, [n].
        b: the same for the other rung, on the same examples in the same order.
        aggregate: the score, over the last axis.
        seed: of the resampling.
        resamples: the number of resamples.

    Raises:
        ValueError: ``a`` and ``b`` have different lengths.
    """
    first, second = _values(a), _values(b)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} values do not form pairs")
    differences = _resampled(
        [first, second], lambda drawn: aggregate(drawn[1]) - aggregate(drawn[0]), seed, resamples
    )
    # Sums of the same numbers in another order differ in the last digits, which counts as no difference.
    differences[np.abs(differences) < 1e-12] = 0.0
    low, high = np.percentile(differences, [2.5, 97.5])
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    differing = int((first != second).sum())
    p = min(1.0, max(2 * (tail + 1) / (resamples + 1), 2.0 ** (1 - differing)))
    return Paired(float(aggregate(second) - aggregate(first)), float(low), float(high), p)


def paired_difference(
    scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, seed: int = 0
) -> tuple[float, float, float]:
    """Return (difference, low, high) of the means, b minus a, by `paired_bootstrap`."""
    result = paired_bootstrap(scores_a, scores_b, seed=seed)
    return result.difference, result.low, result.high


def paired_bootstrap_p(scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, seed: int = 0) -> float:
    """Return the two-sided p of equal means, by `paired_bootstrap`."""
    return paired_bootstrap(scores_a, scores_b, seed=seed).p


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact p of McNemar's test (McNemar 1947, Psychometrika 12, 153-157).

    If the rungs are equal, each of the b + c examples that only one of them answers correctly is like
    the toss of a fair coin.

    Args:
        b: the number of examples that only the first rung answers correctly.
        c: the same for the second rung; ``b`` and ``c`` may be exchanged.

    Raises:
        ValueError: a negative number.
    """
    n, k = b + c, min(b, c)
    if k < 0:
        raise ValueError(f"counts {b} and {c} must not be negative")
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    # Whole numbers up to the division 2 tail / 2^n are exact and cannot overflow.
    return min(1.0, 2 * tail / (1 << n))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the interpolated ``share`` percentile of values; 50 is the median."""
    if not len(values):
        raise ValueError("no values")
    return float(np.percentile(np.asarray(values, dtype=np.float64), share))


def _values(values: npt.ArrayLike) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"the shape is {array.shape}; one number for each of at least one example is needed")
    return array


def _resampled(
    columns: list[Values], score: Callable[[list[Values]], Values], seed: int, resamples: int
) -> Values:
    """Return the score of each resample of the examples, [resamples]; each draw indexes all columns."""
    n = columns[0].size
    generator = np.random.default_rng(seed)
    parts = []
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, n, size=(min(step, resamples - start), n))
        parts.append(score([column[drawn] for column in columns]))
    return np.concatenate(parts)
