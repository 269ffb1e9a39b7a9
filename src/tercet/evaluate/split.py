"""Train, dev and locked test, fixed by what an example says and by nothing else.

An example's place follows from a hash of its own input text. Adding, removing or reordering rows
moves no other example (except at a cap), and an edited prompt moves none at all: what was once
test is never trained on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "dev", "test"]

TEST_SHARE, TEST_CAP = (
    0.15,
    1000,
)  # 1,000 examples give an interval of ±3 points at worst; more only costs time
DEV_SHARE, DEV_CAP = 0.10, 500

_MARKS = re.compile(r"[^\w\s]+")


def normalise(text: str) -> str:
    """The text as it is compared: Unicode NFKC, case folded, punctuation out, single spaces.

    Symbols that are not punctuation (``+``, ``<``, emoji) stay, and so does punctuation between two
    digits, where it is arithmetic or a decimal point: 3-4, 3*4 and 3.4 are three texts. A text of
    nothing but punctuation stays as it is, or all of them would be one.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = " ".join(_MARKS.sub(_without_punctuation, folded).split())
    return bare or " ".join(folded.split())


def _without_punctuation(match: re.Match[str]) -> str:
    marks, text = match.group(), match.string
    # A few characters either side are enough to see past spaces, and keep this linear in the text.
    before = text[max(0, match.start() - 8) : match.start()].rstrip()[-1:]
    after = text[match.end() : match.end() + 8].lstrip()[:1]
    if before.isdigit() and after.isdigit():
        return marks
    if marks in ("'", "\N{RIGHT SINGLE QUOTATION MARK}"):  # don't and dont are one word, well-known is two
        return ""
    return "".join(" " if unicodedata.category(mark).startswith("P") else mark for mark in marks)


def content_id(text: str) -> str:
    """16 hexadecimal digits of the SHA-256 of the normalised text: equal texts have equal ids."""
    return _digest(text).hex()[:16]


def position(text: str) -> float:
    """Where the text falls in [0, 1): uniform over texts, the same on every machine and in every run."""
    # 53 bits are what a float holds exactly: 64 of them could round up to 1.0.
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
    """The split of each text, which must be distinct after ``normalise``.

    Args:
        texts: inputs of the examples.
        test: a share below 1 (0.15 by default, at most 1,000 examples) or a number of examples.
        dev: a share below 1 (0.10 by default, at most 500 examples) or a number of examples.
        given_test: the test examples come from elsewhere, so none are taken from these.

    A share takes the texts whose position lies below it (dev: between test's end and the sum), a cap
    or a number those with the smallest positions. What a cap leaves over goes to train.
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
    """The indexes taken from ``start`` on, and where the next split may begin."""
    after = [(place, index) for place, index in order if place >= start]
    if isinstance(size, int):
        taken = after[:size]
        return [index for _, index in taken], taken[-1][0] if taken else start
    end = start + (share if size is None else size)
    below = [index for place, index in after if place < end]
    return (below[:cap] if size is None else below), end
