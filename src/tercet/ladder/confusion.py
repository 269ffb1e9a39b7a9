"""Count which labels are mistaken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tercet.evaluate.result import Prediction

NO_LABEL = "no label"  # an answer that is none of the labels


@dataclass(frozen=True)
class LabelRow:
    """The answers to the examples of one label."""

    label: str
    n: int  # examples of the label
    counts: tuple[int, ...]  # answers by label, in order, and last those that are no label
    recall: float | None  # the share of the label's examples with this answer; None without examples
    precision: float | None  # the share of this label's answers that are correct; None without answers
    confused: tuple[str, int] | None  # the most frequent wrong answer, and its number

    @property
    def missed(self) -> int:
        """The number of the label's examples with a wrong answer."""
        return self.n - round(self.n * (self.recall or 0.0))


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix, target by answer, [labels, labels + 1]."""

    rows: tuple[LabelRow, ...]
    other: bool  # whether an answer is no label

    @classmethod
    def of(cls, labels: Sequence[str], predictions: Sequence[Prediction]) -> Self:
        """Count the predictions of a rung."""
        known = set(labels)
        pairs = Counter(
            (p.target.strip(), p.text.strip() if p.text.strip() in known else None) for p in predictions
        )
        answers: Counter[str | None] = Counter()
        for (_, answer), count in pairs.items():
            answers[answer] += count
        rows = tuple(_row(label, labels, pairs, answers[label]) for label in labels)
        return cls(rows, answers[None] > 0)


def _row(
    label: str, labels: Sequence[str], pairs: Counter[tuple[str, str | None]], answered: int
) -> LabelRow:
    """Return the row of one label; ``answered`` is the number of answers with this label."""
    counts = [pairs[label, answer] for answer in (*labels, None)]
    n, correct = sum(counts), pairs[label, label]
    wrong = [
        (count, answer) for answer, count in zip((*labels, NO_LABEL), counts, strict=True) if answer != label
    ]
    count, answer = max(wrong, key=lambda entry: entry[0])
    return LabelRow(
        label,
        n,
        tuple(counts),
        correct / n if n else None,
        correct / answered if answered else None,
        (answer, count) if count else None,
    )
