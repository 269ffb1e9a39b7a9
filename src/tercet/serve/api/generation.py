"""Generate answers to checked conversations: the part that all chat protocols share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from tercet.engine.request import Completion, Request, Sampling, TokenLogprob
from tercet.serve.errors import invalid_answer
from tercet.serve.models import Served
from tercet.serve.tools.answer import Piece
from tercet.serve.tools.messages import checked_messages
from tercet.serve.tools.plan import ToolPlan
from tercet.serve.worker import Reading


@dataclass(frozen=True)
class Step:
    """The next part of one choice.

    index: which choice.
    pieces: content and tool calls, in order.
    logprobs: of the tokens that have come; None unless requested.
    completion: the whole choice, in its last step.
    text: the new text, before it was split into pieces; "" from other servers.
    """

    index: int
    pieces: list[Piece]
    logprobs: list[TokenLogprob] | None
    completion: Completion | None = None
    text: str = ""


def chat_tokens(
    served: Served, messages: Sequence[Mapping[str, Any]], plan: ToolPlan, **variables: Any
) -> list[int]:
    """Return the tokens of a conversation with earlier calls and tools. APIError 400 as `prompt_tokens`."""
    return served.prompt_tokens(checked_messages(messages), plan.tools, **variables)


def content(pieces: Sequence[Piece]) -> str:
    """Return the content among an answer's pieces."""
    return "".join(piece for piece in pieces if isinstance(piece, str))


async def steps(
    served: Served,
    tokens: Sequence[int],
    samplings: Sequence[Sampling],
    plan: ToolPlan,
    *,
    whole: bool,
    reading: Reading | None = None,
    thoughts: bool = False,
) -> AsyncGenerator[Step, None]:
    """Yield one answer for each of ``samplings`` as they come; closing the iterator ends them in the engine.

    Args:
        served: the model.
        tokens: the prompt.
        samplings: the settings of each choice.
        plan: the tools.
        whole: the answer is sent at its end, so that a malformed call can be content to its last character.
        reading: kept up to date; with it the first step is empty, and comes before the prompt is read.
        thoughts: return reasoning as pieces of its own.

    Raises:
        QueueFull: with the first step, as `Worker.stream`.
        UserError: likewise.
        APIError: 400, with the last step of an answer that is not valid under its schema.
    """
    plan = plan.after(tokens)
    if thoughts:
        plan = plan.telling_thoughts(served.tokenizer, tokens)
    requests = [
        Request(tuple(tokens), sampling, plan.constraint, adapter=served.adapter) for sampling in samplings
    ]
    parsers = [plan.parser(whole=whole) for _ in requests]
    written: list[list[Piece]] = [[] for _ in requests]
    begun = reading is None
    async with aclosing(served.worker.stream(requests, reading)) as deltas:
        async for delta in deltas:
            if not begun:
                begun = True
                yield Step(delta.index, [], None)
            parser = parsers[delta.index]
            pieces = parser.push(delta)
            if delta.completion is not None:
                pieces += parser.finish()
            written[delta.index] += pieces
            ended = delta.completion is not None and delta.completion.finish_reason == "stop"
            if ended and (reason := plan.violation(written[delta.index])):
                raise invalid_answer(reason)
            if pieces or delta.logprobs or delta.completion is not None:
                yield Step(delta.index, pieces, delta.logprobs, delta.completion, delta.text)
