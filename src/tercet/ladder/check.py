"""Check a task before it is climbed: splits, labels, near-copies and, with a model, prompts and times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tercet.data.retrieval import Retriever
from tercet.evaluate.task import Example, Task
from tercet.ladder.check_labels import label_warnings, target_warnings
from tercet.ladder.check_model import ModelCheck, PromptShown, check_model
from tercet.progress import say
from tercet.prompt.llm import LLM

# Two texts count as near-copies from this cosine of their character n-grams on: on docstrings, text messages and
# spoken requests, pairs above it differ in a word or two, and pairs below 0.85 are often only of one kind.
NEAR = 0.9
PAIRS_SHOWN = 2
PROMPTS_SHOWN = 3
NEAR_SHARE = 0.01  # of the test examples; from there on near-copies are a warning
FEW_TEST = 200  # below, the 95% interval of a score is wider than 7 percentage points on either side
FEW_DEV = 50
LARGE = 50_000  # training examples, from which on near-copies take more than some seconds
LOPSIDED = 0.8  # share of one label, from which on accuracy says little


@dataclass(frozen=True)
class NearCopy:
    """A dev or test example, and the training example that it nearly repeats."""

    split: str
    text: str
    copy: str
    similarity: float
    same_target: bool


@dataclass(frozen=True)
class NearCopies:
    """How many examples of a split nearly repeat a training example.

    Attributes:
        test: such test examples.
        dev: such dev examples.
        other_target: of both, those whose training example has another target.
        shown: some pairs, those of the test split first.
    """

    test: int
    dev: int
    other_target: int
    shown: list[NearCopy]


@dataclass(frozen=True)
class Baseline:
    """The score that needs no input: every answer is the most frequent target of the training examples."""

    answer: str
    score: float
    test_share: float  # of the test examples that have this target


@dataclass
class TaskCheck:
    """What `check_task` tells the author of a task.

    Attributes:
        name: of the task.
        metric: its name.
        warnings: what will mislead or fail, in sentences.
        notes: what was done to the rows when the task was loaded.
        splits: number of examples by split.
        labels: number of examples of each label by split; None for an open task.
        targets: number of different targets of each split.
        baseline: the score to beat.
        near_copies: examples that nearly repeat a training example.
        prompts: inputs as the model reads them; without a model, as the task renders them.
        model: what needs a model; None without one.
    """

    name: str
    metric: str
    splits: dict[str, int]
    labels: dict[str, dict[str, int]] | None
    targets: dict[str, int]
    notes: list[str]
    baseline: Baseline
    near_copies: NearCopies
    prompts: list[PromptShown]
    model: ModelCheck | None = None
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def check_task(task: Task | str | Path, model: LLM | str | Path | None = None) -> TaskCheck:
    """Check a task: what will mislead or fail when it is climbed.

    Args:
        task: a task, or the argument of ``Task.load``.
        model: to render prompts for, and to measure on a few examples of the dev split; None: only what
            needs no model.

    Returns:
        The splits and labels, near-copies between splits, the baseline, prompts as the model reads them, and the
        time or tokens of each rung. ``warnings`` has the conclusions.

    Raises:
        UserError: a wrong task or model.
    """
    if not isinstance(task, Task):
        task = Task.load(task)
    llm = LLM(model) if isinstance(model, str | Path) else model
    splits = {"train": task.train, "dev": task.dev, "test": task.test}
    check = TaskCheck(
        name=task.name,
        metric=task.metric.name,
        splits={split: len(examples) for split, examples in splits.items()},
        labels=None if task.labels is None else _label_counts(task.labels, splits),
        targets={split: len({example.target for example in part}) for split, part in splits.items()},
        notes=task.notes,
        baseline=_baseline(task),
        near_copies=_near_copies(task),
        prompts=[],
    )
    if llm is None:
        check.prompts = _inputs(task)
    else:
        check.model, check.prompts = check_model(task, llm)
    check.warnings = [*_data_warnings(check), *label_warnings(task), *target_warnings(task)]
    check.warnings += check.model.warnings if check.model is not None else []
    return check


def _label_counts(labels: Sequence[str], splits: dict[str, list[Example]]) -> dict[str, dict[str, int]]:
    counts = {split: Counter(example.target for example in part) for split, part in splits.items()}
    return {label: {split: counts[split][label] for split in splits} for label in labels}


def _baseline(task: Task) -> Baseline:
    """Return the score of the majority rung."""
    counts = Counter(example.target for example in task.train)
    answer = min(counts, key=lambda target: (-counts[target], target))
    share = sum(example.target == answer for example in task.test) / len(task.test)
    return Baseline(answer, task.score([answer] * len(task.test), task.test), share)


def _near_copies(task: Task) -> NearCopies:
    """Return the dev and test examples whose nearest training input is a near-copy."""
    train = [task.input_text(example.fields) for example in task.train]
    if len(train) >= LARGE:
        say("looking for near-copies")
    retriever = Retriever(train, "characters")
    pairs: dict[str, list[NearCopy]] = {}
    for split, examples in (("test", task.test), ("dev", task.dev)):
        texts = [task.input_text(example.fields) for example in examples]
        neighbours = retriever.nearest(texts, 1)
        pairs[split] = [
            NearCopy(
                split, text, train[index], round(similarity, 3), task.train[index].target == example.target
            )
            for text, example, index, similarity in zip(
                texts,
                examples,
                neighbours.indices[:, 0].tolist(),
                neighbours.similarities[:, 0].tolist(),
                strict=True,
            )
            if similarity >= NEAR
        ]
        # Other targets first: they may be mistakes. Then the least alike, which show what counts.
        pairs[split].sort(key=lambda pair: (pair.same_target, pair.similarity))
    both = [*pairs["test"], *pairs["dev"]]
    other = sum(not pair.same_target for pair in both)
    return NearCopies(len(pairs["test"]), len(pairs["dev"]), other, both[:PAIRS_SHOWN])


def _inputs(task: Task) -> list[PromptShown]:
    """Return the shortest, the median and the longest test input as the task renders them."""
    order = sorted(task.test, key=lambda example: (len(task.render(example.fields)), example.id))
    places = dict.fromkeys([len(order) // 2, 0, len(order) - 1])
    names = ["median length", "shortest", "longest"]
    return [
        PromptShown(name, task.render(order[place].fields), order[place].target)
        for name, place in list(zip(names, places, strict=False))[:PROMPTS_SHOWN]
    ]


def _data_warnings(check: TaskCheck) -> list[str]:
    test, dev = check.splits["test"], check.splits["dev"]
    near, base = check.near_copies, check.baseline
    warnings = []
    if near.test >= max(1, NEAR_SHARE * test):
        warnings.append(
            f"{near.test:,} of {test:,} test examples have a near-copy in train: scores will be too high."
        )
    if near.other_target and check.labels is not None:
        warnings.append(
            f"{near.other_target} of the near-copies have another label than their training example: labels may be wrong."
        )
    if test < FEW_TEST:
        warnings.append(
            f"The test split has {test} examples: a score near 50% is uncertain by {_uncertainty(test):.0f} points "
            "in either direction."
        )
    if dev < FEW_DEV:
        warnings.append(
            f"The dev split has {dev} examples: choices made on it (shots, wording, when to stop) are near to chance."
        )
    if check.labels is not None and check.metric == "accuracy" and base.test_share >= LOPSIDED:
        warnings.append(
            f"{base.test_share:.0%} of the test examples are {base.answer!r}: accuracy says little; consider metric: f1."
        )
    return warnings


def _uncertainty(count: int) -> float:
    """Return half the width of the 95% interval of a score of one half, in percentage points."""
    return float(100 * 1.96 * (0.25 / count) ** 0.5)
