"""Prompts name the labels of a closed task, once."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.data.fewshot import Example as Shot
from tercet.evaluate.task import Task
from tercet.evaluate.wording import Wording, default_wording, plain_wording, wordings

LISTED = "Answer with exactly one of these and nothing else: ham, eggs."


class Model:
    """A model of which only the form of its prompts is known."""

    def __init__(self, chat: bool = True, context: int | None = 1000, local: bool = True) -> None:
        self.has_chat_template, self.context_length, self.is_local = chat, context, local

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())


def closed(prompt: str = "{text}:", system: str | None = None, labels: Any = ("ham", "eggs")) -> Task:
    rows = [
        {"text": f"{number}{label[0]}", "label": label}
        for number in range(30)
        for label in labels or ("ham",)
    ]
    return Task.from_rows("closed", rows, prompt=prompt, target="label", labels=labels, system=system)


def test_a_closed_task_tells_the_model_its_labels_in_the_default() -> None:
    wording = default_wording(Model(), closed())  # type: ignore[arg-type]
    assert wording.prompt(closed(), "a:", [Shot("b:", "eggs")]) == [
        {"role": "system", "content": LISTED},
        {"role": "user", "content": "b:"},
        {"role": "assistant", "content": "eggs"},
        {"role": "user", "content": "a:"},
    ]
    base = default_wording(Model(chat=False), closed())  # type: ignore[arg-type]
    assert base.prompt(closed(), "a:", [Shot("b:", "eggs")]) == f"{LISTED}\n\nb: eggs\n\na:"


def test_the_tasks_own_instruction_comes_first() -> None:
    task = closed(system="You sort food.")
    [system, _] = Wording("conversation", "instruction").prompt(task, "a:")
    assert isinstance(system, dict) and system["content"] == f"You sort food.\n{LISTED}"


@pytest.mark.parametrize(
    "task", [closed("Is it Ham or EGGS? {text}"), closed(system="Say ham or eggs."), closed(labels=None)]
)
def test_labels_are_not_listed_twice_nor_for_an_open_task(task: Task) -> None:
    model: Any = Model()
    assert default_wording(model, task) == plain_wording(model) == Wording("conversation")
    assert wordings(model, task) == [Wording("conversation"), Wording("text")]


def test_a_label_inside_another_word_is_not_named() -> None:
    model: Any = Model()
    assert default_wording(model, closed("hamster and eggs: {text}")).labels == "instruction"


def test_a_list_that_takes_much_of_the_context_is_left_out() -> None:
    model: Any = Model(context=20)
    assert default_wording(model, closed()).labels == "none"


def test_the_default_is_the_first_wording_and_all_differ() -> None:
    for chat, count in ((True, 5), (False, 2)):
        model: Any = Model(chat)
        found = wordings(model, closed())
        assert found[0] == default_wording(model, closed())
        assert len(set(found)) == len({str(wording) for wording in found}) == count
        assert len({str(wording.prompt(closed(), "a:")) for wording in found}) == count
