"""What the rules judge a document by, counted in one compiled pass over its characters.

A word is a run of characters without white space; in scripts that are written without spaces each
character is one. A line is stripped of white space; blank ones don't count. A paragraph ends at a blank
line. Lines, paragraphs and word n-grams are compared by 64-bit hashes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher's
SHORT_LINE = 30  # characters, FineWeb's

_SPACE, _LETTER, _ALNUM, _UNSPACED, _ENDER, _CLOSER, _BULLET = 1, 2, 4, 8, 16, 32, 64
_ENDERS = ".!?\u2026\u3002\uff01\uff1f\uff61\u061f\u06d4\u0964\u0965\u1362"
_CLOSERS = "\"'\u201d\u2019\u00bb)]}\u300d\u300f*_"
_BULLETS = "-\u2022\u2023\u25cf\u25e6*\u2013"
_TABLE = 0x33480  # above the last ideographs there are no letters
_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
)  # fmt: skip
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_HALF = np.uint64(32)
_NEWLINE, _HASH, _DOT, _ELLIPSIS, _BRACE = 10, 35, 46, 0x2026, 123


class Counts(NamedTuple):
    """Of one text. Lengths are in characters."""

    characters: int
    words: int
    plain_words: int  # with a letter or a digit
    plain_length: int  # of all of them together
    alphabetic_words: int  # with a letter
    hashes: int  # number signs
    ellipses: int
    lines: int
    bullet_lines: int
    ellipsis_lines: int  # that end with one
    ended_lines: int  # that end with a sentence's end, closing quotes and brackets aside
    short_lines: int  # of at most `SHORT_LINE` characters
    newlines: int
    braces: int  # opening curly ones
    sentences: int  # ended ones
    stop_words: int  # different ones of `STOP_WORDS`
    unspaced: int  # characters of scripts without spaces
    duplicate_lines: int
    duplicate_line_length: int
    paragraphs: int
    duplicate_paragraphs: int
    duplicate_paragraph_length: int


class Words(NamedTuple):
    """The words of a text in order: their hashes and lengths."""

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int32]


def count(text: str) -> tuple[Counts, Words]:
    """The counts of ``text`` and its words. Memory: about 30 bytes a character."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    numbers, hashes, lengths = _scan(points, _kinds(), _stop_hashes())
    return Counts(*numbers.tolist()), Words(hashes, lengths)


def top_gram(words: Words, n: int) -> int:
    """Characters in all places of the most frequent word n-gram, the spaces within included.

    0 where none occurs twice; of equally frequent ones the longest counts.
    """
    return int(_top(words.hashes, words.lengths, n))


def duplicate_grams(words: Words, n: int) -> int:
    """Characters, without spaces, in word n-grams that occurred before; they are not counted twice."""
    return int(_repeated(words.hashes, words.lengths, n))


@cache
def _kinds() -> NDArray[np.uint8]:
    table = np.zeros(_TABLE + 1, dtype=np.uint8)
    every = list(map(chr, range(_TABLE)))
    for kind, test in ((_SPACE, str.isspace), (_LETTER, str.isalpha), (_ALNUM, str.isalnum)):
        table[:_TABLE] |= kind * np.fromiter(map(test, every), dtype=np.uint8, count=_TABLE)
    for first, last in _UNSPACED_RANGES:
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
    """The place of ``key`` in an open-addressed table, free (``used`` is not ``mark``) or its own."""
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
    """How many entries occurred before, and their length."""
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
    most = longest = 0
    for start in range(grams):
        key = _gram(hashes, start, n)
        place = _slot(keys, used, 1, key)
        if not used[place]:
            used[place] = 1
            keys[place] = key
        times[place] += 1
        if times[place] > 1 and times[place] >= most:
            length = n - 1
            for index in range(start, start + n):
                length += lengths[index]
            if times[place] > most or length > longest:
                most, longest = times[place], length
    return most * longest


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
def _scan(points, kinds, stop_hashes):  # type: ignore[no-untyped-def]
    last = np.uint32(len(kinds) - 1)
    total = len(points)
    newlines = 0
    for index in range(total):
        newlines += points[index] == _NEWLINE
    word_hashes, word_lengths = np.empty(total, np.uint64), np.empty(total, np.int32)
    line_hashes, line_lengths = np.empty(newlines + 1, np.uint64), np.empty(newlines + 1, np.int64)
    part_hashes, part_lengths = np.empty(newlines + 1, np.uint64), np.empty(newlines + 1, np.int64)
    words = plain = plain_length = alphabetic = hashes = ellipses = 0
    lines = bullets = trailing = ended = short = braces = sentences = unspaced = parts = 0
    stops = 0
    part_hash, part_length = np.uint64(0), 0
    begin = 0
    while begin <= total:
        end = begin
        while end < total and points[end] != _NEWLINE:
            end += 1
        a, b = begin, end
        while a < b and kinds[min(points[a], last)] & _SPACE:
            a += 1
        while b > a and kinds[min(points[b - 1], last)] & _SPACE:
            b -= 1
        begin = end + 1
        if a == b:
            if part_length:
                part_hashes[parts], part_lengths[parts] = part_hash, part_length
                parts += 1
                part_hash, part_length = np.uint64(0), 0
            continue
        line_hash = np.uint64(0)
        dots = 0
        word_start = -1
        word_hash, letters_hash = np.uint64(0), np.uint64(0)
        has_letter = has_alnum = False
        for index in range(a, b + 1):
            kind = _SPACE
            point = np.uint32(0)
            if index < b:
                point = points[index]
                kind = kinds[min(point, last)]
                line_hash = line_hash * _BASE + np.uint64(point)
                hashes += point == _HASH
                braces += point == _BRACE
                ellipses += point == _ELLIPSIS
            if point == _DOT:
                dots += 1
            else:
                ellipses += dots // 3
                dots = 0
            if kind & (_SPACE | _UNSPACED) and word_start >= 0:
                word_hashes[words], word_lengths[words] = word_hash, index - word_start
                words += 1
                alphabetic += has_letter
                if has_alnum:
                    plain += 1
                    plain_length += index - word_start
                    for number in range(len(stop_hashes)):
                        if stop_hashes[number] == letters_hash:
                            stops |= 1 << number
                word_start = -1
            if index == b:
                break
            if kind & _UNSPACED:
                word_hashes[words], word_lengths[words] = np.uint64(point), 1
                words += 1
                unspaced += 1
                alphabetic += 1
                plain += 1
                plain_length += 1
            elif not kind & _SPACE:
                if word_start < 0:
                    word_start = index
                    word_hash = letters_hash = np.uint64(0)
                    has_letter = has_alnum = False
                word_hash = word_hash * _BASE + np.uint64(point)
                if kind & _ALNUM:
                    has_alnum = True
                    has_letter |= (kind & _LETTER) > 0
                    lower = point + 32 if 65 <= point <= 90 else point
                    letters_hash = letters_hash * _BASE + np.uint64(lower)
            if kind & _ENDER:
                after = index + 1
                while after < b and kinds[min(points[after], last)] & _CLOSER:
                    after += 1
                # A full-width mark ends a sentence by itself; others need white space behind them.
                if after == b or point >= 0x3000 or kinds[min(points[after], last)] & _SPACE:
                    sentences += 1
        lines += 1
        line_hashes[lines - 1], line_lengths[lines - 1] = line_hash, b - a
        part_hash = (part_hash ^ (part_hash >> _HALF)) * _BASE + line_hash + np.uint64(1)
        part_length += b - a
        bullets += (kinds[min(points[a], last)] & _BULLET) > 0
        short += b - a <= SHORT_LINE
        tail = b - 1
        trailing += points[tail] == _ELLIPSIS or (
            b - a >= 3 and points[tail] == _DOT and points[tail - 1] == _DOT and points[tail - 2] == _DOT
        )
        while tail > a and kinds[min(points[tail], last)] & _CLOSER:
            tail -= 1
        ended += (kinds[min(points[tail], last)] & _ENDER) > 0
    if part_length:
        part_hashes[parts], part_lengths[parts] = part_hash, part_length
        parts += 1
    same_lines, same_line_length = _duplicates(line_hashes[:lines], line_lengths[:lines])
    same_parts, same_part_length = _duplicates(part_hashes[:parts], part_lengths[:parts])
    different = 0
    for number in range(len(stop_hashes)):
        different += (stops >> number) & 1
    numbers = np.array([
        total, words, plain, plain_length, alphabetic, hashes, ellipses, lines, bullets, trailing, ended,
        short, newlines, braces, sentences, different, unspaced, same_lines, same_line_length, parts,
        same_parts, same_part_length,
    ])  # fmt: skip
    return numbers, word_hashes[:words].copy(), word_lengths[:words].copy()
