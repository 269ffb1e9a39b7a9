"""The first stage: documents are read, the rules drop some, the rest is masked, hashed and written in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from tercet.curation import dedup, shards
from tercet.curation.filters import Rules, mask_personal_data
from tercet.curation.hashing import word_hashes
from tercet.curation.tally import Tally, example
from tercet.curation.work import Settings, Work
from tercet.data.document import Document
from tercet.data.documents import read_documents
from tercet.files import read_json, write_json

PART_CHARACTERS = 8_000_000  # of text: what a process works on at once
LARGEST = 1_000_000_000  # bytes of one document; a table's text column ends at twice that


@dataclass(frozen=True)
class Group:
    """Sources that are read one after the other by one reader, and their place among all."""

    number: int
    sources: tuple[str, ...]

    def part(self, number: int) -> str:
        return f"{self.number:06d}-{number:06d}"


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about ``PART_CHARACTERS``."""
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        if size >= PART_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def filter_group(work: Work, group: Group) -> int:
    """Read a group's sources and filter all of their parts; the bytes of text that were read."""
    size = parts = 0
    skipped: Counter[str] = Counter()
    for number, documents in enumerate(batches(read_documents(group.sources, skipped))):
        size += filter_part(work, group.part(number), documents)
        parts += 1
    finish_group(work, group, parts, skipped)
    return size


def finish_group(work: Work, group: Group, parts: int, skipped: Mapping[str, int]) -> None:
    """Note that a group is read to its end."""
    write_json(work.path(f"{group.number:06d}.group.json"), {"parts": parts, "skipped": dict(skipped)})


def group_is_done(work: Work, group: Group) -> bool:
    return work.path(f"{group.number:06d}.group.json").is_file()


def part_is_read(work: Work, part: str) -> bool:
    return work.path(f"{part}.read.json").is_file()


def filter_batch(work: Work, part: tuple[str, Sequence[Document]]) -> int:
    """`filter_part` with one argument, as workers call it."""
    return filter_part(work, *part)


def filter_part(work: Work, part: str, documents: Sequence[Document]) -> int:
    """Apply the rules to a part's documents, mask, hash and write what stays; the bytes that came in."""
    if part_is_read(work, part):
        return sum(amount["bytes"] for amount in read_json(work.path(f"{part}.read.json"))["read"].values())
    settings, tally = work.settings, Tally()
    rules = rules_of(settings)
    kept: list[Document] = []
    masked: list[int] = []
    for document in documents:
        size = len(document.text.encode("utf-8"))
        tally.came_in(document.source, size)
        if size > LARGEST:
            told = example(document.id, document.text, f"{size:,} bytes")
            tally.drop("reading", "larger than 1 GB", document.source, size, told)
            continue
        if dropped := rules(document.text):
            told = example(document.id, document.text, dropped.detail)
            tally.drop("rules", dropped.rule, document.source, size, told)
            continue
        found: Counter[str] = Counter()
        if settings.mask_personal_data:
            text, found = mask_personal_data(document.text)
            document = replace(document, text=text)
            tally.personal.update(found)
            tally.masked_documents += bool(found)
        masked.append(found.total())
        kept.append(document)
    texts = [document.text for document in kept]
    hashes = dedup.exact_keys(texts)
    if settings.minhash:
        keys, words = dedup.band_keys(texts, settings.minhash)
        hashes = np.concatenate([hashes, keys])
    else:
        words = np.diff(word_hashes(texts)[1])
    columns = {
        "text": texts,
        "source": [document.source for document in kept],
        "id": [document.id for document in kept],
        "offset": [document.offset for document in kept],
        "licence": [document.licence for document in kept],
        "bytes": [len(text.encode("utf-8")) for text in texts],
        "words": words,
        "masked": masked,
    }
    shards.write_part(work.path(f"{part}.arrow"), pa.table(columns, schema=shards.PART))
    shards.write_hashes(work.path(f"{part}.npy"), hashes)
    write_json(work.path(f"{part}.read.json"), tally.to_json())
    return sum(amount.bytes for amount in tally.read.values())


def rules_of(settings: Settings) -> Rules:
    """The rules that drop documents. UserError where there are no such rules."""
    return _rules(settings.preset, settings.languages, settings.rules)


@lru_cache(maxsize=1)
def _rules(preset: str, languages: tuple[str, ...] | None, overrides: tuple[tuple[str, float], ...]) -> Rules:
    return Rules(preset, languages=languages, overrides=dict(overrides))
