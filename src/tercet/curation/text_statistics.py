"""Count what the rules judge a document by, in compiled loops over its characters.

A word is a sequence of characters without white space; in scripts that are written without spaces each
character is a word. A line is stripped of white space; blank lines don't count. A paragraph ends at a blank
line. Lines, paragraphs and word n-grams are compared by 64-bit hashes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tercet.curation.characters import HASH_BASE, TABLE_SIZE, UNSPACED_RANGES

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher's
SHORT_LINE = 30  # characters, FineWeb's

_SPACE, _LETTER, _ALNUM, _UNSPACED, _ENDER, _CLOSER, _BULLET = 1, 2, 4, 8, 16, 32, 64
_ENDERS = ".!?\u2026\u3002\uff01\uff1f\uff61\u061f\u06d4\u0964\u0965\u1362"
_CLOSERS = "\"'\u201d\u2019\u00bb)]}\u300d\u300f*_"
_BULLETS = "-\u2022\u2023\u25cf\u25e6*\u2013"
_BASE = np.uint64(HASH_BASE)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_HALF = np.uint64(32)
_NEWLINE, _HASH, _DOT, _ELLIPSIS, _BRACE = 10, 35, 46, 0x2026, 123


class Counts(NamedTuple):
    """The counts of a text. Lengths are in characters."""

    characters: int
    words: int
    plain_words: int  # with a letter or a digit
    plain_length: int  # of all plain words together
    alphabetic_words: int  # with a letter
    hashes: int  # number signs
    ellipses: int
    lines: int
    bullet_lines: int
    ellipsis_lines: int  # that end with an ellipsis
    ended_lines: int  # that end a sentence, apart from closing quotes and brackets
    short_lines: int  # of at most `SHORT_LINE` characters
    newlines: int
    braces: int  # opening curly brackets
    sentences: int  # with an end mark
    stop_words: int  # different words of `STOP_WORDS`
    unspaced: int  # characters of scripts without spaces
    duplicate_lines: int
    duplicate_line_length: int
    paragraphs: int
    duplicate_paragraphs: int
    duplicate_paragraph_length: int


# The place of each field of `Counts`, for the compiled loops.
_FIELDS = len(Counts._fields)
(
    _CHARACTERS, _WORDS, _PLAIN_WORDS, _PLAIN_LENGTH, _ALPHABETIC_WORDS, _HASHES, _ELLIPSES, _LINES, _BULLET_LINES,
    _ELLIPSIS_LINES, _ENDED_LINES, _SHORT_LINES, _NEWLINES, _BRACES, _SENTENCES, _STOP_WORDS, _UNSPACED_CHARACTERS,
    _DUPLICATE_LINES, _DUPLICATE_LINE_LENGTH, _PARAGRAPHS, _DUPLICATE_PARAGRAPHS, _DUPLICATE_PARAGRAPH_LENGTH,
) = range(_FIELDS)  # fmt: skip


class Words(NamedTuple):
    """The words of a text in order: their hashes and lengths."""

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int32]


def count(text: str) -> tuple[Counts, Words]:
    """Count ``text`` and hash its words. Memory: about 30 bytes a character."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    numbers, hashes, lengths = _scan(points, _kinds(), _stop_hashes())
    return Counts(*numbers.tolist()), Words(hashes, lengths)


def top_gram(words: Words, n: int) -> int:
    """Return the characters in all occurrences of the most frequent word n-gram, with the spaces within.

    The result is 0 if none occurs twice. Of equally frequent n-grams the longest counts.
    """
    return int(_top(words.hashes, words.lengths, n))


def duplicate_grams(words: Words, n: int) -> int:
    """Return the characters, without spaces, in word n-grams that occurred before; none is counted twice."""
    return int(_repeated(words.hashes, words.lengths, n))


@cache
def _kinds() -> NDArray[np.uint8]:
    table = np.zeros(TABLE_SIZE + 1, dtype=np.uint8)
    every = list(map(chr, range(TABLE_SIZE)))
    for kind, test in ((_SPACE, str.isspace), (_LETTER, str.isalpha), (_ALNUM, str.isalnum)):
        table[:TABLE_SIZE] |= kind * np.fromiter(map(test, every), dtype=np.uint8, count=TABLE_SIZE)
    for first, last in UNSPACED_RANGES:
        table[first : last + 1] |= _UNSPACED
    for characters, kind in ((_ENDERS, _ENDER), (_CLOSERS, _CLOSER), (_BULLETS, _BULLET)):
        for character in characters:
            table[ord(character)] |= kind
    return table


@cache
def _stop_hashes() -> NDArray[np.uint64]:
    hashes = []
    for word in STOP_WORDS:
        value = 0
        for character in word:
            value = (value * int(_BASE) + ord(character)) % 2**64
        hashes.append(value)
    return np.array(hashes, dtype=np.uint64)


@njit(cache=True)
def _slot(keys, used, mark, key):  # type: ignore[no-untyped-def]
    """Return the slot of ``key`` in an open-addressed table, or a free slot (``used`` is not ``mark``)."""
    mask = np.uint64(len(keys) - 1)
    mixed = (key ^ (key >> _HALF)) * _MIX
    place = (mixed ^ (mixed >> _HALF)) & mask
    while used[place] == mark and keys[place] != key:
        place = (place + np.uint64(1)) & mask
    return place


@njit(cache=True)
def _table_size(entries):  # type: ignore[no-untyped-def]
    size = 16
    while size < 2 * entries:
        size *= 2
    return size


@njit(cache=True)
def _duplicates(hashes, lengths):  # type: ignore[no-untyped-def]
    """Return the number of entries that occurred before, and their length."""
    size = _table_size(len(hashes))
    keys, used = np.empty(size, np.uint64), np.zeros(size, np.uint8)
    number = length = 0
    for index in range(len(hashes)):
        place = _slot(keys, used, 1, hashes[index])
        if used[place]:
            number += 1
            length += lengths[index]
        else:
            used[place] = 1
            keys[place] = hashes[index]
    return number, length


@njit(cache=True)
def _gram(hashes, start, n):  # type: ignore[no-untyped-def]
    value = hashes[start]
    for index in range(start + 1, start + n):
        value = (value ^ (value >> _HALF)) * _BASE + hashes[index]
    return value


@njit(cache=True)
def _top(hashes, lengths, n):  # type: ignore[no-untyped-def]
    grams = len(hashes) - n + 1
    if grams < 2:
        return 0
    size = _table_size(grams)
    keys, times = np.empty(size, np.uint64), np.zeros(size, np.int32)
    used = np.zeros(size, np.uint8)
    max_times = longest = 0
    for start in range(grams):
        key = _gram(hashes, start, n)
        place = _slot(keys, used, 1, key)
        if not used[place]:
            used[place] = 1
            keys[place] = key
        times[place] += 1
        if times[place] > 1 and times[place] >= max_times:
            length = n - 1
            for index in range(start, start + n):
                length += lengths[index]
            if times[place] > max_times or length > longest:
                max_times, longest = times[place], length
    return max_times * longest


@njit(cache=True)
def _repeated(hashes, lengths, n):  # type: ignore[no-untyped-def]
    grams = len(hashes) - n + 1
    if grams < 2:
        return 0
    size = _table_size(grams)
    keys, used = np.empty(size, np.uint64), np.zeros(size, np.uint8)
    total = start = 0
    while start < grams:
        key = _gram(hashes, start, n)
        place = _slot(keys, used, 1, key)
        if used[place]:
            for index in range(start, start + n):
                total += lengths[index]
            start += n
        else:
            used[place] = 1
            keys[place] = key
            start += 1
    return total


@njit(cache=True)
def _is(points, kinds, index, kind):  # type: ignore[no-untyped-def]
    """Whether the character at ``index`` is of one of the kinds in the bit mask ``kind``."""
    return kinds[min(points[index], np.uint32(len(kinds) - 1))] & kind > 0


@njit(cache=True)
def _ends_sentence(points, kinds, index, end):  # type: ignore[no-untyped-def]
    """Whether the mark at ``index`` ends a sentence in the line that ends before ``end``."""
    after = index + 1
    while after < end and _is(points, kinds, after, _CLOSER):
        after += 1
    # A full-width mark ends a sentence by itself; others need white space after them.
    return after == end or points[index] >= 0x3000 or _is(points, kinds, after, _SPACE)


@njit(cache=True)
def _scan_words(points, kinds, stop_hashes, start, end, counts, word_hashes, word_lengths):  # type: ignore[no-untyped-def]
    """Add the words of the line ``points[start:end]`` to ``counts``, and their hashes and lengths to the arrays.

    ``counts[_STOP_WORDS]`` is a bit mask of the stop words that occurred.
    """
    words, last = counts[_WORDS], np.uint32(len(kinds) - 1)
    word_start = -1
    word_hash, letters_hash = np.uint64(0), np.uint64(0)
    has_letter = has_alnum = False
    for index in range(start, end + 1):
        point = points[index] if index < end else np.uint32(0)
        kind = kinds[min(point, last)] if index < end else np.uint8(_SPACE)
        if kind & (_SPACE | _UNSPACED) and word_start >= 0:
            length = index - word_start
            word_hashes[words], word_lengths[words] = word_hash, length
            words += 1
            counts[_ALPHABETIC_WORDS] += has_letter
            if has_alnum:
                counts[_PLAIN_WORDS] += 1
                counts[_PLAIN_LENGTH] += length
                for number in range(len(stop_hashes)):
                    if stop_hashes[number] == letters_hash:
                        counts[_STOP_WORDS] |= 1 << number
            word_start = -1
        if index == end:
            break
        if kind & _UNSPACED:
            word_hashes[words], word_lengths[words] = np.uint64(point), 1
            words += 1
            counts[_UNSPACED_CHARACTERS] += 1
            counts[_ALPHABETIC_WORDS] += 1
            counts[_PLAIN_WORDS] += 1
            counts[_PLAIN_LENGTH] += 1
        elif not kind & _SPACE:
            if word_start < 0:
                word_start = index
                word_hash = letters_hash = np.uint64(0)
                has_letter = has_alnum = False
            word_hash = word_hash * _BASE + np.uint64(point)
            if kind & _ALNUM:
                has_alnum = True
                if kind & _LETTER:
                    has_letter = True
                lower = point + 32 if 65 <= point <= 90 else point
                letters_hash = letters_hash * _BASE + np.uint64(lower)
    counts[_WORDS] = words


@njit(cache=True)
def _scan_line(points, kinds, start, end, counts):  # type: ignore[no-untyped-def]
    """Add the marks and the form of the line ``points[start:end]`` to ``counts``, and return the line's hash."""
    line_hash, last = np.uint64(0), np.uint32(len(kinds) - 1)
    dots = hashes = braces = ellipses = sentences = 0
    for index in range(start, end):
        point = points[index]
        line_hash = line_hash * _BASE + np.uint64(point)
        hashes += point == _HASH
        braces += point == _BRACE
        ellipses += point == _ELLIPSIS
        if point == _DOT:
            dots += 1
        else:
            ellipses += dots // 3
            dots = 0
        if kinds[min(point, last)] & _ENDER:
            sentences += _ends_sentence(points, kinds, index, end)
    counts[_HASHES] += hashes
    counts[_BRACES] += braces
    counts[_ELLIPSES] += ellipses + dots // 3
    counts[_SENTENCES] += sentences
    counts[_LINES] += 1
    counts[_BULLET_LINES] += _is(points, kinds, start, _BULLET)
    counts[_SHORT_LINES] += end - start <= SHORT_LINE
    tail = end - 1
    counts[_ELLIPSIS_LINES] += points[tail] == _ELLIPSIS or (
        end - start >= 3 and points[tail] == _DOT and points[tail - 1] == _DOT and points[tail - 2] == _DOT
    )
    while tail > start and _is(points, kinds, tail, _CLOSER):
        tail -= 1
    counts[_ENDED_LINES] += _is(points, kinds, tail, _ENDER)
    return line_hash


@njit(cache=True)
def _scan(points, kinds, stop_hashes):  # type: ignore[no-untyped-def]
    """Return the numbers of `Counts`, and the hashes and lengths of the words."""
    total = len(points)
    counts = np.zeros(_FIELDS, np.int64)
    newlines = 0
    for index in range(total):
        newlines += points[index] == _NEWLINE
    word_hashes, word_lengths = np.empty(total, np.uint64), np.empty(total, np.int32)
    line_hashes, line_lengths = np.empty(newlines + 1, np.uint64), np.empty(newlines + 1, np.int64)
    part_hashes, part_lengths = np.empty(newlines + 1, np.uint64), np.empty(newlines + 1, np.int64)
    lines = parts = 0
    part_hash, part_length = np.uint64(0), 0
    begin = 0
    while begin <= total:
        stop = begin
        while stop < total and points[stop] != _NEWLINE:
            stop += 1
        start, end = begin, stop  # of the line without white space around it
        while start < end and _is(points, kinds, start, _SPACE):
            start += 1
        while end > start and _is(points, kinds, end - 1, _SPACE):
            end -= 1
        begin = stop + 1
        if start == end:  # a blank line ends a paragraph
            if part_length:
                part_hashes[parts], part_lengths[parts] = part_hash, part_length
                parts += 1
                part_hash, part_length = np.uint64(0), 0
            continue
        _scan_words(points, kinds, stop_hashes, start, end, counts, word_hashes, word_lengths)
        line_hash = _scan_line(points, kinds, start, end, counts)
        line_hashes[lines], line_lengths[lines] = line_hash, end - start
        lines += 1
        part_hash = (part_hash ^ (part_hash >> _HALF)) * _BASE + line_hash + np.uint64(1)
        part_length += end - start
    if part_length:
        part_hashes[parts], part_lengths[parts] = part_hash, part_length
        parts += 1
    mask = counts[_STOP_WORDS]
    counts[_STOP_WORDS] = 0
    for number in range(len(stop_hashes)):
        counts[_STOP_WORDS] += (mask >> number) & 1
    counts[_CHARACTERS], counts[_NEWLINES], counts[_PARAGRAPHS] = total, newlines, parts
    same, length = _duplicates(line_hashes[:lines], line_lengths[:lines])
    counts[_DUPLICATE_LINES], counts[_DUPLICATE_LINE_LENGTH] = same, length
    same, length = _duplicates(part_hashes[:parts], part_lengths[:parts])
    counts[_DUPLICATE_PARAGRAPHS], counts[_DUPLICATE_PARAGRAPH_LENGTH] = same, length
    words = counts[_WORDS]
    return counts, word_hashes[:words].copy(), word_lengths[:words].copy()
