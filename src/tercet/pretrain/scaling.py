"""Predict the loss of a run from a few tiny ones: a scaling law fitted on the same corpus.

Loss falls with training compute C as E + K / C^g (Kaplan et al. 2020, arXiv:2001.08361; with the
irreducible part E as in Hoffmann et al. 2022, arXiv:2203.15556), when size and data grow together, as
`tercet.pretrain.plan` makes them. Three numbers are fitted to three or four runs, so the law is only used
for budgets up to a few tens of times the largest of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tercet.errors import UserError
from tercet.files import cache_directory, read_json, write_json

EXPONENTS = np.linspace(0.03, 0.5, 95)  # published exponents of language models lie between 0.05 and 0.35


@dataclass(frozen=True)
class Point:
    """A finished run."""

    flops: float  # operations of training: 6 a matrix weight and token
    bits_per_byte: float


@dataclass(frozen=True)
class Law:
    """A power law of training compute: bits per byte = floor + scale * (flops / 1e12) ** -exponent."""

    floor: float
    scale: float
    exponent: float
    points: tuple[Point, ...]

    def predict(self, flops: float) -> float:
        """Return the bits per byte expected after ``flops`` operations of training."""
        return float(self.floor + self.scale * (flops / 1e12) ** -self.exponent)

    @property
    def error(self) -> float:
        """The largest relative error at the points that the law was fitted to."""
        return max(abs(self.predict(point.flops) / point.bits_per_byte - 1) for point in self.points)


def fit(points: Sequence[Point]) -> Law:
    """Fit the law with the least squared error of the logarithms.

    For every exponent of a grid, linear least squares gives the floor and the scale (a floor below 0 is set
    to 0), so the search cannot get stuck in a local minimum.

    Raises:
        UserError: Fewer than three points, or a larger budget gave a higher loss.
    """
    ordered = sorted(points, key=lambda point: point.flops)
    if len({point.flops for point in ordered}) < 3:
        raise UserError("a scaling law needs runs of at least three different budgets")
    bits = np.array([point.bits_per_byte for point in ordered])
    if (np.diff(bits) >= 0).any():
        raise UserError(
            "a larger budget gave a higher loss: "
            + ", ".join(f"{point.flops:.2g} operations {point.bits_per_byte:.3f}" for point in ordered)
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
        ratios = [law.predict(point.flops) / point.bits_per_byte for point in ordered]
        error = float(np.square(np.log(ratios)).sum())
        if best is None or error < best[0]:
            best = error, law
    assert best is not None
    return best[1]


def _path(key: str) -> Path:
    return cache_directory() / "scaling" / f"{key}.json"


def store_law(key: str, law: Law) -> None:
    """Store the law of the corpus ``key`` in the user's cache, so that later plans predict their loss."""
    write_json(_path(key), asdict(law))


def stored_law(key: str) -> Law | None:
    """Return the law that was fitted on the corpus ``key`` before, if there is one."""
    try:
        stored = read_json(_path(key))
        return Law(**{**stored, "points": tuple(Point(**point) for point in stored["points"])})
    except (UserError, KeyError, TypeError):
        return None
