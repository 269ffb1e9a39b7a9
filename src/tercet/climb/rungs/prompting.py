"""Rungs that use a model as it is: zero-shot and few-shot, and how any language model answers a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tercet.climb.result import Level
from tercet.climb.rungs.base import Answer, Setting, directory_size
from tercet.climb.task import Example, Task
from tercet.engine.request import Completion
from tercet.errors import UserError
from tercet.prompt.fewshot import Example as Shot
from tercet.prompt.fewshot import ShotSelector, few_shot_messages, few_shot_text, separator
from tercet.prompt.llm import LLM, Prompt

SHOT_DRAWS = 3  # sets of shots that are compared on dev
SHOT_DEV = 60  # dev examples they are compared on
ELLIPSIS = " ... "


class Answerer:
    """A language model, the prompt it is given and the form of its answer.

    Closed tasks are answered with the label of the highest log-probability, so an answer is always a
    label. Open tasks, and hosted models that give no log-probabilities, are answered by generating.
    ``tuned`` models have learned to end an answer with their stop token, which is scored with it.
    """

    def __init__(self, llm: LLM, task: Task, *, shots: Sequence[Shot] = (), tuned: bool = False) -> None:
        self.llm, self.task, self.shots, self.tuned = llm, task, list(shots), tuned
        self.shortened = 0  # inputs that did not fit the model's context
        self.scores_labels = task.labels is not None and llm.is_local

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
        self.shortened = 0
        prompts = [self._fitting(example) for example in examples]
        if self.scores_labels:
            return self._choose(prompts)
        # A base model has not learned to end an answer; the prompt shows one answer a line.
        stop: dict[str, Any] = {} if self.llm.has_chat_template or self.tuned else {"stop": ("\n",)}
        completions = self.llm.batch(prompts, max_tokens=self.task.max_tokens, temperature=0.0, **stop)
        return [self._read(completion) for completion in completions]

    def _choose(self, prompts: Sequence[Prompt]) -> list[Answer]:
        labels = self.task.labels
        assert labels is not None
        # In a chat the answer stands alone; in plain text a space parts it from the prompt.
        choices = [
            [(separator(prompt) if isinstance(prompt, str) else "") + label for label in labels]
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

    def _fitting(self, example: Example) -> Prompt:
        """The prompt, with the middle of the longest field left out where it is too long for the model."""
        prompt = self.prompt(self.task.render(example.fields))
        limit = self.llm.max_tokens_context
        if limit is None:
            return prompt
        labels = self.task.labels
        reserve = (
            self.task.max_tokens if not self.scores_labels or labels is None else self._label_tokens(labels)
        )
        room = limit - min(reserve, limit // 2) - 1
        if self.llm.count_tokens(prompt) <= room:
            return prompt
        self.shortened += 1
        fields = dict(example.fields)
        name = max(self.task.prompt.fields, key=lambda name: len(str(fields[name])))
        words = str(fields[name]).split()
        keep = len(words)
        while keep > 1:
            keep = int(keep * 0.8)
            fields[name] = (
                " ".join(words[: (keep + 1) // 2]) + ELLIPSIS + " ".join(words[len(words) - keep // 2 :])
            )
            prompt = self.prompt(self.task.render(fields))
            if self.llm.count_tokens(prompt) <= room:
                return prompt
        raise UserError(
            f"the prompt does not fit the model's context of {limit} tokens even with an empty input"
        )

    def _label_tokens(self, labels: Sequence[str]) -> int:
        return max(self.llm.count_tokens(label) for label in labels) + 3


def nearest_label(text: str, labels: Sequence[str]) -> str:
    """The label a generated answer names: the same text, or the only label it mentions; else the text."""
    bare = text.strip().strip(".\"'`*").casefold()
    for label in labels:
        if bare == label.casefold():
            return label
    mentioned = [label for label in labels if label.casefold() in bare]
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
        answers = self.answerer.answer(examples)
        if self.answerer.shortened:
            self.details["shortened inputs"] = max(
                self.answerer.shortened, self.details.get("shortened inputs", 0)
            )
        return answers

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
        count = self._fitting_count(llm, task, train, min(task.few_shot, len(train)), setting.seed)
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

    @staticmethod
    def _fitting_count(llm: LLM, task: Task, train: list[Shot], wanted: int, seed: int) -> int:
        """As many shots as leave half of the context, or what is asked for if that is less."""
        limit = llm.max_tokens_context
        if limit is None:
            return wanted
        count = wanted
        while count > 1:
            shots = ShotSelector(train, count, task.labels, seed).choose()
            header = few_shot_text(shots, "")
            # A quarter for the query; longer queries are shortened, and counted.
            if llm.count_tokens(header) <= 0.7 * limit:
                return count
            count -= 1
        return max(1, count)
