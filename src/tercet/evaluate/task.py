"""The task: examples, a prompt, a metric, and a locked test split. One definition for every rung."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tercet.data.rows import nearest_file, read_rows
from tercet.data.template import Template
from tercet.errors import UserError
from tercet.evaluate.examples import Example, RowReader, input_text, merge, place, refuse_empty, refuse_unused
from tercet.evaluate.metrics import Metric, load_metric
from tercet.evaluate.task_file import EXAMPLES, Origin, TaskFile, check_label_list
from tercet.files import fingerprint

__all__ = ["BUILTIN", "Example", "Task"]

DEFAULT_CORPUS = ("builtin:python-docs",)
FEW_SHOT = 8


def _docs_routing() -> Task:
    from tercet.evaluate.builtin import docs_routing_rows

    task = Task.from_rows(
        "docs-routing",
        docs_routing_rows(),
        prompt="Documentation of a Python function or class:\n{text}\nArea of the standard library:",
        target="area",
        labels="auto",
        description="Which area of the Python library reference a docstring belongs to, its module's name masked.",
    )
    return replace(task, unmasked="original")


BUILTIN: dict[str, Callable[[], Task]] = {"docs-routing": _docs_routing}


@dataclass
class Task:
    """What is to be done, how it is scored, and the examples.

    Make one with ``Task.load`` or ``Task.from_rows``. Whatever chooses anything (few-shot examples,
    early stopping, a prompt) may read ``train`` and ``dev`` and never ``test``.
    """

    name: str
    prompt: Template
    target: str
    metric: Metric
    examples: list[Example]
    labels: list[str] | None = None  # None: an open task, answered in free text
    system: str | None = None
    corpus: list[str] = field(default_factory=lambda: list(DEFAULT_CORPUS))
    few_shot: int = FEW_SHOT
    max_tokens: int = 64
    description: str | None = None
    unmasked: str | None = None  # the field with the text as it was before anything in it was masked
    reference: str | None = None  # what it was loaded from, as given; None: made in Python
    counts: dict[str, int] = field(default_factory=dict)  # rows read, merged, dropped: see ``notes``

    @classmethod
    def load(cls, reference: str | Path) -> Task:
        """The task of a YAML file (its paths are relative to the file) or of ``builtin:NAME``.

        Raises:
            UserError: one line naming the file, the line or row, and what is wrong with it.
        """
        name = str(reference)
        if name.startswith("builtin:"):
            make = BUILTIN.get(name.removeprefix("builtin:"))
            if make is None:
                raise UserError(
                    f"no task {name!r} is built in; there is builtin:{', builtin:'.join(BUILTIN)}"
                )
            return replace(make(), reference=name)
        path = Path(reference)
        file = open_task_file(path)
        if file.kind != EXAMPLES:
            raise UserError(
                f"{file.at('kind')}: a task of {file.kind} is measured by 'tercet eval REF {path}'; "
                "a climb needs examples with a prompt and a target"
            )
        return replace(_from_file(cls, file), reference=name)

    @classmethod
    def from_rows(
        cls,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        prompt: str,
        target: str,
        labels: Sequence[str] | str | None = None,
        metric: str | Mapping[str, Any] | None = None,
        test_rows: Sequence[Mapping[str, Any]] | None = None,
        dev_rows: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        corpus: Sequence[str] = DEFAULT_CORPUS,
        few_shot: int = FEW_SHOT,
        max_tokens: int | None = None,
        test_size: float | int | None = None,
        dev_size: float | int | None = None,
        description: str | None = None,
        directory: Path | None = None,
        origin: Origin | None = None,
    ) -> Self:
        """A task from rows in memory.

        Args:
            rows: examples by field name. They are split by content, unless ``test_rows`` and
                ``dev_rows`` say which are which; rows that repeat one of those are dropped here.
            prompt: the template of the model's input.
            target: the field that holds the right answer, or a template over fields. An object or a
                list in it becomes JSON with sorted keys.
            labels: the classes; "auto" takes the distinct targets of train, sorted; None: open task.
            metric: accuracy by default with labels, exact_match without (see climb.metrics).
            few_shot: how many solved examples the few-shot rung shows.
            max_tokens: of an answer; by default what the longest target of train can need.
            test_size, dev_size: a share below 1 or a number of examples (see climb.split).
            directory: where relative paths of ``metric`` are looked up.
            origin: which file and line each field and row came from, for messages.

        Raises:
            UserError: what is wrong, and in which row.
        """
        origin = origin or Origin(name)
        for size, label in ((test_size, "test_size"), (dev_size, "dev_size")):
            _check_size(size, label, origin)
        if few_shot < 1:
            raise UserError(f"{origin.field('few_shot')}: few_shot is {few_shot}; it must be 1 or more")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"{origin.field('max_tokens')}: max_tokens is {max_tokens}; it must be 1 or more")
        if test_rows is not None and test_size is not None:
            raise UserError(
                f"{origin.field('test_size')}: test_size has no effect on a test file; leave one out"
            )
        if dev_rows is not None and dev_size is not None:
            raise UserError(
                f"{origin.field('dev_size')}: dev_size has no effect on a dev file; leave one out"
            )
        reader = RowReader(prompt, target, origin)
        counts: Counter[str] = Counter()
        given = {"train": rows, "dev": dev_rows, "test": test_rows}
        read = {split: reader.read(part, split) for split, part in given.items() if part is not None}
        counts["rows"] = sum(len(part) for part in read.values())
        allowed = _label_set(labels, origin)
        if allowed is not None:
            for split, part in read.items():
                reader.check_labels(part, allowed, split)
        merged = {split: merge(part, counts) for split, part in read.items()}
        examples = place(merged, test_size, dev_size, counts)
        refuse_empty(examples, origin.field("data"), given)
        train = [example for example in examples if example.split == "train"]
        if labels == "auto":
            allowed = sorted({example.target for example in train})
            check_label_list(allowed, origin.field("labels"))
            for split, part in read.items():
                reader.check_labels(part, allowed, split, "not a target of train")
        if allowed is not None:
            refuse_unused(allowed, examples, origin.field("labels"))
            counts["labels without a training example"] = len(set(allowed) - {item.target for item in train})
        spec = metric if metric is not None else ("accuracy" if allowed is not None else "exact_match")
        return cls(
            name=name,
            prompt=reader.prompt,
            target=target,
            metric=load_metric(spec, allowed, where=f"{origin.field('metric')}: metric", directory=directory),
            examples=examples,
            labels=allowed,
            system=system,
            corpus=list(corpus),
            few_shot=few_shot,
            max_tokens=max_tokens or _longest(train),
            description=description,
            counts={what: count for what, count in counts.items() if count},
        )

    @cached_property
    def train(self) -> list[Example]:
        return [example for example in self.examples if example.split == "train"]

    @cached_property
    def dev(self) -> list[Example]:
        return [example for example in self.examples if example.split == "dev"]

    @cached_property
    def test(self) -> list[Example]:
        return [example for example in self.examples if example.split == "test"]

    def render(self, fields: Mapping[str, Any]) -> str:
        """What a model is asked: the prompt with the fields of one example in it."""
        return self.prompt.render(fields)

    def input_text(self, fields: Mapping[str, Any]) -> str:
        """What differs from example to example: the values of the prompt's fields, without its words."""
        return input_text(self.prompt, fields)

    @cached_property
    def test_texts(self) -> list[str]:
        """The test inputs as they may stand in a corpus."""
        return [
            str(example.fields[self.unmasked]) if self.unmasked else self.input_text(example.fields)
            for example in self.test
        ]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when anything that can change a result does: definition or examples."""
        rows = [(example.id, example.split, example.target, example.fields) for example in self.examples]
        return fingerprint([self.summary(), self.metric.definition, rows])

    def summary(self) -> dict[str, Any]:
        """The definition without the examples, in plain values."""
        return {
            "name": self.name,
            "description": self.description,
            "prompt": self.prompt.text,
            "target": self.target,
            "labels": self.labels,
            "metric": self.metric.name,
            "system": self.system,
            "corpus": self.corpus,
            "few_shot": self.few_shot,
            "max_tokens": self.max_tokens,
            "examples": {"train": len(self.train), "dev": len(self.dev), "test": len(self.test)},
        }

    @property
    def notes(self) -> list[str]:
        """What was done to the rows, a sentence each, for the report."""
        words = {
            "merged": "{} of {rows} rows repeat another one (case, spaces and punctuation aside) and were merged.",
            "conflicts": "{} inputs came with different targets; the commonest one was kept.",
            "ties": "{} inputs came with different targets equally often and were dropped.",
            "in test": "{} train or dev rows are also in the test file and were dropped from train and dev.",
            "in dev": "{} train rows are also in the dev file and were dropped from train.",
            "labels without a training example": "{} labels have no training example.",
        }
        rows = self.counts.get("rows", 0)
        return [
            text.format(f"{self.counts[key]:,}", rows=f"{rows:,}")
            for key, text in words.items()
            if key in self.counts
        ]


def open_task_file(path: Path) -> TaskFile:
    """The fields of a task file of any kind. UserError names the nearest file where there is none."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; name the task's YAML file in it")
    if not path.exists():
        builtins = ", ".join(f"builtin:{known}" for known in BUILTIN)
        raise UserError(f"there is no task file {path}{nearest_file(path) or f'; built in: {builtins}'}")
    return TaskFile(path)


def _from_file(cls: type[Task], file: TaskFile) -> Task:
    directory = file.path.resolve().parent
    data, labels, values = file.data(), file.labels(), dict(file.values)
    options = {key: data[key] for key in ("format", "columns", "encoding", "quoting") if key in data}
    origin = Origin(str(file.path), {key: file.at(key) for key in values})
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "dev", "test"):
        if split not in data:
            continue
        rows[split] = []
        for name in data[split]:
            path = _data_path(directory, name, file.at("data"))
            part = read_rows(path, **options)
            origin.files.setdefault(split, []).append((str(path), len(part)))
            rows[split] += part
        if not rows[split]:
            raise UserError(f"{file.at('data')}: {split} is empty: {origin.data(split)} holds no rows")
    corpus = values.get("corpus", list(DEFAULT_CORPUS))
    corpus = [corpus] if isinstance(corpus, str) else corpus
    if not corpus or not all(isinstance(entry, str) for entry in corpus):
        raise UserError(f"{file.at('corpus')}: corpus must be a path or a list of paths")
    return cls.from_rows(
        values.get("name", file.path.stem),
        rows["train"],
        prompt=values["prompt"],
        target=values["target"],
        labels=labels,
        metric=values.get("metric"),
        test_rows=rows.get("test"),
        dev_rows=rows.get("dev"),
        system=values.get("system"),
        corpus=[entry if entry.startswith("builtin:") else str(directory / entry) for entry in corpus],
        few_shot=values.get("few_shot", FEW_SHOT),
        max_tokens=values.get("max_tokens"),
        test_size=values.get("test_size"),
        dev_size=values.get("dev_size"),
        description=values.get("description"),
        directory=directory,
        origin=origin,
    )


def _data_path(directory: Path, name: str, where: str) -> Path:
    path = directory / name
    if path.is_dir():
        raise UserError(f"{where}: {path} is a directory; name the files in it")
    if path.exists():
        return path
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not parts[0].startswith(".") and "." not in parts[1]:
        raise UserError(
            f"{where}: there is no file {path}. If {name} is a data set on the Hub, download it with "
            f"'hf download --repo-type dataset {name} --local-dir DIR' and name its files"
        )
    raise UserError(f"{where}: there is no file {path}{nearest_file(path)}")


def _label_set(labels: Sequence[str] | str | None, origin: Origin) -> list[str] | None:
    if labels is None or labels == "auto":
        return None
    if isinstance(labels, str):
        raise UserError(f"{origin.field('labels')}: labels must be a list, or auto, not {labels!r}")
    check_label_list(list(labels), origin.field("labels"))
    return list(labels)


def _check_size(size: float | int | None, name: str, origin: Origin) -> None:
    if size is None:
        return
    wrong = isinstance(size, bool) or size <= 0 or (isinstance(size, float) and size >= 1)
    if wrong:
        raise UserError(
            f"{origin.field(name)}: {name} is {size}; it must be a share above 0 and below 1, or a number of examples"
        )


def _longest(train: list[Example]) -> int:
    """Enough tokens for any target of train and a quarter more: a byte is the smallest token there is."""
    longest = max(len(example.target.encode()) for example in train)
    return min(1024, max(16, longest * 5 // 4 + 1))
