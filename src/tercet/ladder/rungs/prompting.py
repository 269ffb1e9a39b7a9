"""Rungs that use a model as it is: zero-shot and few-shot, and how any language model answers a task."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tercet.data.chat_mask import mask_conversation
from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import ShotSelector, few_shot_messages, few_shot_text, separator
from tercet.engine.request import Completion
from tercet.errors import UserError
from tercet.evaluate.task import Example, Task
from tercet.ladder.result import Level
from tercet.ladder.rungs.base import Answer, Setting, directory_size
from tercet.ladder.rungs.fitting import answer_room, fitted_input
from tercet.prompt.llm import LLM, Prompt

SHOT_DRAWS = 3  # sets of shots that are compared on dev
SHOT_DEV = 60  # dev examples they are compared on


class Answerer:
    """A language model, the prompt it is given and the form of its answer.

    Closed tasks are answered with the label of the highest log-probability, so an answer is always a
    label. Open tasks, and hosted models that give no log-probabilities, are answered by generating.

    What ends an answer is scored with it, or a label that begins another one would always beat it:
    the chat template's end of turn, the stop token of a ``tuned`` model, a line's end otherwise.
    """

    def __init__(self, llm: LLM, task: Task, *, shots: Sequence[Shot] = (), tuned: bool = False) -> None:
        self.llm, self.task, self.shots, self.tuned = llm, task, list(shots), tuned
        self.scores_labels = task.labels is not None and llm.is_local
        self.ending = "" if tuned else "\n"
        if llm.has_chat_template:
            self.ending = _end_of_turn(llm)
        self.room: int | None = None
        if llm.context_length is not None:
            self.room = answer_room(
                task, llm.context_length, llm.count_tokens, labels_scored=self.scores_labels
            )

    @property
    def instruction(self) -> str:
        """The system message: the task's own, and for a model that generates, the labels to choose from."""
        parts = [self.task.system] if self.task.system else []
        if self.task.labels is not None and not self.scores_labels:
            parts.append(f"Answer with exactly one of these and nothing else: {', '.join(self.task.labels)}.")
        return "\n".join(parts)

    def prompt(self, text: str) -> Prompt:
        """What the model is given for one rendered input."""
        if self.llm.has_chat_template:
            return few_shot_messages(self.shots, text, self.instruction)
        return few_shot_text(self.shots, text, self.instruction)

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """One answer an example."""
        if not examples:
            return []
        inputs = [self._input(example) for example in examples]
        prompts = [self.prompt(text) for text, _ in inputs]
        answers = self._choose(prompts) if self.scores_labels else self._generate(prompts)
        return [
            replace(answer, shortened=shortened)
            for answer, (_, shortened) in zip(answers, inputs, strict=True)
        ]

    def _input(self, example: Example) -> tuple[str, bool]:
        if self.room is None:
            return self.task.render(example.fields), False
        return fitted_input(
            self.task, example.fields, lambda text: self.llm.count_tokens(self.prompt(text)), self.room
        )

    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        # A base model has not learned to end an answer; the prompt shows one answer a line.
        stop: dict[str, Any] = {} if self.llm.has_chat_template or self.tuned else {"stop": ("\n",)}
        completions = self.llm.batch(prompts, max_tokens=self.task.max_tokens, temperature=0.0, **stop)
        return [self._read(completion) for completion in completions]

    def _choose(self, prompts: Sequence[Prompt]) -> list[Answer]:
        labels = self.task.labels
        assert labels is not None
        # In a chat the answer stands alone; in plain text a space parts it from the prompt.
        choices = [
            [(separator(prompt) if isinstance(prompt, str) else "") + label + self.ending for label in labels]
            for prompt in prompts
        ]
        scores = self.llm.choose(prompts, choices, end=self.tuned and not self.llm.has_chat_template)
        longest = max(self.llm.count_tokens(choice) for choice in choices[0])
        answers = []
        for prompt, row in zip(prompts, scores, strict=True):
            best = max(range(len(labels)), key=row.__getitem__)
            answers.append(Answer(labels[best], self.llm.count_tokens(prompt), longest))
        return answers

    def _read(self, completion: Completion) -> Answer:
        usage = completion.usage
        text = completion.text.strip()
        if self.task.labels is not None:
            text = nearest_label(text, self.task.labels)
        seconds = None if self.llm.is_local else completion.seconds
        return Answer(text, usage.prompt_tokens, usage.completion_tokens, usage.cost, seconds)


def _end_of_turn(llm: LLM) -> str:
    """The token that ends an assistant's turn in the model's chat template; "" where none does."""
    if llm.tokenizer is None:
        return ""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        return mask_conversation(llm.tokenizer, talk)[0].spans[-1].stop
    except UserError:
        return ""  # a template that can't be trained on can still be asked


def nearest_label(text: str, labels: Sequence[str]) -> str:
    """The label a generated answer names: the same text, or the only label it mentions; else the text."""
    bare = text.strip().strip(".\"'`*").casefold()
    for label in labels:
        if bare == label.casefold():
            return label
    mentioned = [label for label in labels if re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", bare)]
    # "internet protocols" mentions "internet" too; the longer one is meant.
    mentioned = [a for a in mentioned if not any(a != b and a.casefold() in b.casefold() for b in mentioned)]
    return mentioned[0] if len(mentioned) == 1 else text


def as_shots(task: Task, examples: Sequence[Example]) -> list[Shot]:
    """Examples as pairs of rendered input and target."""
    return [Shot(task.render(example.fields), example.target) for example in examples]


class ZeroShot:
    """The model and the prompt, nothing else."""

    name = "zero-shot"
    level: Level = "prompt"

    def __init__(self, model: Callable[[], LLM]) -> None:
        self._model = model
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        self.answerer = Answerer(self._model(), setting.task)
        how = "labels scored by log-probability" if self.answerer.scores_labels else "generation"
        self.details = {"model": self.answerer.llm.name, "answers by": how}

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        return self.answerer.answer(examples)

    def size_bytes(self) -> int | None:
        directory = self.answerer.llm.directory
        return directory_size(directory) if directory is not None else None


class FewShot(ZeroShot):
    """The model, the prompt and solved examples of train before it.

    Which examples are shown matters more than most think (Lu et al. 2022, arXiv:2104.08786), so a few
    draws are compared on dev.
    """

    name = "few-shot"

    def fit(self, setting: Setting) -> None:
        llm, task = self._model(), setting.task
        train = as_shots(task, task.train)
        count, train = _fitting_shots(Answerer(llm, task), train, min(task.few_shot, len(train)))
        dev = task.dev[:SHOT_DEV]
        best: tuple[float, Answerer] | None = None
        draws = SHOT_DRAWS if llm.is_local else 1  # a hosted model's tokens cost money
        for draw in range(draws):
            shots = ShotSelector(train, count, task.labels, setting.seed + draw).choose()
            answerer = Answerer(llm, task, shots=shots)
            if draws == 1:
                best = (0.0, answerer)
                break
            answers = answerer.answer(dev)
            right = [
                task.metric.score(answer.text, example.target, example.fields)
                for answer, example in zip(answers, dev, strict=True)
            ]
            score = sum(right) / len(right)
            if best is None or score > best[0]:
                best = (score, answerer)
        assert best is not None
        self.answerer = best[1]
        self.details = {"model": llm.name, "shots": count, "draws compared on dev": draws}
        if count < task.few_shot:
            self.details["note"] = f"{task.few_shot} shots were asked for; {count} fit the model's context"


def _fitting_shots(answerer: Answerer, train: list[Shot], wanted: int) -> tuple[int, list[Shot]]:
    """How many shots to show, and those of ``train`` that are short enough for that many to fit.

    Together they take up to 0.7 of what the answer leaves; the query has the rest (longer ones are shortened,
    and counted). Fewer shots are shown rather than only from the shortest quarter of train.
    """
    room = answerer.room
    if room is None:
        return wanted, train
    lengths = [
        answerer.llm.count_tokens(shot.input + separator(shot.input) + shot.target + "\n\n") for shot in train
    ]
    for count in range(wanted, 1, -1):
        fitting = [shot for shot, length in zip(train, lengths, strict=True) if length * count <= 0.7 * room]
        if len(fitting) >= max(count, len(train) / 4):
            return count, fitting
    shortest = sorted(zip(lengths, range(len(train)), strict=True))[: max(1, len(train) // 4)]
    return 1, [train[index] for _, index in shortest]
