"""The first stage: read documents, drop some by the rules, mask and hash the rest, write it in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from tercet.curation import dedup, shards
from tercet.curation.filters import Rules
from tercet.curation.hashing import word_hashes
from tercet.curation.personal_data import mask_personal_data
from tercet.curation.tally import Tally, example
from tercet.curation.work import StageSettings, Work
from tercet.data.document import Document
from tercet.data.documents import read_documents
from tercet.files import read_json, write_json

PART_CHARACTERS = 8_000_000  # of the text that a process works on at once
MAX_DOCUMENT_BYTES = 1_000_000_000  # a table's text column holds twice as many


@dataclass(frozen=True)
class Group:
    """Sources that one reader reads one after the other.

    Attributes:
        number: The index of the group among all.
        sources: As `tercet.data.documents.read_documents` takes them.
    """

    number: int
    sources: tuple[str, ...]

    def part(self, number: int) -> str:
        """Return the name of a part of the group; names sort in the order of reading."""
        return f"{self.number:06d}-{number:06d}"


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists of about ``PART_CHARACTERS``."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= PART_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def filter_group(work: Work, group: Group) -> int:
    """Read and filter all parts of a group, and return the bytes of text that were read."""
    size = parts = 0
    skipped: Counter[str] = Counter()
    documents_read = read_documents(group.sources, skipped, allow_partial=work.settings.allow_partial)
    for number, documents in enumerate(batches(documents_read)):
        size += filter_part(work, group.part(number), documents)
        parts += 1
    finish_group(work, group, parts, skipped)
    return size


def finish_group(work: Work, group: Group, parts: int, skipped: Mapping[str, int]) -> None:
    """Write the marker of a group that was read to its end."""
    write_json(work.path(f"{group.number:06d}.group.json"), {"parts": parts, "skipped": dict(skipped)})


def group_is_done(work: Work, group: Group) -> bool:
    """Return whether a group was read to its end."""
    return work.path(f"{group.number:06d}.group.json").is_file()


def part_is_read(work: Work, part: str) -> bool:
    """Return whether a part was read and filtered."""
    return work.path(f"{part}.read.json").is_file()


def filter_batch(work: Work, part: tuple[str, Sequence[Document]]) -> int:
    """Call `filter_part` with one argument, as workers do."""
    return filter_part(work, *part)


def filter_part(work: Work, part: str, documents: Sequence[Document]) -> int:
    """Apply the rules to a part's documents, mask, hash and write the rest, and return the bytes that were read."""
    if part_is_read(work, part):
        return sum(amount["bytes"] for amount in read_json(work.path(f"{part}.read.json"))["read"].values())
    settings, tally = work.settings, Tally()
    rules = rules_of(settings)
    documents_kept: list[Document] = []
    masked: list[int] = []
    for document in documents:
        size = len(document.text.encode("utf-8"))
        tally.add_read(document.source, size)
        if size > MAX_DOCUMENT_BYTES:
            shown = example(document.id, document.text, f"{size:,} bytes")
            tally.drop("reading", "larger than 1 GB", document.source, size, shown)
            continue
        if reason := rules(document.text):
            shown = example(document.id, document.text, reason.detail)
            tally.drop("rules", reason.rule, document.source, size, shown)
            continue
        values: Counter[str] = Counter()
        if settings.mask_personal_data:
            text, values = mask_personal_data(document.text)
            document = replace(document, text=text)
            tally.personal.update(values)
            tally.masked_documents += bool(values)
        masked.append(values.total())
        documents_kept.append(document)
    texts = [document.text for document in documents_kept]
    hashes = dedup.exact_keys(texts)
    if settings.minhash:
        keys, words = dedup.band_keys(texts, settings.minhash)
        hashes = np.concatenate([hashes, keys])
    else:
        words = np.diff(word_hashes(texts)[1])
    columns = {
        "text": texts,
        "source": [document.source for document in documents_kept],
        "id": [document.id for document in documents_kept],
        "offset": [document.offset for document in documents_kept],
        "licence": [document.licence for document in documents_kept],
        "bytes": [len(text.encode("utf-8")) for text in texts],
        "words": words,
        "masked": masked,
    }
    shards.write_part(work.path(f"{part}.arrow"), pa.table(columns, schema=shards.PART))
    shards.write_hashes(work.path(f"{part}.npy"), hashes)
    write_json(work.path(f"{part}.read.json"), tally.to_json())
    return sum(amount.bytes for amount in tally.read.values())


def rules_of(settings: StageSettings) -> Rules:
    """Return the rules of the settings.

    Raises:
        UserError: There is no such preset, rule or language.
    """
    return _rules(settings.preset, settings.languages, settings.rules)


@lru_cache(maxsize=1)
def _rules(preset: str, languages: tuple[str, ...] | None, overrides: tuple[tuple[str, float], ...]) -> Rules:
    return Rules(preset, languages=languages, overrides=dict(overrides))
