"""Remove test examples, and near-copies of them, from a training corpus.

Texts are compared as sequences of words, case folded and without punctuation and line breaks, so a test text
matches no matter how it is wrapped, indented or quoted. A document is divided into passages at blank lines,
and only the passages that match are removed.

A test text matches a document if
1. all of its words occur consecutively (a text under four words must be a whole passage), or
2. at least half of its distinct word 5-grams occur within a stretch of twice its length (for texts of eight
   words or more).

Why half of the 5-grams: GPT-3 compared 13-grams and Llama 2 runs of more than ten tokens. These sizes suit
benchmark questions and articles, but a docstring's paragraph or a text message has only a dozen words. PaLM
counted an example as contaminated if 70% of its 8-grams occurred. A changed word removes up to n of the
L - n + 1 n-grams: at twelve words a single edit may remove all 8-grams, but leaves a half to seven eighths
of the 5-grams, the size that FineWeb's near-duplicate removal uses. Below eight words, half would be one or
two 5-grams, which unrelated sentences share.
(GPT-3: arXiv 2005.14165, appendix C. PaLM: 2204.02311, section 8. Llama 2: 2307.09288, appendix A.6.
FineWeb: 2406.17557, section 3.4.)
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from tercet.data.document import Document

N = 5
SHARE = 0.5
NEAR_MINIMUM_WORDS = 8
RUN_MINIMUM_WORDS = 4
_EXAMPLES_KEPT = 20

Gram = tuple[str, ...]

_WORD = re.compile(r"[^\W_]+")
# Scripts without spaces between words, where each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD_OR_CHARACTER = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def words(text: str) -> list[str]:
    """Return the text's words for comparison: case folded, without punctuation ("don't" is a single word)."""
    if text.isascii():
        return _WORD.findall(text.casefold().replace("'", ""))
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD_OR_CHARACTER.findall(folded.replace("'", "").replace("\u2019", ""))


def passages(text: str) -> list[str]:
    """Divide the text at blank lines; each part includes those after it, so the joined parts are ``text``."""
    ends = [match.end() for match in _BLANK_LINES.finditer(text)]
    starts = [0, *ends]
    return [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True) if start < end]


def grams(sequence: Sequence[str], n: int) -> Iterator[Gram]:
    """Yield the runs of ``n`` words in order."""
    return zip(*(sequence[start:] for start in range(n)), strict=False)


@dataclass(frozen=True)
class Removed:
    """A removed passage, and the test text that it matched best.

    Attributes:
        document: the id of the document.
        passage: the removed text.
        test: the index of the test text.
        test_text: the test text.
        share: fraction of the test text's 5-grams in the passage; None if all its words occur consecutively.
    """

    document: str
    passage: str
    test: int
    test_text: str
    share: float | None

    @property
    def reason(self) -> str:
        """The reason for the removal, for reports."""
        if self.share is None:
            return "holds the whole test text"
        return f"holds {100 * self.share:.0f}% of the test text's {N}-grams"


@dataclass
class Counts:
    """Counts of removed passages and documents, with examples, for the report."""

    documents: int = 0
    documents_touched: int = 0
    documents_dropped: int = 0
    passages_removed: int = 0
    characters: int = 0
    characters_removed: int = 0
    tests_matched: set[int] = field(default_factory=set)
    examples: list[Removed] = field(default_factory=list)


@dataclass(frozen=True)
class _Test:
    index: int
    text: str
    words: list[str]
    distinct: int  # number of distinct 5-grams
    needed: int  # number of them in a near-copy


@dataclass(frozen=True)
class _Match:
    test: _Test
    start: int  # matching words of the document are [start, end)
    end: int
    share: float | None  # as in Removed


class Decontaminator:
    """Removes test texts and near-copies of them from documents, and counts removals in ``counts``.

    Cleaned documents contain no test text of four words or more as consecutive words, not even across the
    gaps that removed passages leave.

    Args:
        texts: the test examples; reports number them by position.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.counts = Counts()
        self.tests = 0
        self._runs: dict[int, dict[Gram, list[_Test]]] = {
            N: defaultdict(list),
            RUN_MINIMUM_WORDS: defaultdict(list),
        }
        self._near: dict[Gram, list[_Test]] = defaultdict(list)
        self._grams: dict[int, set[Gram]] = {N: set(), RUN_MINIMUM_WORDS: set()}
        self._whole: dict[Gram, _Test] = {}
        for index, text in enumerate(texts):
            self.tests += 1
            self._add(index, text)
        self._longest_whole = max(map(len, self._whole), default=0)

    def _add(self, index: int, text: str) -> None:
        sequence = words(text)
        distinct = set(grams(sequence, N))
        test = _Test(index, text, sequence, len(distinct), math.ceil(SHARE * len(distinct)))
        if len(sequence) >= RUN_MINIMUM_WORDS:
            n = N if len(sequence) >= N else RUN_MINIMUM_WORDS
            self._runs[n][tuple(sequence[:n])].append(test)
            self._grams[n].update(grams(sequence, n))
        elif sequence:
            self._whole.setdefault(tuple(sequence), test)
        if len(sequence) >= NEAR_MINIMUM_WORDS:
            for gram in distinct:
                self._near[gram].append(test)

    def clean(self, document: Document) -> tuple[Document | None, list[Removed]]:
        """Return the document without matching passages (None if no word is left), and the removed passages."""
        self.counts.documents += 1
        self.counts.characters += len(document.text)
        text, removed = document.text, list[Removed]()
        # A removal joins the passages around it, which may match together, so repeat until nothing matches.
        while self._may_match(text) and (matches := self._matches(parts := passages(text))):
            for position, match in sorted(matches.items()):
                removed.append(
                    Removed(
                        document.id, parts[position].strip(), match.test.index, match.test.text, match.share
                    )
                )
            text = "".join(part for position, part in enumerate(parts) if position not in matches)
        if not removed:
            return document, []
        self.counts.documents_touched += 1
        self.counts.passages_removed += len(removed)
        self.counts.characters_removed += len(document.text) - len(text)
        self.counts.examples += removed[: max(0, _EXAMPLES_KEPT - len(self.counts.examples))]
        if not words(text):
            self.counts.documents_dropped += 1
            return None, removed
        return replace(document, text=text), removed

    def clean_all(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the cleaned documents, without those that became empty."""
        for document in documents:
            cleaned, _ = self.clean(document)
            if cleaned is not None:
                yield cleaned

    def summary(self) -> dict[str, Any]:
        """Return the counts and the examples as JSON values for ``report.json``."""
        counts = self.counts
        return {
            "test_examples": self.tests,
            "test_examples_found": len(counts.tests_matched),
            "documents": counts.documents,
            "documents_touched": counts.documents_touched,
            "documents_dropped": counts.documents_dropped,
            "passages_removed": counts.passages_removed,
            "characters": counts.characters,
            "characters_removed": counts.characters_removed,
            "examples": [
                {
                    "document": removed.document,
                    "passage": removed.passage,
                    "test_text": removed.test_text,
                    "reason": removed.reason,
                }
                for removed in counts.examples
            ],
        }

    def _may_match(self, text: str) -> bool:
        """Return False only if nothing can match: a quick test that dismisses most documents."""
        if self._whole:
            return True
        sequence = words(text)
        for n, known in self._grams.items():
            shared = known.intersection(grams(sequence, n)) if known else known
            near: Counter[int] = Counter()
            for gram in shared:
                if any(shared.issuperset(grams(test.words, n)) for test in self._runs[n].get(gram, ())):
                    return True
                for test in self._near.get(gram, ()):
                    near[test.index] += 1
                    if near[test.index] >= test.needed:
                        return True
        return False

    def _matches(self, parts: list[str]) -> dict[int, _Match]:
        """Return the passages (by position) that contain part of a match, with the strongest match of each."""
        sequence: list[str] = []
        ends: list[int] = []  # number of words up to the end of each passage
        result: dict[int, _Match] = {}
        for position, part in enumerate(parts):
            start = len(sequence)
            sequence += words(part)
            ends.append(len(sequence))
            if len(sequence) - start <= self._longest_whole:
                test = self._whole.get(tuple(sequence[start:]))
                if test is not None:
                    self._note(result, position, _Match(test, start, len(sequence), None))
        matches = self._matches_in_words(sequence, ends)
        matches.sort(key=lambda match: match.start)
        position = 0
        for match in matches:
            while ends[position] <= match.start:
                position += 1
            last = position
            self._note(result, last, match)
            while ends[last] < match.end:
                last += 1
                self._note(result, last, match)
        return result

    def _matches_in_words(self, sequence: list[str], ends: list[int]) -> list[_Match]:
        matches: list[_Match] = []
        near: dict[int, list[tuple[int, Gram]]] = defaultdict(list)
        tests: dict[int, _Test] = {}
        for n, known in self._grams.items():
            hits = [(start, gram) for start, gram in enumerate(grams(sequence, n)) if gram in known]
            for start, gram in hits:
                for test in self._runs[n].get(gram, ()):
                    end = start + len(test.words)
                    if sequence[start:end] == test.words:
                        matches.append(_Match(test, start, end, None))
                for test in self._near.get(gram, ()):
                    tests[test.index] = test
                    near[test.index].append((start, gram))
        for index, places in near.items():
            if len(places) < tests[index].needed:
                continue
            for _, within in groupby(places, key=lambda place: bisect_right(ends, place[0])):
                matches += _near_stretches(tests[index], list(within))
        if matches:
            return matches
        # No single passage matches: look for a copy that blank lines divide.
        return [match for index, places in near.items() for match in _near_stretches(tests[index], places)]

    def _note(self, result: dict[int, _Match], position: int, match: _Match) -> None:
        self.counts.tests_matched.add(match.test.index)
        if position not in result or _strength(result[position]) < _strength(match):
            result[position] = match


def _strength(match: _Match) -> float:
    return 2.0 if match.share is None else match.share


def _near_stretches(test: _Test, hits: list[tuple[int, Gram]]) -> Iterator[_Match]:
    """Yield the 5-grams (at their positions in the document) that together are enough of the test text."""
    window: Counter[Gram] = Counter()
    left = 0
    for right, (start, gram) in enumerate(hits):
        window[gram] += 1
        while start + N - hits[left][0] > 2 * len(test.words):
            leaving = hits[left][1]
            window[leaving] -= 1
            if not window[leaving]:
                del window[leaving]
            left += 1
        if len(window) >= test.needed:
            share = len(window) / test.distinct
            for place, _ in hits[left : right + 1]:
                yield _Match(test, place, place + N, share)
