"""The base model that a climb pre-trains on the task's corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tercet.errors import UserError
from tercet.evaluate.task import Task
from tercet.ladder.result import failure_reason
from tercet.progress import duration

CONTEXT = 512  # tokens; a task needs room for its examples


class BaseModel:
    """A base model that is built when it is first needed.

    Args:
        out: the run directory of the build.
        minutes: of the build.
    """

    def __init__(self, task: Task, out: Path, minutes: float, seed: int) -> None:
        self._task, self._out, self._minutes, self._seed = task, out, minutes, seed
        self._directory: Path | None = None
        self._failure: str | None = None

    def directory(self) -> Path:
        """Return the checkpoint directory, after building the model in the first call.

        The task's test examples are removed from the corpus. A finished build is loaded.

        Raises:
            UserError: bad data, or an earlier call failed; a failed build is not repeated.
        """
        from tercet.pretrain.pretrain import pretrain
        from tercet.pretrain.settings import BuildSettings

        if self._failure is not None:
            raise UserError(f"the base model could not be built: {self._failure}")
        if self._directory is None:
            settings = BuildSettings(
                self._task.corpus,
                self._out,
                minutes=self._minutes,
                context=CONTEXT,
                seed=self._seed,
                exclude=self._task.test_texts,
            )
            try:
                self._directory = Path(pretrain(settings).model)
            except Exception as problem:
                self._failure = failure_reason(problem)
                raise
        return self._directory


def base_facts(out: Path) -> dict[str, Any] | None:
    """Return the size, quality and decontamination of a built base model; None if ``out`` holds none."""
    from tercet.pretrain.result import read_result

    if not (out / "result.json").is_file():
        return None
    built = read_result(out / "result.json")
    return {
        "path": built.model, "parameters": built.parameters, "tokens": built.tokens, "seconds": built.seconds,
        "bits_per_byte": round(built.bits_per_byte, 4), "corpus_bytes": built.corpus.bytes,
        "shortened": built.shortened, "decontamination": built.corpus.decontamination or {},
    }  # fmt: skip


def describe_base(facts: dict[str, Any]) -> str:
    """Return the progress line of a built base model."""
    removed = facts["decontamination"]
    return (
        f"{facts['parameters']:,} parameters, {facts['bits_per_byte']:.3f} bits per byte, {duration(facts['seconds'])}; "
        f"removed {removed['passages_removed']:,} passages from the corpus, which held "
        f"{removed['test_examples_found']:,} of {removed['test_examples']:,} test examples or near-copies of them"
    )
