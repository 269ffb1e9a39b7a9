"""Find labels and targets that a model cannot answer with, or that cannot be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tercet.evaluate.task import Task

FEW_OF_A_LABEL = 5  # training examples
FEW_DISTINCT = 50  # targets of an open task, which may then be labels
NAMED = 3  # labels that a warning names


def label_warnings(task: Task) -> list[str]:
    """Return what is wrong with the labels of a closed task, in sentences."""
    labels = task.labels
    if labels is None:
        return []
    train = Counter(example.target for example in task.train)
    test = Counter(example.target for example in task.test)
    warnings = []
    if len(labels) > len(task.train) / 3:
        warnings.append(
            f"There are {len(labels):,} labels for {len(task.train):,} training examples: if targets are free text, "
            "leave labels out."
        )
    rare = [label for label in labels if train[label] < FEW_OF_A_LABEL]
    if rare:
        has = "label has" if len(rare) == 1 else "labels have"
        warnings.append(f"{len(rare)} {has} fewer than {FEW_OF_A_LABEL} training examples: {_named(rare)}.")
    untested = [label for label in labels if not test[label]]
    if untested:
        has = "label has" if len(untested) == 1 else "labels have"
        warnings.append(
            f"{len(untested)} {has} no test example, so no score tells about it: {_named(untested)}."
        )
    lines = [label for label in labels if "\n" in label]
    if lines:
        warnings.append(f"A label of several lines cannot be answered in one line: {_named(lines)}.")
    folded: dict[str, list[str]] = {}
    for label in labels:
        folded.setdefault(" ".join(label.casefold().split()), []).append(label)
    alike = [" and ".join(map(repr, group)) for group in folded.values() if len(group) > 1]
    if alike:
        warnings.append(
            f"Labels differ only in case or spaces, so answers mix them up: {', '.join(alike[:NAMED])}."
        )
    prefixes = prefix_pairs(labels)
    if prefixes:
        short, long = prefixes[0]
        more = f" (and {len(prefixes) - 1} more such pairs)" if len(prefixes) > 1 else ""
        warnings.append(
            f"The label {short!r} is the beginning of {long!r}{more}: a model takes one for the other more easily."
        )
    return warnings


def target_warnings(task: Task) -> list[str]:
    """Return what is wrong with the targets of an open task, in sentences."""
    if task.labels is not None:
        return []
    train = {example.target for example in task.train}
    known = sum(example.target in train for example in task.test)
    warnings = []
    if len(train) <= FEW_DISTINCT and 5 * len(train) <= len(task.train) and known >= 0.95 * len(task.test):
        warnings.append(
            f"The training examples have only {len(train)} different targets: with labels: auto they become labels, "
            "which every rung can choose from."
        )
    lines = sum("\n" in example.target for example in task.examples)
    if lines:
        warnings.append(
            f"{lines:,} of {len(task.examples):,} targets have several lines: a model without a chat template stops "
            "after the first line."
        )
    return warnings


def prefix_pairs(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of labels of which the first is the beginning of the second, whole words or not."""
    ordered = sorted(labels)
    pairs = []
    for index, short in enumerate(ordered):
        for long in ordered[index + 1 :]:
            if not long.startswith(short):
                break  # in alphabetical order what begins with a label follows it
            pairs.append((short, long))
    return pairs


def token_clashes(tokens: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[str, str]]:
    """Return pairs of labels, of two tokens or more, whose tokens are the same but for the last.

    Args:
        tokens: each label with its token ids.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for label, ids in tokens:
        if len(ids) > 1:
            groups.setdefault(tuple(ids[:-1]), []).append(label)
    return [
        (first, second)
        for group in groups.values()
        for index, first in enumerate(group)
        for second in group[index + 1 :]
    ]


def _named(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
    return ", ".join(repr(label) for label in labels[:NAMED]) + more
