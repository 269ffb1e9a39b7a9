"""Minimal pairs: two sentences with a single difference, which makes the second ungrammatical.

The format is that of BLiMP (Warstadt et al. 2020, arXiv:1912.00582): a row has ``sentence_good``,
``sentence_bad`` and ``UID``, the paradigm of the pair. This module needs no model.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.data.rows import nearest_file, read_rows
from tercet.errors import UserError

GOOD, BAD, GROUP = "sentence_good", "sentence_bad", "UID"
SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")  # of the files that are read in a directory


@dataclass(frozen=True, slots=True)
class Pair:
    """A minimal pair; accuracy is computed by ``group``."""

    good: str
    bad: str
    group: str


def read_pairs(
    paths: Sequence[str | Path] | str | Path,
    *,
    good: str = GOOD,
    bad: str = BAD,
    group: str | None = None,
    sample: int | None = None,
) -> list[Pair]:
    """Read the pairs of files, in order.

    Args:
        paths: files in a format that `read_rows` reads, and directories, whose jsonl files are read in
            the order of their names.
        good: the field of the grammatical sentence.
        bad: the field of the ungrammatical sentence.
        group: the field of the group; by default ``UID``, or the file's name for a row without it.
        sample: the maximal number of pairs per group (`sample_pairs`); None: all.

    Raises:
        UserError: a path does not exist, or a row lacks a field or a sentence; the error names file and
            row. Equal sentences are accepted: BLiMP itself has seven such pairs.
    """
    path_list = [paths] if isinstance(paths, str | Path) else list(paths)
    if sample is not None and sample < 1:
        raise UserError(f"the sample is {sample} pairs a group; it must be 1 or more")
    pairs = [
        _pair(row, f"{file}, row {number}", good, bad, group, _stem(file))
        for path in path_list
        for file in _files(Path(path))
        for number, row in enumerate(read_rows(file), start=1)
    ]
    if not pairs:
        raise UserError(f"there are no minimal pairs in {', '.join(map(str, path_list)) or 'no files'}")
    return pairs if sample is None else sample_pairs(pairs, sample)


def sample_pairs(pairs: Sequence[Pair], per_group: int) -> list[Pair]:
    """Return at most ``per_group`` pairs of each group, in order: those with the lowest content hashes.

    The choice depends only on the pairs, not on their order, and new pairs displace few others.
    """
    ranked: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        content = f"{pair.good}\0{pair.bad}".encode("utf-8", "surrogatepass")
        ranked[pair.group].append((hashlib.sha256(content).digest(), number))
    chosen = {number for rows in ranked.values() for _, number in sorted(rows)[:per_group]}
    return [pair for number, pair in enumerate(pairs) if number in chosen]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"there is no file or directory {path}{nearest_file(path)}")
        return [path]
    files = sorted(entry for entry in path.iterdir() if entry.name.lower().endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path} holds no jsonl files; name the files themselves")
    return files


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _pair(row: dict[str, Any], where: str, good: str, bad: str, group: str | None, file: str) -> Pair:
    for field in (good, bad) if group is None else (good, bad, group):
        if field not in row:
            have = ", ".join(map(str, row)) or "none"
            raise UserError(f"{where} has no field {field!r}; its fields are {have}")
    for field in (good, bad):
        if not isinstance(row[field], str) or not row[field].strip():
            raise UserError(f"{where}: {field} is {row[field]!r}; it must be a sentence")
        if not _is_unicode(row[field]):
            raise UserError(f"{where}: {field} is not valid Unicode text: {row[field]!r}")
    named = row.get(GROUP, file) if group is None else row[group]
    return Pair(row[good], row[bad], str(named))


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode ``text``: JSON may hold a lone surrogate, which no tokenizer accepts."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
