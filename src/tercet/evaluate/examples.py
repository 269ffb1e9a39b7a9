"""Turn rows into examples: read them, merge repeated inputs, and assign them to splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tercet.data.template import Template
from tercet.errors import UserError
from tercet.evaluate.split import DEV_SHARE, TEST_SHARE, Split, assign, content_id
from tercet.evaluate.task_file import Origin, canonical_fields, canonical_target


@dataclass(frozen=True)
class Example:
    """A row of the task, in its split."""

    id: str  # a hash of the normalised input, so the same text has the same id in every task and run
    fields: dict[str, Any]
    target: str
    split: Split


@dataclass(frozen=True)
class Row:
    """A row with its input and target, before it has a split."""

    id: str
    fields: dict[str, Any]
    target: str
    text: str  # the values of the prompt's fields


class RowReader:
    """Reads inputs and targets from rows.

    Args:
        prompt: the template of the input.
        target: a field name, or a template over fields.
        origin: the file and line of each part, for error messages.

    Raises:
        UserError: a template without a field.
    """

    def __init__(self, prompt: str, target: str, origin: Origin) -> None:
        self.origin = origin
        self.prompt = Template(prompt, f"{origin.field('prompt')}: prompt")
        if not self.prompt.fields:
            raise UserError(
                f"{self.prompt.where}: it contains no {{field}}, so every example would have the same input"
            )
        # "label" and "{label}" mean the same target, the field's value.
        self.target = Template(
            target if "{" in target else f"{{{target}}}", f"{origin.field('target')}: target"
        )
        if not self.target.fields:
            raise UserError(
                f"{self.target.where}: it contains no {{field}}, so every example would have the same target"
            )

    def read(self, rows: Sequence[Mapping[str, Any]], split: str) -> list[Row]:
        """Read the rows of a split. Raises UserError for a missing or empty field, target or input."""
        known = list(dict.fromkeys(name for row in rows for name in row))
        if rows:
            for template in (self.prompt, self.target):
                unknown = [name for name in template.fields if name not in known]
                if unknown:
                    raise UserError(
                        f"{template.where} uses the field {unknown[0]!r}, which {self.origin.data(split)} does not "
                        f"have; the fields there are {', '.join(known)}"
                    )
        result = []
        for number, row in enumerate(rows, start=1):
            for name in (*self.prompt.fields, *self.target.fields):
                if row.get(name) is None:
                    state = "is empty" if name in row else f"is missing; the row has {', '.join(row)}"
                    raise UserError(f"{self.origin.row(split, number)}: the field {name!r} {state}")
            target = self.target.render(canonical_fields(row)).strip()
            if not target:
                raise UserError(f"{self.origin.row(split, number)}: the target is empty")
            text = input_text(self.prompt, row)
            if not text.strip():
                raise UserError(
                    f"{self.origin.row(split, number)}: the input is empty ({', '.join(self.prompt.fields)})"
                )
            result.append(Row(content_id(text), dict(row), target, text))
        return result

    def check_labels(
        self, rows: list[Row], allowed: Sequence[str], split: str, hint: str | None = None
    ) -> None:
        """Raise UserError for a row with a target that is not an allowed label.

        Args:
            rows: all rows of the split.
            allowed: the labels.
            split: of the rows.
            hint: what is wrong with such a target, in place of "not among the labels".
        """
        known = set(allowed)
        for number, row in enumerate(rows, start=1):
            if row.target not in known:
                shown = ", ".join(allowed[:12]) + (f", ... ({len(allowed)})" if len(allowed) > 12 else "")
                raise UserError(
                    f"{self.origin.row(split, number)}: the target {row.target[:60]!r} is {hint or 'not among the labels'} "
                    f"({shown})"
                )


def input_text(prompt: Template, fields: Mapping[str, Any]) -> str:
    """Return the values of the prompt's fields, one a line."""
    # In alphabetical order, so that the order of the fields in the prompt does not affect the split.
    return "\n".join(str(canonical_target(fields[name])) for name in sorted(prompt.fields))


def merge(rows: list[Row], counts: Counter[str]) -> list[Row]:
    """Return one row for each input, with its most frequent target; none if two targets are equally frequent."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.id, []).append(row)
    merged = []
    for group in groups.values():
        counts["merged"] += len(group) - 1
        ranked = Counter(row.target for row in group).most_common(2)
        if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
            counts["ties"] += 1
            continue
        counts["conflicts"] += len(ranked) == 2
        # Of several spellings the first in the alphabet, because the order of rows must have no effect.
        merged.append(min((row for row in group if row.target == ranked[0][0]), key=lambda row: row.text))
    return merged


def place(
    rows: dict[str, list[Row]], test: float | int | None, dev: float | int | None, counts: Counter[str]
) -> list[Example]:
    """Return every row as an example in its split, sorted by split and id."""
    test_ids = {row.id for row in rows.get("test", [])}
    dev_rows = [row for row in rows.get("dev", []) if row.id not in test_ids]
    dev_ids = {row.id for row in dev_rows}
    pool = [row for row in rows["train"] if row.id not in test_ids and row.id not in dev_ids]
    counts["in test"] = sum(row.id in test_ids for row in (*rows["train"], *rows.get("dev", [])))
    counts["in dev"] = sum(row.id in dev_ids for row in rows["train"])
    splits = assign(
        [row.text for row in pool], test=test, dev=0 if "dev" in rows else dev, given_test="test" in rows
    )
    placed: list[tuple[Row, Split]] = list(zip(pool, splits, strict=True))
    placed += [(row, "dev") for row in dev_rows]
    placed += [(row, "test") for row in rows.get("test", [])]
    examples = [Example(row.id, row.fields, row.target, split) for row, split in placed]
    return sorted(examples, key=lambda example: (example.split, example.id))


def refuse_empty(examples: list[Example], where: str, parts: Mapping[str, Any]) -> None:
    """Raise UserError if a split is empty.

    Args:
        examples: of all splits.
        where: the file and line, for the message.
        parts: the rows of each split that has rows of its own.
    """
    sizes = Counter(example.split for example in examples)
    shares = {"test": TEST_SHARE, "dev": DEV_SHARE}
    for split in ("train", "test", "dev"):
        if sizes[split]:
            continue
        if split == "train" or parts.get(split) is not None:
            present = (
                ", ".join(f"{name} {count}" for name, count in sorted(sizes.items())) or "no rows at all"
            )
            raise UserError(f"{where}: the {split} split is empty (there are: {present}); add rows")
        raise UserError(
            f"{where}: the {split} split is empty, because none of {len(examples)} examples falls into its "
            f"{shares[split]:.0%}; add rows, or set {split}_size to a number of examples"
        )


def refuse_unused(labels: Sequence[str], examples: list[Example], where: str) -> None:
    """Raise UserError for a label that no example has."""
    seen = {example.target for example in examples}
    unused = [label for label in labels if label not in seen]
    if unused:
        raise UserError(
            f"{where}: no row has the label {unused[0]!r}; the targets are {', '.join(sorted(seen)[:12])}"
        )
