"""What a run will reach, from a few tiny ones: a scaling law fitted on this corpus.

Loss falls with training compute C as E + K / C^g (Kaplan et al. 2020, arXiv:2001.08361; with the
irreducible part E as in Hoffmann et al. 2022, arXiv:2203.15556), when size and data grow together, as the
rules of `build.plan` make them. Three numbers are fitted to three or four runs, so the law is only asked
about budgets a few tens of times the largest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tercet.errors import UserError
from tercet.files import cache_directory, read_json, write_json

EXPONENTS = np.linspace(0.03, 0.5, 95)  # those found for language models lie between 0.05 and 0.35


@dataclass(frozen=True)
class Point:
    """A run that was made: operations of training (6 a matrix weight and token), and what it reached."""

    flops: float
    bits_per_byte: float


@dataclass(frozen=True)
class Law:
    """bits per byte = floor + scale * (flops / 1e12) ** -exponent."""

    floor: float
    scale: float
    exponent: float
    points: tuple[Point, ...]

    def predict(self, flops: float) -> float:
        """Bits per byte after ``flops`` operations."""
        return float(self.floor + self.scale * (flops / 1e12) ** -self.exponent)

    @property
    def error(self) -> float:
        """The largest relative miss on the points themselves."""
        return max(abs(self.predict(p.flops) / p.bits_per_byte - 1) for p in self.points)


def fit(points: Sequence[Point]) -> Law:
    """The law nearest to the points in the least-squares sense of logarithms.

    For every exponent of a grid the floor and the scale follow by linear least squares (a floor below 0
    is set to 0), so nothing can get stuck.

    Raises:
        UserError: fewer than three points, or a larger budget gave a higher loss.
    """
    ordered = sorted(points, key=lambda point: point.flops)
    if len({point.flops for point in ordered}) < 3:
        raise UserError("a scaling law needs runs of at least three different budgets")
    bits = np.array([point.bits_per_byte for point in ordered])
    if (np.diff(bits) >= 0).any():
        raise UserError(
            "a larger budget gave a higher loss: "
            + ", ".join(f"{p.flops:.2g} operations {p.bits_per_byte:.3f}" for p in ordered)
            + "; there is too little text, or the machine was too busy to train"
        )
    compute = np.array([point.flops for point in ordered]) / 1e12
    best: tuple[float, Law] | None = None
    for exponent in EXPONENTS:
        column = compute**-exponent
        design = np.stack((np.ones_like(column), column), axis=1) / bits[:, None]
        floor, scale = np.linalg.lstsq(design, np.ones_like(bits), rcond=None)[0]
        if floor < 0:
            floor, scale = 0.0, float((column / bits).sum() / np.square(column / bits).sum())
        law = Law(float(floor), float(scale), float(exponent), tuple(ordered))
        miss = float(np.square(np.log([law.predict(p.flops) / p.bits_per_byte for p in ordered])).sum())
        if best is None or miss < best[0]:
            best = miss, law
    assert best is not None
    return best[1]


def _path(key: str) -> Path:
    return cache_directory() / "scaling" / f"{key}.json"


def keep(key: str, law: Law) -> None:
    """Remember the law of the corpus ``key``, so that `build` can say what it expects."""
    write_json(_path(key), asdict(law))


def remembered(key: str) -> Law | None:
    """The law that was fitted on the corpus ``key`` before, if any."""
    try:
        stored = read_json(_path(key))
        return Law(**{**stored, "points": tuple(Point(**point) for point in stored["points"])})
    except (UserError, KeyError, TypeError):
        return None
