"""Answer the examples of a task with a language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tercet.data.chat_mask import mask_conversation
from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import ShotSelector, separator
from tercet.engine.request import Completion
from tercet.errors import UserError
from tercet.evaluate.calibration import CONTENT_FREE, Floats
from tercet.evaluate.language_model import LanguageModel, Prompt
from tercet.evaluate.shorten import prompt_room, shorten_input
from tercet.evaluate.task import Example, Task
from tercet.evaluate.wording import Wording, default_wording, plain_wording
from tercet.model.gguf_index import model_bytes
from tercet.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The answer to one example, with its tokens, cost and time."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None  # USD
    seconds: float | None = None  # as a server measured it; None: the caller measures it
    shortened: bool = False  # whether the middle of an input too long for the model was cut out


class Answerer:
    """A language model with the prompt of a task and the form of its answers.

    The answer to a closed task is the label with the highest log-probability, so it is always a
    label. Open tasks, and hosted models, which give no log-probabilities, are answered by generation.

    The text that ends an answer is scored with the answer; otherwise a label that begins another
    label would always have the higher score. It is the chat template's end of turn, the stop token of
    a tuned model, or the end of the line.

    Args:
        llm: The model.
        task: The task.
        shots: Selects the solved examples that the prompt shows before each input; None: none.
        wording: How the prompt is put together; None: `default_wording`, and for a tuned model the form of the rows
            that it was tuned on.
        offsets: What is added to the log-probability of each label, see `tercet.evaluate.calibration`; None: nothing.
        tuned: Whether the model was tuned to end its answers with a stop token.
    """

    def __init__(
        self,
        llm: LanguageModel,
        task: Task,
        *,
        shots: ShotSelector | None = None,
        wording: Wording | None = None,
        offsets: Sequence[float] | None = None,
        tuned: bool = False,
    ) -> None:
        self.llm, self.task, self.shots, self.tuned, self.offsets = llm, task, shots, tuned, offsets
        self.wording = wording or (plain_wording(llm) if tuned else default_wording(llm, task))
        self.scores_labels = task.labels is not None and llm.is_local
        self._in_turns = self.wording.form == "conversation"
        self.ending = "" if tuned else "\n"
        if self._in_turns:
            self.ending = "" if llm.tokenizer is None else _end_of_turn(llm.tokenizer)
        self.room: int | None = None  # tokens that a prompt may have; None if the context is unknown
        if llm.context_length is not None:
            self.room = prompt_room(
                task, llm.context_length, llm.count_tokens, labels_scored=self.scores_labels
            )

    def prompt(self, text: str, query: str | None = None) -> Prompt:
        """Return the text or conversation that the model is given.

        Args:
            text: The rendered input.
            query: What shots are chosen for (``task.input_text``); None: the rendered input.
        """
        shots = () if self.shots is None else self.shots.choose(text if query is None else query)
        return self.wording.prompt(self.task, text, shots)

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """Return one answer for each example, in order."""
        if not examples:
            return []
        prompts, shortened = self.prompts(examples)
        answers = self._choose(prompts) if self.scores_labels else self._generate(prompts)
        return [replace(answer, shortened=short) for answer, short in zip(answers, shortened, strict=True)]

    def prompts(self, examples: Sequence[Example]) -> tuple[list[Prompt], list[bool]]:
        """Return the prompt of each example, and whether its input was shortened to fit the context."""
        queries = [self.task.input_text(example.fields) for example in examples]
        shots = self.shots.choose_all(queries) if self.shots is not None else [[] for _ in queries]
        made = [self._prompt(example, own) for example, own in zip(examples, shots, strict=True)]
        return [prompt for prompt, _ in made], [shortened for _, shortened in made]

    def label_scores(self, examples: Sequence[Example]) -> Floats:
        """Return the log-probability of every label after the prompt of every example, [examples, labels].

        The offsets are not added.

        Raises:
            UserError: The task has no labels, or the model is hosted.
        """
        return self._label_scores(self.prompts(examples)[0])

    def content_free_scores(self) -> Floats:
        """Return what `label_scores` returns, for inputs without content, with every field replaced."""
        texts = [
            self.task.render(dict.fromkeys(self.task.prompt.fields, content)) for content in CONTENT_FREE
        ]
        return self._label_scores([self.prompt(text, query=text) for text in texts])

    def size_bytes(self) -> int | None:
        """Return the size of the model's files; None for a hosted model."""
        return None if self.llm.directory is None else model_bytes(self.llm.directory)

    def _prompt(self, example: Example, shots: Sequence[Shot]) -> tuple[Prompt, bool]:
        """Return the prompt of an example after its shots, and whether the input was shortened."""
        if self.room is None:
            return self.wording.prompt(self.task, self.task.render(example.fields), shots), False
        text, shortened = shorten_input(
            self.task,
            example.fields,
            lambda text: self.llm.count_tokens(self.wording.prompt(self.task, text, shots)),
            self.room,
        )
        return self.wording.prompt(self.task, text, shots), shortened

    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        # A text has no end of turn. The prompt shows answers of one line each.
        stop: dict[str, Any] = {} if self._in_turns or self.tuned else {"stop": ("\n",)}
        completions = self.llm.batch(prompts, max_tokens=self.task.max_tokens, temperature=0.0, **stop)
        return [self._read(completion) for completion in completions]

    def _choose(self, prompts: Sequence[Prompt]) -> list[Answer]:
        labels = self.task.labels
        assert labels is not None
        opened, choices = self._choices(prompts)
        best = self.llm.best_choice(opened, choices, offsets=self.offsets, end=self._scores_end)
        longest = max(self.llm.count_tokens(choice) for choice in choices[0])
        return [
            Answer(labels[index], self.llm.count_tokens(prompt), longest)
            for prompt, index in zip(opened, best, strict=True)
        ]

    def _label_scores(self, prompts: Sequence[Prompt]) -> Floats:
        if not self.scores_labels:
            raise UserError("only the labels of a closed task can be scored, and only by a local model")
        opened, choices = self._choices(prompts)
        return np.array(self.llm.choose(opened, choices, end=self._scores_end))

    @property
    def _scores_end(self) -> bool:
        return self.tuned and not self._in_turns

    def _choices(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[list[str]]]:
        """Return the prompts, and what is scored after each: the labels with what stands around them."""
        opened, choices = [], []
        for prompt in prompts:
            stem, opening = self._opened(prompt)
            opened.append(stem)
            choices.append([opening + label + self.ending for label in self.task.labels or ()])
        return opened, choices

    def _opened(self, prompt: Prompt) -> tuple[Prompt, str]:
        """Return a prompt and the text between it and the answer, which is scored with the answer.

        In a conversation the answer is a message of its own; in plain text a space separates it from the prompt. A
        space that ends the prompt of a task is moved to the answer, since most vocabularies join it to the next
        word; but a tuned model has learned to answer the prompt as it is.
        """
        if not isinstance(prompt, str):
            return prompt, ""
        stem = prompt if self.tuned else prompt.rstrip(" ")
        return (stem, prompt[len(stem) :]) if stem and stem != prompt else (prompt, separator(prompt))

    def _read(self, completion: Completion) -> Answer:
        usage = completion.usage
        text = completion.text.strip()
        if self.task.labels is not None:
            text = nearest_label(text, self.task.labels)
        seconds = None if self.llm.is_local else completion.seconds
        return Answer(text, usage.prompt_tokens, usage.completion_tokens, usage.cost, seconds)


def _end_of_turn(tokenizer: Tokenizer) -> str:
    """Return the text that ends an assistant's turn in the chat template; "" if there is none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        return mask_conversation(tokenizer, messages)[0].spans[-1].stop
    except UserError:
        return ""  # the model still answers with a template that cannot be used for training


def nearest_label(text: str, labels: Sequence[str]) -> str:
    """Return the label that a generated answer names; the answer itself if it names none or several.

    The label is the whole answer, or the only label that occurs in it; case does not matter.
    """
    bare = text.strip().strip(".\"'`*").casefold()
    for label in labels:
        if bare == label.casefold():
            return label
    mentioned = [label for label in labels if re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", bare)]
    # "internet protocols" contains "internet" too; the longer label is the answer.
    mentioned = [a for a in mentioned if not any(a != b and a.casefold() in b.casefold() for b in mentioned)]
    return mentioned[0] if len(mentioned) == 1 else text


def as_shots(task: Task, examples: Sequence[Example]) -> list[Shot]:
    """Return examples as shots: rendered input, target, and the text that retrieval compares."""
    return [
        Shot(task.render(example.fields), example.target, task.input_text(example.fields))
        for example in examples
    ]
