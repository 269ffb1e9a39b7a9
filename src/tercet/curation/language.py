"""Identify languages with py3langid: naive Bayes over byte n-grams (Lui and Baldwin 2012)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tercet.curation.reason import Reason
from tercet.errors import UserError

_SAMPLE = 700  # characters from the beginning, and as many from the middle
_MIN_PROBABILITY = 0.65  # FineWeb's threshold for its own classifier (arXiv:2406.17557)


class Languages:
    """The rule that drops texts in other languages."""

    def __init__(self, codes: Sequence[str]) -> None:
        """Choose the languages that stay, by their ISO 639-1 codes.

        Raises:
            UserError: The model does not know a language, or none is given.
        """
        known = sorted(str(label) for label in _model().labels)
        for code in codes:
            if code not in known:
                raise UserError(f"`languages` has {code!r}, which is unknown; known are {', '.join(known)}")
        if not codes:
            raise UserError("`languages` is empty; name at least one, such as en")
        self.codes = tuple(codes)

    def __call__(self, text: str) -> Reason | None:
        """Return the reason to drop ``text``, or None if it stays."""
        code, probability = identify(text)
        if code in self.codes and probability >= _MIN_PROBABILITY:
            return None
        return Reason("language", f"{code}, probability {probability:.2f}")

    def describe(self) -> list[dict[str, Any]]:
        """Return the rule for the report, as `tercet.curation.filters.Rules.describe` does."""
        source = "FineWeb (the probability)"
        return [
            {
                "rule": "language",
                "limit": _MIN_PROBABILITY,
                "of": f"probability of {', '.join(self.codes)}",
                "source": source,
            }
        ]


def identify(text: str) -> tuple[str, float]:
    """Return the language of ``text`` and its probability, judged by its beginning and its middle."""
    sample = text[:_SAMPLE]
    if len(text) > 3 * _SAMPLE:
        middle = len(text) // 2
        sample += " " + text[middle : middle + _SAMPLE]
    code, probability = _model().classify(sample)
    return str(code), float(probability)


@cache
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
