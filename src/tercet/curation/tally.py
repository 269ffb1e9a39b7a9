"""Counts of what came in, what was dropped and why, and what was written; each part of the work has one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

EXAMPLES = 3  # of each reason
_SHOWN = 240  # characters of an example


@dataclass
class Amount:
    """Documents and the bytes of their text in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        self.documents += documents
        self.bytes += size


@dataclass
class Drops:
    """What one reason took: ``stage`` is the part of the pipeline that did it."""

    stage: str
    amount: Amount = field(default_factory=Amount)
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Tally:
    """The account of one part, or of many added up in their order.

    Attributes:
        read, written: by source. Copies that a weight asked for are counted each.
        dropped: by reason.
        lost: by source, dropped for whatever reason.
        personal: values masked, by kind.
    """

    read: dict[str, Amount] = field(default_factory=dict)
    written: dict[str, Amount] = field(default_factory=dict)
    dropped: dict[str, Drops] = field(default_factory=dict)
    lost: dict[str, Amount] = field(default_factory=dict)
    personal: Counter[str] = field(default_factory=Counter)
    masked_documents: int = 0

    def came_in(self, source: str, size: int) -> None:
        self.read.setdefault(source, Amount()).add(1, size)

    def went_out(self, source: str, documents: int, size: int) -> None:
        self.written.setdefault(source, Amount()).add(documents, size)

    def drop(
        self, stage: str, reason: str, source: str, size: int, example: Mapping[str, str] | None = None
    ) -> None:
        """One document fewer. ``example``: its ``id``, ``text`` and ``detail``, kept if there are few so far."""
        drops = self.dropped.setdefault(reason, Drops(stage))
        drops.amount.add(1, size)
        self.lost.setdefault(source, Amount()).add(1, size)
        if example is not None and len(drops.examples) < EXAMPLES:
            drops.examples.append(dict(example))

    def add(self, other: Tally) -> None:
        """Add what comes after this one."""
        for mine, theirs in (
            (self.read, other.read),
            (self.written, other.written),
            (self.lost, other.lost),
        ):
            for source, amount in theirs.items():
                mine.setdefault(source, Amount()).add(amount.documents, amount.bytes)
        for reason, drops in other.dropped.items():
            own = self.dropped.setdefault(reason, Drops(drops.stage))
            own.amount.add(drops.amount.documents, drops.amount.bytes)
            own.examples += drops.examples[: EXAMPLES - len(own.examples)]
        self.personal.update(other.personal)
        self.masked_documents += other.masked_documents

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "personal": dict(self.personal)}  # asdict can't copy a Counter

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
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
    """The sum."""
    result = Amount()
    for amount in amounts:
        result.add(amount.documents, amount.bytes)
    return result


def example(id: str, text: str, detail: str = "") -> dict[str, str]:
    """A document as it is shown in the report: the beginning of its text in one line."""
    return {"id": id, "text": excerpt(text), "detail": detail}


def excerpt(text: str) -> str:
    """The beginning of a text, in one line."""
    beginning = text[: 4 * _SHOWN]  # a text may be one line of many megabytes
    line = " ".join(beginning.split())
    return line if len(line) <= _SHOWN and len(beginning) == len(text) else line[:_SHOWN].rstrip() + " ..."
