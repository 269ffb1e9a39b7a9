"""How a prompt is put together: as a conversation or a text, and where it names the labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tercet.data.fewshot import Example as Shot
from tercet.data.fewshot import few_shot_messages, few_shot_text
from tercet.evaluate.language_model import LanguageModel, Prompt
from tercet.evaluate.task import Task

Form = Literal["conversation", "text"]
Place = Literal["none", "instruction", "question"]

LISTED_SHARE = 0.25  # of the context that a list of labels may take


@dataclass(frozen=True)
class Wording:
    """The form of a prompt.

    Attributes:
        form: a conversation in the model's chat template, or a text that the model continues.
        labels: where the labels are named: nowhere, in the instruction before everything (the system message of a
            conversation), or after the input, which only a conversation allows: a text to continue ends there.
    """

    form: Form
    labels: Place = "none"

    def __str__(self) -> str:
        form = "a conversation" if self.form == "conversation" else "a text to continue"
        place = {
            "none": "no list of labels",
            "instruction": "labels listed at the beginning",
            "question": "labels listed after the input",
        }
        return f"{form}, {place[self.labels]}"

    def prompt(self, task: Task, text: str, shots: Sequence[Shot] = ()) -> Prompt:
        """Return the prompt for a rendered input, after solved examples."""
        instruction = task.system or ""
        if self.labels == "instruction":
            instruction = f"{instruction}\n{_listed(task)}".strip()
        elif self.labels == "question":
            text = f"{text}\n{_listed(task)}"
        if self.form == "conversation":
            return few_shot_messages(shots, text, instruction)
        return few_shot_text(shots, text, instruction)


def _listed(task: Task) -> str:
    return f"Answer with exactly one of these and nothing else: {', '.join(task.labels or ())}."


def default_wording(llm: LanguageModel, task: Task) -> Wording:
    """Return the wording that is used where none was chosen: a closed task tells the model its labels."""
    form: Form = "conversation" if llm.has_chat_template else "text"
    return Wording(form, "instruction" if _needs_list(llm, task) else "none")


def plain_wording(llm: LanguageModel) -> Wording:
    """Return the wording without a list of labels, in the form of the rows that a model is tuned on."""
    return Wording("conversation" if llm.has_chat_template else "text")


def wordings(llm: LanguageModel, task: Task) -> list[Wording]:
    """Return the wordings to choose among, the default first.

    Which is best differs between models and tasks: a list of labels helps a large model and misleads a small one
    towards those that it read last, and a chat model may know more of a label in plain text.
    """
    forms: list[Form] = ["conversation", "text"] if llm.has_chat_template else ["text"]
    places: list[Place] = ["instruction", "none", "question"] if _needs_list(llm, task) else ["none"]
    ordered = [
        Wording(form, place) for place in places for form in forms if (form, place) != ("text", "question")
    ]
    return sorted(ordered, key=lambda wording: wording != default_wording(llm, task))


def _needs_list(llm: LanguageModel, task: Task) -> bool:
    """Return whether a list of labels says something new and leaves enough of the context."""
    if task.labels is None or _names_all(f"{task.system or ''}\n{task.prompt.text}", task.labels):
        return False
    if llm.context_length is None or not llm.is_local:
        return True
    return llm.count_tokens(_listed(task)) <= LISTED_SHARE * llm.context_length


def _names_all(text: str, labels: Sequence[str]) -> bool:
    folded = text.casefold()
    return all(re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", folded) for label in labels)
