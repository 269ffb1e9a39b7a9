"""Inputs that are too long for a model: shortened the same way when it is tuned and when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tercet.errors import UserError
from tercet.evaluate.task import Task

ELLIPSIS = " ... "
SPARE = 4  # tokens for what ends an answer


def answer_room(task: Task, limit: int, count_tokens: Callable[[str], int], *, labels_scored: bool) -> int:
    """Tokens of a context of ``limit`` that the prompt may take, so that the answer fits behind it."""
    if task.labels is not None and labels_scored:
        answer = max(count_tokens(label) for label in task.labels) + SPARE
    else:
        answer = task.max_tokens
    return limit - min(answer, limit // 2) - 1


def fitted_input(
    task: Task, fields: Mapping[str, Any], prompt_tokens: Callable[[str], int], room: int
) -> tuple[str, bool]:
    """The rendered input, and whether it had to be shortened to a prompt of ``room`` tokens.

    The middle of the longest field goes: what a text is about tends to stand at its ends.

    prompt_tokens: tokens of the whole prompt that is made of a rendered input.

    Raises:
        UserError: it does not fit with next to nothing left of the field.
    """
    text = task.render(fields)
    if prompt_tokens(text) <= room:
        return text, False
    name = max(task.prompt.fields, key=lambda name: len(str(fields[name])))
    value = str(fields[name])
    keep = len(value)
    while keep > 8:
        keep = int(keep * 0.85)
        head, tail = value[: (keep + 1) // 2], value[len(value) - keep // 2 :]
        text = task.render({**fields, name: head + ELLIPSIS + tail})
        if prompt_tokens(text) <= room:
            return text, True
    raise UserError(
        f"the prompt does not fit: with next to nothing of {name!r} it has {prompt_tokens(text)} tokens, and the "
        f"model's context leaves {room} for it; shorten the prompt or show fewer examples"
    )
