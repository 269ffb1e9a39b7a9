"""Answers of hosted models for protocols that their servers do not support.

The conversation is sent as a chat completion, and the answer becomes the same steps as that of a local model.
So an Anthropic client can use any server of OpenAI's protocol.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request

from tercet.engine.request import Completion, FinishReason, Usage
from tercet.serve.api.generation import Step
from tercet.serve.api.hosted import bad_gateway, chat_chunks
from tercet.serve.models import Served
from tercet.serve.tools.answer import CallDelta, Piece, Thought
from tercet.serve.tools.request import ToolRequest

Json = dict[str, Any]


def chat_payload(
    served: Served,
    messages: Sequence[Json],
    tools: ToolRequest,
    max_tokens: int | None,
    fields: Mapping[str, Any],
) -> Json:
    """Return the body of a chat completion. ``fields``: its other fields; those with None are not sent."""
    assert served.hosted is not None
    payload: Json = {"messages": list(messages), **fields}
    payload[served.hosted.max_tokens_field] = max_tokens
    if tools.functions:
        payload["tools"] = []
        for function in tools.functions:
            tool = function.for_template()
            if function.strict:
                tool["function"]["strict"] = True
            payload["tools"].append(tool)
        payload["tool_choice"] = (
            tools.mode if tools.only is None else {"type": "function", "function": {"name": tools.only}}
        )
        if tools.parallel is False:
            payload["parallel_tool_calls"] = False
    return {name: value for name, value in payload.items() if value is not None}


async def hosted_steps(
    request: Request, served: Served, payload: Json, *, thoughts: bool = False
) -> AsyncGenerator[Step, None]:
    """Yield the answer as it comes; the last step has a completion without text or tokens.

    The first step comes with the other server's first chunk, which may be empty. Reasoning is left out, unless
    ``thoughts``.

    Raises:
        APIError: the other server's error, or 502 where its answer cannot be understood.
    """
    began = time.perf_counter()
    usage, reason, answered = Usage(0, 0), None, False
    begun: set[int] = set()  # indices of calls
    async with aclosing(chat_chunks(request, served, payload)) as chunks:
        async for chunk in chunks:
            usage = _usage(chunk.get("usage")) or usage
            try:
                choices = chunk.get("choices") or []
                deltas = [choice.get("delta") or {} for choice in choices]
                pieces = [piece for delta in deltas for piece in _pieces(delta, begun)]
                if thoughts:
                    pieces = [*filter(None, map(_thought, deltas)), *pieces]
                reason = next(
                    (choice["finish_reason"] for choice in choices if choice.get("finish_reason")), reason
                )
            except (AttributeError, KeyError, TypeError) as problem:
                raise bad_gateway("the model's server did not answer in OpenAI's protocol") from problem
            if pieces or not answered:
                answered = True
                yield Step(0, pieces, None)
    if reason is None:
        raise bad_gateway("the model's server ended in the middle of the answer")
    if reason == "content_filter":
        raise bad_gateway("the content filter of the model's server stopped the answer")
    ended: FinishReason = "length" if reason == "length" else "stop"
    yield Step(0, [], None, Completion("", [], None, usage, ended, time.perf_counter() - began))


def _thought(delta: Mapping[str, Any]) -> Thought:
    """Return the reasoning in a delta, as vLLM, llama.cpp and OpenRouter name it; "" where there is none."""
    return Thought(delta.get("reasoning_content") or delta.get("reasoning") or "")


def _pieces(delta: Mapping[str, Any], begun: set[int]) -> list[Piece]:
    text = delta.get("content") or delta.get("refusal")
    pieces: list[Piece] = [str(text)] if text else []
    for call in delta.get("tool_calls") or []:
        index, function = int(call["index"]), call.get("function") or {}
        first = index not in begun
        begun.add(index)
        name = str(function.get("name") or "") if first else None
        arguments = str(function.get("arguments") or "")
        pieces.append(
            CallDelta(index, str(call.get("id") or f"call_{index}") if first else None, name, arguments)
        )
    return pieces


def _usage(reported: object) -> Usage | None:
    if not isinstance(reported, dict):
        return None
    counts = [reported.get(name) for name in ("prompt_tokens", "completion_tokens")]
    read, written = (count if isinstance(count, int) else 0 for count in counts)
    return Usage(read, written)
