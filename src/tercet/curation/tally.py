"""Count the documents that were read, dropped (with the reason) and written; each part of the work has a tally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

EXAMPLES = 3  # documents of each reason in the report
_EXCERPT = 240  # characters


@dataclass
class Amount:
    """A number of documents, and the bytes of their text in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Add ``documents`` with ``size`` bytes of text."""
        self.documents += documents
        self.bytes += size


@dataclass
class Drops:
    """The documents dropped for one reason."""

    stage: str  # of the pipeline
    amount: Amount = field(default_factory=Amount)
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Tally:
    """The counts of one part of the corpus, or the sum of several parts in their order.

    Attributes:
        read: By source.
        written: By source, with every copy that a weight makes.
        dropped: By reason.
        lost: Dropped for any reason, by source.
        personal: Masked values, by kind.
        masked_documents: Documents with masked values.
    """

    read: dict[str, Amount] = field(default_factory=dict)
    written: dict[str, Amount] = field(default_factory=dict)
    dropped: dict[str, Drops] = field(default_factory=dict)
    lost: dict[str, Amount] = field(default_factory=dict)
    personal: Counter[str] = field(default_factory=Counter)
    masked_documents: int = 0

    def add_read(self, source: str, size: int) -> None:
        """Count a document that was read."""
        self.read.setdefault(source, Amount()).add(1, size)

    def add_written(self, source: str, documents: int, size: int) -> None:
        """Count documents that were written."""
        self.written.setdefault(source, Amount()).add(documents, size)

    def drop(
        self, stage: str, reason: str, source: str, size: int, example: Mapping[str, str] | None = None
    ) -> None:
        """Count a dropped document.

        Args:
            stage: Of the pipeline.
            reason: Of the drop.
            source: Of the document.
            size: Bytes of its text.
            example: Its ``id``, ``text`` and ``detail`` (see `example`), for the report.
        """
        drops = self.dropped.setdefault(reason, Drops(stage))
        drops.amount.add(1, size)
        self.lost.setdefault(source, Amount()).add(1, size)
        if example is not None and len(drops.examples) < EXAMPLES:
            drops.examples.append(dict(example))

    def add(self, other: Tally) -> None:
        """Add the tally of a later part."""
        for own_amounts, other_amounts in (
            (self.read, other.read),
            (self.written, other.written),
            (self.lost, other.lost),
        ):
            for source, amount in other_amounts.items():
                own_amounts.setdefault(source, Amount()).add(amount.documents, amount.bytes)
        for reason, drops in other.dropped.items():
            own = self.dropped.setdefault(reason, Drops(drops.stage))
            own.amount.add(drops.amount.documents, drops.amount.bytes)
            own.examples += drops.examples[: EXAMPLES - len(own.examples)]
        self.personal.update(other.personal)
        self.masked_documents += other.masked_documents

    def to_json(self) -> dict[str, Any]:
        """Return the tally as plain values."""
        return {**asdict(self), "personal": dict(self.personal)}  # asdict can't copy a Counter

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the tally that `to_json` gave."""

        def amounts(name: str) -> dict[str, Amount]:
            return {source: Amount(**amount) for source, amount in value[name].items()}

        return cls(
            read=amounts("read"),
            written=amounts("written"),
            lost=amounts("lost"),
            dropped={
                reason: Drops(drops["stage"], Amount(**drops["amount"]), drops["examples"])
                for reason, drops in value["dropped"].items()
            },
            personal=Counter(value["personal"]),
            masked_documents=value["masked_documents"],
        )


def total(amounts: Iterable[Amount]) -> Amount:
    """Return the sum of the amounts."""
    result = Amount()
    for amount in amounts:
        result.add(amount.documents, amount.bytes)
    return result


def example(id: str, text: str, detail: str = "") -> dict[str, str]:
    """Return an example document for the report."""
    return {"id": id, "text": excerpt(text), "detail": detail}


def excerpt(text: str) -> str:
    """Return the beginning of a text, in one line."""
    beginning = text[: 4 * _EXCERPT]  # a text may be one line of many megabytes
    line = " ".join(beginning.split())
    return (
        line if len(line) <= _EXCERPT and len(beginning) == len(text) else line[:_EXCERPT].rstrip() + " ..."
    )
