"""What would change the verdict of a climb: more test examples, more training examples, or more time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tercet.ladder.result import Difference, RungResult

# Standard errors between zero and a difference that a two-sided test at 5% finds with 80% probability: the usual
# sample size of paired data (Chow et al. 2008, "Sample Size Calculations in Clinical Research", chapter 3).
POWER = 1.96 + 0.84
SMALLEST = 0.005  # a smaller gain is not worth a search for it
MOST_TIMES = 100  # of the present test examples; a larger number is no advice


def outlook(results: Sequence[RungResult], recommended: str | None, n_test: int, n_train: int) -> list[str]:
    """Return sentences on what would change the verdict; an empty list if nothing measured says so.

    Args:
        results: of all rungs, with their differences, in the order of the ladder.
        recommended: the recommended rung.
        n_test: number of test examples.
        n_train: number of training examples.
    """
    lines = []
    done = [rung for rung in results if rung.ok]
    names = [rung.name for rung in done]
    if recommended in names:
        for rung in done[names.index(recommended) + 1 :]:
            line = _examples_needed(rung, recommended, n_test)
            if line is not None:
                lines.append(line)
    lines += [line for rung in done if (line := _more_training(rung)) is not None]
    lines += [line for rung in done if (line := _more_labels(rung, n_train)) is not None]
    return lines


def needed_examples(difference: Difference, n: int) -> int:
    """Return how many test examples would show a difference of this size with 80% probability.

    Args:
        difference: of two rungs on ``n`` examples; its interval gives the standard error.
        n: number of examples.
    """
    error = (difference.high - difference.low) / (2 * 1.96)
    return math.ceil(n * (POWER * error / difference.difference) ** 2)


def _examples_needed(rung: RungResult, recommended: str | None, n_test: int) -> str | None:
    difference = next((entry for entry in rung.differences if entry.to == recommended), None)
    if difference is None or difference.difference < SMALLEST:
        return None
    needed = needed_examples(difference, n_test)
    if needed <= n_test or needed > MOST_TIMES * n_test:
        return None
    return (
        f"{rung.name} scores {100 * difference.difference:.1f} percentage points more than {recommended} here. If that "
        f"is the true difference, about {_rounded(needed):,} test examples would show it; there were {n_test:,}."
    )


def _more_training(rung: RungResult) -> str | None:
    prediction = rung.details.get("with more time")
    return f"{rung.name}: {prediction}." if prediction else None


def _more_labels(rung: RungResult, n_train: int) -> str | None:
    """Compare the dev score of a baseline with that of the same baseline on half of the training examples."""
    whole, half = rung.details.get("dev_accuracy"), rung.details.get("dev_accuracy_with_half")
    if whole is None or half is None:
        return None
    gain = 100 * (whole - half)
    if gain < 1:
        return (
            f"More labelled examples promise little: {rung.name} scores {100 * whole:.1f}% on dev with all "
            f"{n_train:,} training examples, and {100 * half:.1f}% with half of them."
        )
    return (
        f"More labelled examples would help: {rung.name} gained {gain:.1f} percentage points on dev from the second "
        f"half of the {n_train:,} training examples. Each doubling tends to give less than the one before."
    )


def _rounded(count: int) -> int:
    """Round up to two significant digits."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return math.ceil(count / unit) * unit
