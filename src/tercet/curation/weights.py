"""Weights of sources in a mixture, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.errors import UserError


@dataclass(frozen=True)
class Weight:
    """The weight of a source in the mixture: a factor or, where ``share`` is true, a share from 0 to 1."""

    value: float
    share: bool = False


def parse_weight(text: str) -> tuple[str, Weight]:
    """Return the source and weight of ``SOURCE=2``, ``SOURCE=0.25`` or ``SOURCE=30%``; raise UserError otherwise."""
    source, equals, number = text.rpartition("=")
    share = number.endswith("%")
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not equals or not source or not math.isfinite(value) or value < 0:
        raise UserError(
            f"`weights` is given {text!r}: write SOURCE=FACTOR or SOURCE=PERCENT%, such as books=2 or web=30%"
        )
    if share and not 0 < value <= 100:
        raise UserError(f"`weights` is given {text!r}: a share is above 0% and at most 100%")
    return source, Weight(value / 100 if share else value, share)


def parse_weights(texts: Sequence[str]) -> dict[str, Weight]:
    """Return the weight of each source from texts in the forms of `parse_weight`."""
    return dict(parse_weight(text) for text in texts)
