"""Split examples into train, dev and locked test by their content.

A hash of an example's own input text determines its split. Adding, removing or reordering rows
moves no other example, except at a cap, and editing the prompt moves none. So a former test example
is never trained on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "dev", "test"]

# 1,000 test examples give an interval of ±3 percentage points at worst; more only cost time.
TEST_SHARE, TEST_CAP = 0.15, 1000
DEV_SHARE, DEV_CAP = 0.10, 500

_MARKS = re.compile(r"[^\w\s]+")


def normalise(text: str) -> str:
    """Return the form of a text for comparison: Unicode NFKC, case folded, no punctuation, single spaces.

    Symbols that are not punctuation (``+``, ``<``, emoji) stay. So does punctuation between two digits,
    where it is arithmetic or a decimal point: 3-4, 3*4 and 3.4 are three texts. A text of punctuation
    only keeps it; otherwise all such texts would be equal.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = " ".join(_MARKS.sub(_without_punctuation, folded).split())
    return bare or " ".join(folded.split())


def _without_punctuation(match: re.Match[str]) -> str:
    marks, text = match.group(), match.string
    # A few characters on either side are enough to skip spaces, and keep the time linear in the text.
    before = text[max(0, match.start() - 8) : match.start()].rstrip()[-1:]
    after = text[match.end() : match.end() + 8].lstrip()[:1]
    if before.isdigit() and after.isdigit():
        return marks
    if marks in ("'", "\N{RIGHT SINGLE QUOTATION MARK}"):  # don't and dont are one word, well-known is two
        return ""
    return "".join(" " if unicodedata.category(mark).startswith("P") else mark for mark in marks)


def content_id(text: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the normalised text, so equal texts have equal ids."""
    return _digest(text).hex()[:16]


def position(text: str) -> float:
    """Return a text's position in [0, 1): uniform over texts, the same on every machine and in every run."""
    # A float holds 53 bits exactly; 64 bits could round up to 1.0.
    return (int.from_bytes(_digest(text)[:8], "big") >> 11) / 2**53


def _digest(text: str) -> bytes:
    return hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).digest()


def assign(
    texts: Sequence[str],
    *,
    test: float | int | None = None,
    dev: float | int | None = None,
    given_test: bool = False,
) -> list[Split]:
    """Return the split of each text.

    Args:
        texts: inputs of the examples, distinct after ``normalise``.
        test: a share below 1 (0.15 by default, at most 1,000 examples) or a number of examples.
        dev: a share below 1 (0.10 by default, at most 500 examples) or a number of examples.
        given_test: whether the test examples are others, so that none of these become test.

    A share takes the texts whose position is below it (dev: between the end of test and the sum). A cap
    or a number takes the texts with the smallest positions. The texts above a cap become train.
    """
    order = sorted((position(text), index) for index, text in enumerate(texts))
    result: list[Split] = ["train"] * len(texts)
    end = 0.0
    if not given_test:
        chosen, end = _take(order, 0.0, test, TEST_SHARE, TEST_CAP)
        for index in chosen:
            result[index] = "test"
    rest = [(place, index) for place, index in order if result[index] == "train"]
    chosen, _ = _take(rest, end, dev, DEV_SHARE, DEV_CAP)
    for index in chosen:
        result[index] = "dev"
    return result


def _take(
    order: list[tuple[float, int]], start: float, size: float | int | None, share: float, cap: int
) -> tuple[list[int], float]:
    """Return the indexes taken from ``start`` on, and the position at which the next split may begin."""
    after = [(place, index) for place, index in order if place >= start]
    if isinstance(size, int):
        taken = after[:size]
        return [index for _, index in taken], taken[-1][0] if taken else start
    end = start + (share if size is None else size)
    below = [index for place, index in after if place < end]
    return (below[:cap] if size is None else below), end
