"""The rules that drop documents; each has a limit and a published source, and gives its reason.

Thresholds are those of C4 (Raffel et al. 2020, arXiv:1910.10683), Gopher (Rae et al. 2021,
arXiv:2112.11446, section A.1 and table A1) and FineWeb (Penedo et al. 2024, arXiv:2406.17557). A document
stays or is dropped as a whole; no lines are removed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tercet.curation.language import Languages
from tercet.curation.reason import Reason
from tercet.curation.settings import Preset
from tercet.curation.text_statistics import STOP_WORDS, Counts, Words, count, duplicate_grams, top_gram
from tercet.errors import UserError, nearest

PRESETS: tuple[str, ...] = get_args(Preset)
MEASURED_CHARACTERS = 4_000_000  # of a document: enough to judge it, and a bound of memory


@dataclass(frozen=True)
class _Rule:
    """A measurement of a text that must not be below (``min_``) or above (``max_``) a limit."""

    name: str
    web: float | None  # the limit in this preset; None: the preset has no such rule
    light: float | None
    meaning: str
    source: str
    measure: Callable[[Counts], float | None]  # None: the rule does not apply to this text


def _share(part: str, whole: str) -> Callable[[Counts], float | None]:
    def measure(counts: Counts) -> float | None:
        total = getattr(counts, whole)
        return getattr(counts, part) / total if total else None

    return measure


def _mean_length(counts: Counts) -> float | None:
    # In scripts where each character is a word, lengths mean nothing.
    if not counts.plain_words or 2 * counts.unspaced > counts.plain_words:
        return None
    return counts.plain_length / counts.plain_words


_STRUCTURE = (
    _Rule("min_words", 50, 5, "words with a letter or digit", "Gopher", lambda c: c.plain_words),
    _Rule("max_words", 100_000, None, "words with a letter or digit", "Gopher", lambda c: c.plain_words),
    _Rule("min_word_length", 3, None, "mean length of words", "Gopher", _mean_length),
    _Rule("max_word_length", 10, 50, "mean length of words", "Gopher (10)", _mean_length),
    _Rule("max_hashes", 0.1, None, "number signs a word", "Gopher", _share("hashes", "words")),
    _Rule("max_ellipses", 0.1, None, "ellipses a word", "Gopher", _share("ellipses", "words")),
    _Rule("max_bullet_lines", 0.9, None, "lines that begin with a bullet", "Gopher", _share("bullet_lines", "lines")),
    _Rule("max_ellipsis_lines", 0.3, None, "lines that end with an ellipsis", "Gopher", _share("ellipsis_lines", "lines")),
    _Rule("min_alphabetic_words", 0.8, None, "words with a letter", "Gopher", _share("alphabetic_words", "words")),
    _Rule("max_curly_brackets", 0, None, "opening curly brackets", "C4", lambda c: c.braces),
    _Rule("min_sentences", 3, None, "ended sentences", "C4", lambda c: c.sentences),
    _Rule("min_punctuated_lines", 0.12, None, "lines that end like a sentence", "FineWeb", _share("ended_lines", "lines")),
    _Rule("max_short_lines", 0.67, None, "lines of at most 30 characters", "FineWeb", _share("short_lines", "lines")),
    _Rule("max_newlines", 0.3, None, "line ends a word", "FineWeb", _share("newlines", "words")),
    _Rule("max_duplicate_lines", 0.3, 0.3, "lines that occurred before", "Gopher", _share("duplicate_lines", "lines")),
    _Rule("max_duplicate_line_characters", 0.01, 0.2, "characters in such lines", "FineWeb; light: Gopher",
          _share("duplicate_line_length", "characters")),
    _Rule("max_duplicate_paragraphs", 0.3, 0.3, "paragraphs that occurred before", "Gopher",
          _share("duplicate_paragraphs", "paragraphs")),
    _Rule("max_duplicate_paragraph_characters", 0.2, 0.2, "characters in such paragraphs", "Gopher",
          _share("duplicate_paragraph_length", "characters")),
)  # fmt: skip
_ENGLISH = _Rule(
    "min_stop_words", 2, None, f"different words of {', '.join(STOP_WORDS)}", "Gopher", lambda c: c.stop_words
)
_PHRASE = "max_lorem_ipsum"
_TOP = {2: 0.2, 3: 0.18, 4: 0.16}
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class Rules:
    """The rules of a preset; calling them with a text gives the first reason to drop it, or None."""

    def __init__(
        self,
        preset: str = "web",
        *,
        languages: Sequence[str] | None = None,
        overrides: Mapping[str, float] | None = None,
    ) -> None:
        """Choose the rules.

        The rule on stop words is for English: it applies if ``languages`` is None or ``en`` alone.

        Args:
            preset: ``web`` for web pages; ``light`` for books, code and notes, of which only scraps and
                repetitive texts are dropped; ``none``.
            languages: ISO 639-1 codes of the languages that stay; None: all, without identification.
            overrides: Other limits by the name of the rule. ``inf`` disables a ``max_`` rule, 0 a ``min_`` rule.

        Raises:
            UserError: There is no such preset, rule or language.
        """
        self._arguments = (preset, None if languages is None else tuple(languages), dict(overrides or {}))
        if preset not in PRESETS:
            raise UserError(f"there are no rules {preset!r}; choose {', '.join(PRESETS)}")
        self._languages = Languages(languages) if languages is not None else None
        english = languages is None or list(languages) == ["en"]
        numbers = {
            rule.name: limit
            for rule in (*_STRUCTURE, *((_ENGLISH,) if english else ()))
            if (limit := {"web": rule.web, "light": rule.light}.get(preset)) is not None
        }
        if preset == "web":
            numbers[_PHRASE] = 0
        if preset != "none":
            numbers |= {_top_name(n): limit for n, limit in _TOP.items()}
            numbers |= {_repeated_name(n): limit for n, limit in _REPEATED.items()}
        for name, limit in (overrides or {}).items():
            if name not in _names():
                raise UserError(f"there is no rule {name!r}{_nearest(name)}; there are {', '.join(_names())}")
            if math.isnan(limit) or limit < 0:
                raise UserError(f"the limit of {name} is {limit}; it must be 0 or more")
            numbers[name] = limit
        # A rule that no text can break is left out, so that it costs no time.
        self._limits = {
            name: limit
            for name, limit in numbers.items()
            if not (limit == 0 if name.startswith("min_") else math.isinf(limit))
        }
        self._structure = [
            (rule, rule.measure, rule.name.startswith("min_"), self._limits[rule.name])
            for rule in (*_STRUCTURE, _ENGLISH)
            if rule.name in self._limits
        ]
        self._top = [(n, self._limits[_top_name(n)]) for n in _TOP if _top_name(n) in self._limits]
        self._repeated = [
            (n, self._limits[_repeated_name(n)]) for n in _REPEATED if _repeated_name(n) in self._limits
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process makes the rules again: the language model is large, and rules hold functions.
        return _rules, self._arguments

    def __call__(self, text: str) -> Reason | None:
        """Return the first reason to drop ``text``, or None if it stays."""
        text = text[:MEASURED_CHARACTERS]
        if self._limits:
            if _PHRASE in self._limits:
                times = text.count("orem ipsum") + text.count("OREM IPSUM")
                if times > self._limits[_PHRASE]:
                    return Reason(_PHRASE, f"{times} times")
            counts, words = count(text)
            if reason := self._judge(counts) or self._judge_repetition(counts, words):
                return reason
        return self._languages(text) if self._languages is not None else None

    def _judge(self, counts: Counts) -> Reason | None:
        for rule, measure, is_minimum, limit in self._structure:
            value = measure(counts)
            if value is not None and (value < limit if is_minimum else value > limit):
                side = "fewer than" if is_minimum else "more than"
                return Reason(rule.name, f"{value:,.4g} {rule.meaning}, {side} {limit:,g}")
        return None

    def _judge_repetition(self, counts: Counts, words: Words) -> Reason | None:
        for n, limit in self._top:
            if (share := top_gram(words, n) / max(1, counts.characters)) > limit:
                return Reason(_top_name(n), f"{share:.3f} of the characters, more than {limit:g}")
        for n, limit in self._repeated:
            if (length := duplicate_grams(words, n)) > limit * counts.characters:
                share = length / counts.characters
                return Reason(_repeated_name(n), f"{share:.3f} of the characters, more than {limit:g}")
            # If no n words occur twice, no longer sequence does.
            if not length:
                break
        return None

    def describe(self) -> list[dict[str, Any]]:
        """Return the active rules for the report: name, limit, what is measured, the source of the limit."""
        described = [
            {"rule": name, "limit": limit, "of": meaning, "source": source}
            for name, meaning, source in _all()
            if (limit := self._limits.get(name)) is not None
        ]
        return described + (self._languages.describe() if self._languages is not None else [])


def _rules(preset: str, languages: Sequence[str] | None, overrides: Mapping[str, float]) -> Rules:
    """Make rules from positional arguments, as unpickling does."""
    return Rules(preset, languages=languages, overrides=overrides)


def _top_name(n: int) -> str:
    return f"max_top_{n}_gram"


def _repeated_name(n: int) -> str:
    return f"max_duplicate_{n}_grams"


def _all() -> Iterator[tuple[str, str, str]]:
    """Yield name, meaning and source of every rule."""
    for rule in (*_STRUCTURE, _ENGLISH):
        yield rule.name, rule.meaning, rule.source
    yield _PHRASE, "times lorem ipsum", "C4"
    for n in _TOP:
        yield _top_name(n), f"characters in the most frequent {n} words in a row", "Gopher"
    for n in _REPEATED:
        yield _repeated_name(n), f"characters in {n} words in a row that occurred before", "Gopher"


def _names() -> list[str]:
    return [name for name, _, _ in _all()]


def _nearest(name: str) -> str:
    near = nearest(name, _names())
    return f" (did you mean {near[0]}?)" if near else ""
