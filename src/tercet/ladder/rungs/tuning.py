"""Rungs that train weights: LoRA, full fine-tuning and training from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.data.fewshot import few_shot_text, separator
from tercet.data.prompt_tokens import conversation_tokens
from tercet.errors import UserError
from tercet.evaluate.answer import Answer, Answerer
from tercet.evaluate.choices import PromptChoices
from tercet.evaluate.shorten import prompt_room, shorten_input
from tercet.evaluate.task import Example, Task
from tercet.files import directory_size, read_json, write_json
from tercet.finetune.settings import Method
from tercet.ladder.result import Level
from tercet.ladder.rungs.racing import Contender, race
from tercet.ladder.rungs.rung import Setting
from tercet.model.gguf_index import model_bytes
from tercet.prompt.llm import LLM

if TYPE_CHECKING:
    from tercet.model.tokenizer import Tokenizer

BATCH = 16  # examples a step
SHORT_LORA = 2.0  # times the default rate, for a LoRA of less than an epoch
PATIENCE = 2  # held-out evaluations without a lower loss
CALIBRATED_ON = 200  # dev examples
FEWEST_STEPS = (
    200  # a small task is trained for more epochs: weights need some hundred updates to change much
)


def training_rows(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, limit: int
) -> list[dict[str, Any]]:
    """Return examples as rows for tuning, in the form in which the tuned model will later be given inputs.

    Args:
        task: with the prompt.
        examples: of one or more splits.
        tokenizer: of the model, with its chat template.
        limit: tokens of the model's context; inputs that are too long are shortened as for answering.
    """
    chat = tokenizer.chat_template is not None
    system = [{"role": "system", "content": task.system}] if task.system else []

    def prompt(text: str) -> str | list[dict[str, str]]:
        if chat:
            return [*system, {"role": "user", "content": text}]
        return few_shot_text([], text, task.system or "")

    def prompt_tokens(text: str) -> int:
        rendered = prompt(text)
        if isinstance(rendered, str):
            return len(tokenizer.encode(rendered))
        return len(conversation_tokens(tokenizer, rendered))

    room = prompt_room(task, limit, lambda text: len(tokenizer.encode(text)), labels_scored=True)
    rows: list[dict[str, Any]] = []
    for example in examples:
        rendered = prompt(shorten_input(task, example.fields, prompt_tokens, room)[0])
        if isinstance(rendered, str):
            rows.append({"prompt": rendered, "completion": separator(rendered) + example.target})
        else:
            rows.append({"messages": [*rendered, {"role": "assistant", "content": example.target}]})
    return rows


class Tuned:
    """A model with weights or adapters trained on the task's training examples.

    Args:
        start: returns the checkpoint directory to start from, when it is needed.
        epochs: at most, within the setting's minutes.
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
    ) -> None:
        self.name, self.level = name, level
        self._start, self._method, self._epochs = start, method, epochs
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        """Tune the model, and load the result."""
        from tercet.finetune.sft import tune
        from tercet.model.checkpoint import read_config
        from tercet.model.tokenizer import Tokenizer

        start = self._start()
        task = setting.task
        tokenizer, limit = Tokenizer.load(start), read_config(start).max_positions
        rows = training_rows(task, task.train, tokenizer, limit)
        batch, rate = self._training(start, rows, setting)
        tuned = tune(
            start,
            rows,
            setting.directory / "run",
            dev=training_rows(task, task.dev, tokenizer, limit),
            method=self._method,
            epochs=max(self._epochs, FEWEST_STEPS * batch / len(task.train)),
            batch_size=batch,
            learning_rate=rate,
            minutes=setting.minutes,
            patience=PATIENCE,
            over_length="truncate",
            seed=setting.seed,
        )
        self._directory = Path(tuned.model)
        self.answerer, calibration = self._calibrated(LLM(tuned.model), setting)
        self.details = {
            "weights trained": tuned.trainable_parameters,
            "steps": tuned.steps,
            "batch": batch,
            "learning rate": rate if rate is not None else "default",
            "epochs": round(tuned.steps * min(batch, tuned.examples) / tuned.examples, 2),
            "weights of step": tuned.best_step,
            "held-out loss": round(tuned.loss, 4),
            "training seconds": round(tuned.seconds, 1),
            "shortened by the time limit": tuned.shortened,
            "data": "; ".join(tuned.account),
        }
        if calibration is not None:
            self.details["calibration"] = calibration
        if tuned.outlook:
            self.details["with more time"] = tuned.outlook

    def _calibrated(self, llm: LLM, setting: Setting) -> tuple[Answerer, str | None]:
        """Return what answers, with the correction of label scores that dev prefers.

        A model that was tuned for few steps prefers some labels whatever the input is, as an untuned one does.
        """
        answerer = Answerer(llm, setting.task, tuned=True)
        if not answerer.scores_labels:
            return answerer, None
        winner, rows = race([Contender("tuned", answerer)], setting.task.dev[:CALIBRATED_ON], math.inf)
        if not rows:
            return answerer, None
        _, calibration, offsets = winner.calibrated()
        answerer = Answerer(llm, setting.task, offsets=offsets, tuned=True)
        PromptChoices.of(answerer, calibration).save(self._directory.parent / PromptChoices.FILE)
        return answerer, calibration

    def _training(
        self, start: Path, rows: Sequence[dict[str, Any]], setting: Setting
    ) -> tuple[int, float | None]:
        """Return the batch size and the learning rate (None: the default) for the time, stored for a resumed run.

        AdamW's rate goes with the square root of the batch (Malladi et al. 2022, arXiv:2205.10287). A LoRA that
        sees less than an epoch takes a higher rate (docs/experiments.md).
        """
        from tercet.finetune.estimate import estimate
        from tercet.finetune.sft import learning_rate_for
        from tercet.model.checkpoint import read_config
        from tercet.model.tensor_names import network_tensors

        if setting.minutes is None:
            return BATCH, None
        path = setting.directory / "training.json"
        if path.is_file():
            stored = read_json(path)
            return stored["batch"], stored["rate"]
        measured = estimate(start, rows, self._method)
        batch = measured.batch_size(setting.minutes, BATCH)
        factor = (batch / BATCH) ** 0.5
        if self._method == "lora" and measured.steps(setting.minutes, batch) * batch < len(rows):
            factor *= SHORT_LORA
        rate = None
        if factor != 1:
            parameters = sum(math.prod(tensor.shape) for tensor in network_tensors(read_config(start)))
            rate = float(f"{learning_rate_for(parameters, self._method) * factor:.2g}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"batch": batch, "rate": rate})
        return batch, rate

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return one answer for each example."""
        return self.answerer.answer(examples)

    def size_bytes(self) -> int:
        """Return the size of the tuned model's files, with those of an adapter's base."""
        size = directory_size(self._directory)
        if self._method == "lora":
            size += model_bytes(self._start())  # an adapter needs its base to answer
        return size


def untrained(model_directory: Path, out: Path, seed: int) -> Path:
    """Write a checkpoint with the shape and tokenizer of another one and random weights; return its directory."""
    from tercet.files import atomic_directory
    from tercet.model.checkpoint import read_config
    from tercet.model.loading import save_model
    from tercet.model.tokenizer import Tokenizer
    from tercet.model.transformer import Transformer
    from tercet.pretrain.initialize import initialize

    if not (out / "config.json").is_file():
        model = Transformer(read_config(model_directory))
        initialize(model, seed)
        with atomic_directory(out) as directory:
            save_model(model, directory)
            Tokenizer.load(model_directory).save(directory)
    return out


def local_start(llm: LLM) -> Path:
    """Return the checkpoint directory of a model that can be tuned.

    Raises:
        UserError: the model is hosted, or it is an adapter.
    """
    directory = llm.directory
    if directory is None:
        raise UserError(f"{llm.name} is a hosted model, so its weights cannot be tuned here")
    if not (directory / "config.json").is_file():
        raise UserError(f"{llm.name} is an adapter; merge it into its base first, or climb with its base")
    return directory
