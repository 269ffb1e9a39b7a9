"""Rungs that change weights: LoRA, full fine-tuning, and training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.data.fewshot import few_shot_text, separator
from tercet.errors import UserError
from tercet.evaluate.answer import Answer, Answerer
from tercet.evaluate.shorten import prompt_room, shorten_input
from tercet.evaluate.task import Example, Task
from tercet.files import directory_size
from tercet.finetune.settings import Method
from tercet.ladder.result import Level
from tercet.ladder.rungs.base import Setting
from tercet.prompt.llm import LLM

if TYPE_CHECKING:
    from tercet.model.tokenizer import Tokenizer

BATCH = 16  # examples a step
FEWEST_STEPS = 200  # a small task gets more passes: the weights need some hundred updates to move at all


def training_rows(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, limit: int
) -> list[dict[str, Any]]:
    """Examples in the form a model is tuned on, which is the form it is asked in later.

    limit: the model's context; inputs that are too long for it are shortened as they will be then.
    """
    chat = tokenizer.chat_template is not None
    system = [{"role": "system", "content": task.system}] if task.system else []

    def prompt(text: str) -> str | list[dict[str, str]]:
        if chat:
            return [*system, {"role": "user", "content": text}]
        return few_shot_text([], text, task.system or "")

    def prompt_tokens(text: str) -> int:
        made = prompt(text)
        if isinstance(made, str):
            return len(tokenizer.encode(made))
        return len(tokenizer.encode_chat(made, add_generation_prompt=True))

    room = prompt_room(task, limit, lambda text: len(tokenizer.encode(text)), labels_scored=True)
    rows: list[dict[str, Any]] = []
    for example in examples:
        made = prompt(shorten_input(task, example.fields, prompt_tokens, room)[0])
        if isinstance(made, str):
            rows.append({"prompt": made, "completion": separator(made) + example.target})
        else:
            rows.append({"messages": [*made, {"role": "assistant", "content": example.target}]})
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
        method: Method,
        epochs: float,
        level: Level = "tune",
        **settings: Any,
    ) -> None:
        self.name, self.level = name, level
        self._start, self._method, self._epochs, self._settings = start, method, epochs, settings
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        from tercet.finetune.sft import tune
        from tercet.model.checkpoint import read_config
        from tercet.model.tokenizer import Tokenizer

        start = self._start()
        task = setting.task
        form = (Tokenizer.load(start), read_config(start).max_positions)
        tuned = tune(
            start,
            training_rows(task, task.train, *form),
            setting.directory / "run",
            dev=training_rows(task, task.dev, *form),
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
            "cut short by the clock": tuned.shortened,
            "data": "; ".join(tuned.account),
        }

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        return self.answerer.answer(examples)

    def size_bytes(self) -> int:
        size = directory_size(self._directory)
        if self._method == "lora":
            size += directory_size(self._start())  # an adapter answers only together with its base
        return size


def untrained(shape_of: Path, out: Path, seed: int) -> Path:
    """A checkpoint of the same shape and tokenizer as ``shape_of``, with fresh weights."""
    from tercet.files import atomic_directory
    from tercet.model.checkpoint import read_config
    from tercet.model.loading import save_model
    from tercet.model.tokenizer import Tokenizer
    from tercet.model.transformer import Transformer
    from tercet.pretrain.initialize import initialize

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
