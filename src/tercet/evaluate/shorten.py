"""Shorten inputs that are too long for a model, in the same way for tuning and for answering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tercet.errors import UserError
from tercet.evaluate.task import Task

ELLIPSIS = " ... "
SPARE = 4  # tokens for the text that ends an answer


def prompt_room(task: Task, context: int, count_tokens: Callable[[str], int], *, labels_scored: bool) -> int:
    """Return how many tokens of a context the prompt may use, so that the answer fits after it.

    Args:
        task: whose answer must fit.
        context: tokens that the model takes, prompt and answer together.
        count_tokens: returns the number of tokens of a text.
        labels_scored: whether the answer is the likeliest label, and not generated text.
    """
    if task.labels is not None and labels_scored:
        answer = max(count_tokens(label) for label in task.labels) + SPARE
    else:
        answer = task.max_tokens
    return context - min(answer, context // 2) - 1


def shorten_input(
    task: Task, fields: Mapping[str, Any], prompt_tokens: Callable[[str], int], room: int
) -> tuple[str, bool]:
    """Return the rendered input, and whether it was shortened to give a prompt of ``room`` tokens.

    The middle of the longest field is cut out, because the ends of a text tend to say what it is about.

    Args:
        task: renders the input.
        fields: of the example.
        prompt_tokens: returns the number of tokens of the whole prompt made of a rendered input.
        room: as from `prompt_room`.

    Raises:
        UserError: the prompt does not fit even with 8 characters of the field.
    """
    text = task.render(fields)
    if prompt_tokens(text) <= room:
        return text, False
    name = max(task.prompt.fields, key=lambda name: len(str(fields[name])))
    value = str(fields[name])
    length = len(value)
    while length > 8:
        length = int(length * 0.85)
        head, tail = value[: (length + 1) // 2], value[len(value) - length // 2 :]
        text = task.render({**fields, name: head + ELLIPSIS + tail})
        if prompt_tokens(text) <= room:
            return text, True
    raise UserError(
        f"the prompt does not fit into the model's context: with {length} characters of the field {name!r} it has "
        f"{prompt_tokens(text)} tokens, and the context has room for {room}; shorten the prompt or show fewer examples"
    )
