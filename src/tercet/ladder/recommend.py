"""Recommend a rung from the measured results."""

from __future__ import annotations

from collections.abc import Sequence

from tercet.ladder.result import Difference, RungResult


def recommend(rungs: Sequence[RungResult]) -> tuple[str | None, str]:
    """Return the rung to use according to `RULE`, and the reason in a sentence or two.

    The results hold everything that this needs (``differences`` to every cheaper rung), so a reader
    of report.json can check the choice. It is made on the test examples: with many rungs the score
    of the recommended one is slightly optimistic.

    Args:
        rungs: in the order of the ladder.

    Returns:
        (name, reason); the name is None if no rung succeeded.
    """
    done = [rung for rung in rungs if rung.ok]
    if not done:
        return None, "No rung succeeded. Each failed rung gives its reason."
    if len(done) == 1:
        name = done[0].name
        return (
            name,
            f"{name} is the only rung that succeeded ({_percent(done[0])}), so there is nothing to compare it with.",
        )
    choice = done[0]
    gain: Difference | None = None  # of the choice over the choice before
    for rung in done[1:]:
        difference = _difference(rung, choice)
        if difference is not None and difference.better:
            choice, gain = rung, difference
    return choice.name, _reason(done, choice, gain)


def _reason(done: list[RungResult], choice: RungResult, gain: Difference | None) -> str:
    if gain is None:
        which = (
            "always gives the most frequent answer" if choice.name == "majority" else "is the cheapest rung"
        )
        return f"No other rung scores significantly higher than {choice.name} ({_percent(choice)}), which {which}."
    reason = (
        f"{choice.name} scores {_percent(choice)}, {_points(gain.difference)} more than {gain.to} "
        f"(95% interval of the difference: {100 * gain.low:.1f} to {100 * gain.high:.1f})."
    )
    dearer = done[done.index(choice) + 1 :]
    if not dearer:
        return reason
    best = max(dearer, key=lambda rung: rung.score or 0.0)
    difference = _difference(best, choice)
    if difference is None:
        return reason
    if difference.difference > 0:
        return (
            f"{reason} The best of the more expensive rungs, {best.name}, scores {_points(difference.difference)} "
            "more, which is not a significant difference on these test examples."
        )
    return f"{reason} No more expensive rung scores higher."


def _difference(rung: RungResult, cheaper: RungResult) -> Difference | None:
    return next((entry for entry in rung.differences if entry.to == cheaper.name), None)


def _percent(rung: RungResult) -> str:
    return f"{100 * (rung.score or 0.0):.1f}%"


def _points(share: float) -> str:
    """Return a difference of two scores in percentage points."""
    return f"{100 * share:.1f} percentage points"
