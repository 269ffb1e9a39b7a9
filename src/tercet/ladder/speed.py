"""Measure what prompts to a model cost on this machine, before a climb plans its time."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from tercet.data.fewshot import ShotSelector
from tercet.errors import UserError
from tercet.evaluate.answer import Answerer, as_shots
from tercet.evaluate.task import Task
from tercet.evaluate.wording import plain_wording
from tercet.files import cache_directory, fingerprint, read_json, write_json
from tercet.host import available_cores, processor_name
from tercet.ladder.rungs.racing import Contender
from tercet.model.checkpoint import weights_identity
from tercet.prompt.llm import LLM

SECONDS = 2.0  # of measuring, at least one call
BATCH = 8  # examples in a call
SHOTS = 4
# While a new measurement is within this factor of the stored one, the stored one is used, so that plans repeat.
AGREEMENT = 0.8


@dataclass(frozen=True)
class PromptCosts:
    """The speed of a model, and the tokens that an answer takes.

    Attributes:
        speed: tokens a second, of prompts and of labels or answers together.
        plain: tokens of an answer without a list of labels, as a tuned model answers.
        zero_shot: tokens of an answer in the default wording.
        few_shot: tokens of an answer after as many shots as the few-shot rung shows at first.
    """

    speed: float
    plain: float
    zero_shot: float
    few_shot: float

    @classmethod
    def measure(cls, llm: LLM, task: Task) -> Self:
        """Answer training examples for about two seconds, after one call that loads the model."""
        shots = ShotSelector(
            as_shots(task, task.train), min(SHOTS, task.few_shot, len(task.train)), task.labels
        )
        zero = Contender("zero-shot", Answerer(llm, task))
        few = Contender("few-shot", Answerer(llm, task, shots=shots))
        plain = Contender("plain", Answerer(llm, task, wording=plain_wording(llm)))
        # Each query has other shots, so their tokens count for each; a balanced choice has the same length.
        shown = sum(llm.count_tokens(shot.input + shot.target) for shot in shots.choose())
        return cls(_repeatable(llm, task, _speed(zero, task)), plain.tokens, zero.tokens, few.tokens + shown)


def _speed(contender: Contender, task: Task) -> float:
    """Return the tokens a second of answering examples of the training split."""
    answerer, examples = contender.answerer, task.train
    answerer.answer(examples[:2])
    start, count = time.monotonic(), 0
    while count < len(examples):
        batch = examples[count : count + BATCH]
        answerer.answer(batch)
        count += len(batch)
        if time.monotonic() - start > SECONDS:
            break
    return contender.tokens * count / max(time.monotonic() - start, 1e-6)


def _repeatable(llm: LLM, task: Task, speed: float) -> float:
    """Return the speed with two digits, or the stored one if the machine is about as fast as it was then."""
    identity = None if llm.directory is None else weights_identity(llm.directory)
    key = fingerprint([identity, llm.name, task.summary(), processor_name(), available_cores()])
    path = cache_directory() / "prompt_speed.json"
    try:
        stored = {str(name): float(value) for name, value in read_json(path).items()}
    except (UserError, AttributeError, TypeError, ValueError):  # no such file, or a damaged one
        stored = {}
    before = stored.get(key)
    if before is not None and AGREEMENT < speed / before < 1 / AGREEMENT:
        return before
    speed = float(f"{speed:.2g}")
    with suppress(UserError):  # without a writable cache, plans are only less repeatable
        write_json(path, {**stored, key: speed})
    return speed
