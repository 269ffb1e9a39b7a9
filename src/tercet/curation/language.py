"""Which language a text is in, by py3langid (a naive Bayes model over byte n-grams: Lui and Baldwin 2012)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.curation.filters import Dropped

_SAMPLE = 700  # characters from the beginning, and as many from the middle
_LEAST = 0.65  # of the model's probability, as FineWeb asks of its classifier (arXiv:2406.17557)


class Languages:
    """Keeps texts in one of ``codes`` (ISO 639-1).

    Raises:
        UserError: the model does not know such a language.
    """

    def __init__(self, codes: Sequence[str]) -> None:
        known = sorted(str(label) for label in _model().labels)
        for code in codes:
            if code not in known:
                raise UserError(f"--language {code}: no such language; known are {', '.join(known)}")
        if not codes:
            raise UserError("no language is given; name one, as en")
        self.codes = tuple(codes)

    def __call__(self, text: str) -> Dropped | None:
        from tercet.curation.filters import Dropped

        code, probability = identify(text)
        if code in self.codes and probability >= _LEAST:
            return None
        return Dropped("language", f"{code}, probability {probability:.2f}")

    def describe(self) -> list[dict[str, Any]]:
        source = "the least probability: FineWeb"
        return [
            {
                "rule": "language",
                "limit": _LEAST,
                "of": f"probability of {', '.join(self.codes)}",
                "source": source,
            }
        ]


def identify(text: str) -> tuple[str, float]:
    """The language of ``text`` and its probability, judged by its beginning and its middle."""
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
