"""Tasks: examples, a prompt, a metric and a locked test split. All rungs use the same definition."""

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
from tercet.evaluate.task_file import EXAMPLES, MINIMAL_PAIRS, Origin, TaskFile, check_label_list
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
    """A prompt, a metric and examples in three splits.

    ``Task.load`` and ``Task.from_rows`` make tasks. Every choice (of few-shot examples, a prompt, when
    to stop training) may use ``train`` and ``dev`` and never ``test``.
    """

    name: str
    prompt: Template
    target: str
    metric: Metric
    examples: list[Example]
    labels: list[str] | None = None  # None: an open task, with free text as answers
    system: str | None = None
    corpus: list[str] = field(default_factory=lambda: list(DEFAULT_CORPUS))
    few_shot: int = FEW_SHOT
    max_tokens: int = 64
    description: str | None = None
    unmasked: str | None = None  # the field with the text before parts of it were masked
    reference: str | None = None  # the argument of ``load``; None: made in Python
    counts: dict[str, int] = field(default_factory=dict)  # rows read, merged, dropped: see ``notes``

    @classmethod
    def load(cls, reference: str | Path) -> Task:
        """Load a task from a YAML file, whose paths are relative to the file, or ``builtin:NAME``.

        Raises:
            UserError: a mistake in the file or its data; the message names the file and the line or row.
        """
        name = str(reference)
        if name.startswith("builtin:"):
            make = BUILTIN.get(name.removeprefix("builtin:"))
            if make is None:
                raise UserError(
                    f"there is no built-in task {name!r}; the built-in tasks are builtin:{', builtin:'.join(BUILTIN)}"
                )
            return replace(make(), reference=name)
        path = Path(reference)
        file = open_task_file(path)
        if file.kind != EXAMPLES:
            raise UserError(
                f"{file.at('kind')}: a task of kind {MINIMAL_PAIRS} can be measured only by 'tercet eval REF {path}'; "
                f"a task of kind {EXAMPLES}, with a prompt and a target, is needed here"
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
        """Make a task from rows in memory.

        Args:
            name: of the task.
            rows: examples by field name. They are split by content (`tercet.evaluate.split`), unless
                ``test_rows`` and ``dev_rows`` are separate; rows that repeat one of those are dropped.
            prompt: the template of the model's input.
            target: the field with the correct answer, or a template over fields. An object or a list
                becomes JSON with sorted keys.
            labels: the classes; "auto" takes the distinct training targets, sorted; None: an open task.
            metric: as for `tercet.evaluate.metrics.load_metric`; default accuracy with labels, else exact_match.
            test_rows: the test split; None: a part of ``rows``.
            dev_rows: the dev split; None: a part of ``rows``.
            system: the system message.
            corpus: what a base model is pre-trained on.
            few_shot: the number of solved examples that the few-shot rung shows.
            max_tokens: of an answer; default enough for the longest training target.
            test_size: a share below 1 or a number of examples.
            dev_size: a share below 1 or a number of examples.
            description: a sentence for the report.
            directory: relative paths of ``metric`` start here.
            origin: the file and line of each field and row, for error messages.

        Raises:
            UserError: a wrong setting or row; the message names it.
        """
        origin = origin or Origin(name)
        _check_size("test", test_size, test_rows is not None, origin)
        _check_size("dev", dev_size, dev_rows is not None, origin)
        _check_positive(origin, few_shot=few_shot, max_tokens=max_tokens)
        reader = RowReader(prompt, target, origin)
        counts: Counter[str] = Counter()
        parts = {"train": rows, "dev": dev_rows, "test": test_rows}
        read = {split: reader.read(part, split) for split, part in parts.items() if part is not None}
        counts["rows"] = sum(len(part) for part in read.values())
        label_list = _label_list(labels, origin)
        if label_list is not None:
            for split, part in read.items():
                reader.check_labels(part, label_list, split)
        merged = {split: merge(part, counts) for split, part in read.items()}
        examples = place(merged, test_size, dev_size, counts)
        refuse_empty(examples, origin.field("data"), parts)
        train = [example for example in examples if example.split == "train"]
        targets = {example.target for example in train}
        if labels == "auto":
            label_list = sorted(targets)
            check_label_list(label_list, origin.field("labels"))
            for split, part in read.items():
                reader.check_labels(part, label_list, split, "not a target of a training example")
        if label_list is not None:
            refuse_unused(label_list, examples, origin.field("labels"))
            counts["labels without a training example"] = len(set(label_list) - targets)
        spec = metric if metric is not None else ("accuracy" if label_list is not None else "exact_match")
        where = f"{origin.field('metric')}: metric"
        return cls(
            name=name,
            prompt=reader.prompt,
            target=target,
            metric=load_metric(spec, label_list, where=where, directory=directory),
            examples=examples,
            labels=label_list,
            system=system,
            corpus=list(corpus),
            few_shot=few_shot,
            max_tokens=max_tokens or _enough_tokens(train),
            description=description,
            counts={name: count for name, count in counts.items() if count},
        )

    @cached_property
    def train(self) -> list[Example]:
        """The training examples."""
        return [example for example in self.examples if example.split == "train"]

    @cached_property
    def dev(self) -> list[Example]:
        """The examples for choices."""
        return [example for example in self.examples if example.split == "dev"]

    @cached_property
    def test(self) -> list[Example]:
        """The locked test examples."""
        return [example for example in self.examples if example.split == "test"]

    def render(self, fields: Mapping[str, Any]) -> str:
        """Return the model's input: the prompt with the fields of one example."""
        return self.prompt.render(fields)

    def input_text(self, fields: Mapping[str, Any]) -> str:
        """Return the part of the input that differs between examples: the values of the prompt's fields."""
        return input_text(self.prompt, fields)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """Return the metric of one answer for each example."""
        scores = [
            self.metric.score(answer, example.target, example.fields)
            for answer, example in zip(answers, examples, strict=True)
        ]
        targets = [example.target for example in examples]
        return float(self.metric.aggregate(self.metric.values(answers, targets, scores)))

    @cached_property
    def test_texts(self) -> list[str]:
        """The test inputs in the form in which a corpus may contain them."""
        return [
            str(example.fields[self.unmasked]) if self.unmasked else self.input_text(example.fields)
            for example in self.test
        ]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that can change a result: the definition and the examples."""
        rows = [(example.id, example.split, example.target, example.fields) for example in self.examples]
        return fingerprint([self.summary(), self.metric.definition, rows])

    def summary(self) -> dict[str, Any]:
        """Return the definition without the examples, in plain values."""
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
        """What was done to the rows, in sentences for the report."""
        sentences = {
            "merged": "{} of {rows} rows repeat another row (case, spaces and punctuation aside) and were merged with it.",
            "conflicts": "{} inputs came with different targets; the most frequent target was used.",
            "ties": "{} inputs came with different targets, equally often, and were dropped.",
            "in test": "{} train or dev rows are also in the test file and were dropped from train and dev.",
            "in dev": "{} train rows are also in the dev file and were dropped from train.",
            "labels without a training example": "{} labels have no training example.",
        }
        rows = self.counts.get("rows", 0)
        return [
            text.format(f"{self.counts[key]:,}", rows=f"{rows:,}")
            for key, text in sentences.items()
            if key in self.counts
        ]


def open_task_file(path: Path) -> TaskFile:
    """Read the fields of a task file of any kind. Raises UserError, which suggests the nearest file name."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the path of the task's YAML file")
    if not path.exists():
        builtins = ", ".join(f"builtin:{known}" for known in BUILTIN)
        raise UserError(
            f"there is no task file {path}{nearest_file(path) or f'; the built-in tasks are {builtins}'}"
        )
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
        raise UserError(f"{where}: {path} is a directory; list the files in it")
    if path.exists():
        return path
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not parts[0].startswith(".") and "." not in parts[1]:
        raise UserError(
            f"{where}: there is no file {path}. If {name} is a data set on the Hub, download it with "
            f"'hf download --repo-type dataset {name} --local-dir DIR' and give the paths of its files"
        )
    raise UserError(f"{where}: there is no file {path}{nearest_file(path)}")


def _label_list(labels: Sequence[str] | str | None, origin: Origin) -> list[str] | None:
    if labels is None or labels == "auto":
        return None
    if isinstance(labels, str):
        raise UserError(f"{origin.field('labels')}: labels must be a list, or auto, not {labels!r}")
    check_label_list(list(labels), origin.field("labels"))
    return list(labels)


def _check_positive(origin: Origin, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{origin.field(name)}: {name} is {number}; it must be 1 or more")


def _check_size(split: str, size: float | int | None, has_file: bool, origin: Origin) -> None:
    """Raise UserError for the size of a split that is out of range, or of a split with a file of its own."""
    if size is None:
        return
    name = f"{split}_size"
    if isinstance(size, bool) or size <= 0 or (isinstance(size, float) and size >= 1):
        raise UserError(
            f"{origin.field(name)}: {name} is {size}; it must be a share above 0 and below 1, or a number of examples"
        )
    if has_file:
        raise UserError(
            f"{origin.field(name)}: {name} has no effect on a {split} file; leave out one of them"
        )


def _enough_tokens(train: list[Example]) -> int:
    """Return enough tokens for any training target and a quarter more. The smallest token is a byte."""
    longest = max(len(example.target.encode()) for example in train)
    return min(1024, max(16, longest * 5 // 4 + 1))
