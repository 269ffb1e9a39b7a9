"""Answer the examples of a task with a language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tercet.data.chat_mask import mask_conversation
from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import few_shot_messages, few_shot_text, separator
from tercet.engine.request import Completion
from tercet.errors import UserError
from tercet.evaluate.language_model import LanguageModel, Prompt
from tercet.evaluate.shorten import prompt_room, shorten_input
from tercet.evaluate.task import Example, Task
from tercet.files import directory_size
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
        shots: solved examples that the prompt shows before each input.
        tuned: whether the model was tuned to end its answers with a stop token.
    """

    def __init__(
        self, llm: LanguageModel, task: Task, *, shots: Sequence[Shot] = (), tuned: bool = False
    ) -> None:
        self.llm, self.task, self.shots, self.tuned = llm, task, list(shots), tuned
        self.scores_labels = task.labels is not None and llm.is_local
        self.ending = "" if tuned else "\n"
        if llm.has_chat_template:
            self.ending = "" if llm.tokenizer is None else _end_of_turn(llm.tokenizer)
        self.room: int | None = None  # tokens that a prompt may have; None if the context is unknown
        if llm.context_length is not None:
            self.room = prompt_room(
                task, llm.context_length, llm.count_tokens, labels_scored=self.scores_labels
            )

    @property
    def instruction(self) -> str:
        """The system message: the task's own and, for a model that generates, the list of labels."""
        parts = [self.task.system] if self.task.system else []
        if self.task.labels is not None and not self.scores_labels:
            parts.append(f"Answer with exactly one of these and nothing else: {', '.join(self.task.labels)}.")
        return "\n".join(parts)

    def prompt(self, text: str) -> Prompt:
        """Return the text or conversation that the model is given for a rendered input."""
        if self.llm.has_chat_template:
            return few_shot_messages(self.shots, text, self.instruction)
        return few_shot_text(self.shots, text, self.instruction)

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """Return one answer for each example, in order."""
        if not examples:
            return []
        inputs = [self._input(example) for example in examples]
        prompts = [self.prompt(text) for text, _ in inputs]
        answers = self._choose(prompts) if self.scores_labels else self._generate(prompts)
        return [
            replace(answer, shortened=shortened)
            for answer, (_, shortened) in zip(answers, inputs, strict=True)
        ]

    def size_bytes(self) -> int | None:
        """Return the size of the model's files; None for a hosted model."""
        return None if self.llm.directory is None else directory_size(self.llm.directory)

    def _input(self, example: Example) -> tuple[str, bool]:
        if self.room is None:
            return self.task.render(example.fields), False
        return shorten_input(
            self.task, example.fields, lambda text: self.llm.count_tokens(self.prompt(text)), self.room
        )

    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        # A base model has not learned to end an answer. The prompt shows answers of one line each.
        stop: dict[str, Any] = {} if self.llm.has_chat_template or self.tuned else {"stop": ("\n",)}
        completions = self.llm.batch(prompts, max_tokens=self.task.max_tokens, temperature=0.0, **stop)
        return [self._read(completion) for completion in completions]

    def _choose(self, prompts: Sequence[Prompt]) -> list[Answer]:
        labels = self.task.labels
        assert labels is not None
        prompts, openings = zip(*(self._opened(prompt) for prompt in prompts), strict=True)
        choices = [[opening + label + self.ending for label in labels] for opening in openings]
        scores = self.llm.choose(prompts, choices, end=self.tuned and not self.llm.has_chat_template)
        longest = max(self.llm.count_tokens(choice) for choice in choices[0])
        answers = []
        for prompt, row in zip(prompts, scores, strict=True):
            best = max(range(len(labels)), key=row.__getitem__)
            answers.append(Answer(labels[best], self.llm.count_tokens(prompt), longest))
        return answers

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
    """Return examples as pairs of rendered input and target."""
    return [Shot(task.render(example.fields), example.target) for example in examples]
