"""Rungs that change weights: LoRA, full fine-tuning, and training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tercet.climb.result import Level
from tercet.climb.rungs.base import Answer, Setting, directory_size
from tercet.climb.rungs.prompting import Answerer
from tercet.climb.task import Example, Task
from tercet.errors import UserError
from tercet.prompt.fewshot import separator
from tercet.prompt.llm import LLM

BATCH = 16  # examples a step
FEWEST_STEPS = 200  # a small task gets more passes: the weights need some hundred updates to move at all


def training_rows(task: Task, examples: Sequence[Example], chat: bool) -> list[dict[str, Any]]:
    """Examples in the form a model is tuned on, which is the form it is asked in later."""
    rows: list[dict[str, Any]] = []
    for example in examples:
        text = task.render(example.fields)
        if chat:
            system = [{"role": "system", "content": task.system}] if task.system else []
            answer = {"role": "assistant", "content": example.target}
            rows.append({"messages": [*system, {"role": "user", "content": text}, answer]})
        else:
            text = f"{task.system}\n\n{text}" if task.system else text
            rows.append({"prompt": text, "completion": separator(text) + example.target})
    return rows


class Tuned:
    """A model whose weights, or adapters beside them, are trained on the task's training examples.

    start: gives the checkpoint directory to start from, once it is needed.
    epochs: passes over train, where the minutes allow that many.
    """

    level: Level = "tune"

    def __init__(
        self,
        name: str,
        start: Callable[[], Path],
        *,
        method: str,
        epochs: float,
        level: Level = "tune",
        **settings: Any,
    ) -> None:
        self.name, self.level = name, level
        self._start, self._method, self._epochs, self._settings = start, method, epochs, settings
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        from tercet.model.tokenizer import Tokenizer
        from tercet.tune.sft import tune

        start = self._start()
        task = setting.task
        chat = Tokenizer.load(start).chat_template is not None
        tuned = tune(
            start,
            training_rows(task, task.train, chat),
            setting.directory / "run",
            dev=training_rows(task, task.dev, chat),
            method=self._method,
            epochs=max(self._epochs, FEWEST_STEPS * BATCH / len(task.train)),
            batch_size=BATCH,
            minutes=setting.minutes,
            over_length="truncate",
            seed=setting.seed,
            **self._settings,
        )
        self._directory = Path(tuned.model)
        self.answerer = Answerer(LLM(tuned.model), task, tuned=True)
        self.details = {
            "weights trained": tuned.trainable_parameters,
            "steps": tuned.steps,
            "passes over train": round(tuned.steps * min(BATCH, tuned.examples) / tuned.examples, 1),
            "kept after step": tuned.best_step,
            "held-out loss": round(tuned.loss, 4),
            "training seconds": round(tuned.seconds, 1),
        }

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        answers = self.answerer.answer(examples)
        if self.answerer.shortened:
            self.details["shortened inputs"] = max(
                self.answerer.shortened, self.details.get("shortened inputs", 0)
            )
        return answers

    def size_bytes(self) -> int:
        size = directory_size(self._directory)
        if self._method == "lora":
            size += directory_size(self._start())  # an adapter answers only together with its base
        return size


def untrained(shape_of: Path, out: Path, seed: int) -> Path:
    """A checkpoint of the same shape and tokenizer as ``shape_of``, with fresh weights."""
    from tercet.build.initialize import initialize
    from tercet.files import atomic_directory
    from tercet.model.checkpoint import read_config
    from tercet.model.loading import save_model
    from tercet.model.tokenizer import Tokenizer
    from tercet.model.transformer import Transformer

    if not (out / "config.json").is_file():
        model = Transformer(read_config(shape_of))
        initialize(model, seed)
        with atomic_directory(out) as directory:
            save_model(model, directory)
            Tokenizer.load(shape_of).save(directory)
    return out


def local_start(llm: LLM) -> Path:
    """The checkpoint directory of a model that can be tuned here.

    Raises:
        UserError: the weights are elsewhere, or it is an adapter.
    """
    directory = llm.directory
    if directory is None:
        raise UserError(f"{llm.name} is a hosted model: its weights are not here to be tuned")
    if not (directory / "config.json").is_file():
        raise UserError(f"{llm.name} is an adapter; merge it first, or climb from its base")
    return directory
