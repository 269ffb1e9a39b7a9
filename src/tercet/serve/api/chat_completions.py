"""/v1/chat/completions: the next message of a conversation, whole or as a stream."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from tercet.engine.request import Completion, Sampling
from tercet.serve.api.chat_messages import Message, check_names, template_form
from tercet.serve.api.fields import (
    SamplingBody,
    answer_limit,
    new_id,
    refuse,
    total_usage,
)
from tercet.serve.api.generation import Step, steps
from tercet.serve.api.hosted import pass_on
from tercet.serve.api.logprobs import Aligned, Placed, chat_logprobs
from tercet.serve.api.response_format import ResponseFormat, answer_grammar
from tercet.serve.errors import invalid_value, unsupported
from tercet.serve.models import Models, Served
from tercet.serve.streaming import DONE, STREAMED, event, event_stream, while_connected
from tercet.serve.tools.answer import CallDelta, Piece, gather
from tercet.serve.tools.messages import template_messages
from tercet.serve.tools.plan import ToolPlan, plan_tools
from tercet.serve.tools.request import read_tools

router = APIRouter()

_REFUSED = {
    "audio": "models of this server read and write text",
    "functions": "it is deprecated; use tools",
    "function_call": "it is deprecated; use tool_choice",
    "moderation": "this server has no moderation",
    "web_search_options": "this server does not search the web",
}
# Names that the renderer itself passes to a template or takes as arguments.
_OWN = ("messages", "tools", "documents", "add_generation_prompt", "template", "special_tokens", "self")


class ChatBody(SamplingBody):
    """OpenAI's request. The fields below ``Without effect`` never change an output."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    reasoning_effort: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    # Not OpenAI's: variables for the chat template, as vLLM calls them.
    chat_template_kwargs: dict[str, Any] | None = None
    # Without effect
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    # Refused
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    moderation: Any = None
    web_search_options: Any = None


@dataclass(frozen=True)
class Chat:
    """One request, ready for the engine.

    tokens: the prompt.
    samplings: the settings of each choice.
    """

    served: Served
    tokens: list[int]
    samplings: list[Sampling]
    plan: ToolPlan
    id: str
    created: int

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer includes log-probabilities."""
        return self.samplings[0].logprobs is not None


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Return the next message of a conversation."""
    models: Models = request.app.state.models
    served = models.get(body.model)
    body.check_stream()
    if served.hosted is not None:
        return await pass_on(request, served, "/chat/completions", body)
    chat = await prepare(served, body)
    if body.stream:
        return await event_stream(request, _chunks(chat, body.usage_chunk))
    return JSONResponse(await while_connected(request, _whole(chat)))


# The request


async def prepare(served: Served, body: ChatBody) -> Chat:
    """Check the request and render its prompt. APIError 400 for everything that is not supported."""
    refuse(body, _REFUSED)
    _check_modes(body)
    worker = served.worker
    form = await answer_grammar(body.response_format)
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    plan = await asyncio.to_thread(plan_tools, tools, served.tokenizer, form)
    if body.logprobs and plan.form is not None:
        raise unsupported(
            "logprobs",
            "it cannot be combined with tools, because tool calls are not text; leave one of them out",
        )
    variables = _template_variables(served, body)

    def render() -> list[int]:
        messages = template_messages(template_form(body.messages), served.tokenizer)
        check_names(served, messages, plan.tools)
        return served.prompt_tokens(messages, plan.tools, **variables)

    # Rendering and encoding a long conversation takes a while; other requests do not wait for it.
    tokens = await asyncio.to_thread(render)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    limit = answer_limit(served, tokens, max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    samplings = [body.sampling(served, limit, logprobs, number) for number in range(body.n or 1)]
    if len(samplings) > worker.engine.max_waiting:
        raise invalid_value("n", f"is {body.n}; this server accepts at most {worker.engine.max_waiting}")
    return Chat(served, tokens, samplings, plan, new_id("chatcmpl"), int(time.time()))


def _check_modes(body: ChatBody) -> None:
    if body.modalities is not None and body.modalities != ["text"]:
        raise unsupported("modalities", "models of this server write text")
    if body.verbosity not in (None, "medium"):
        raise unsupported(
            "verbosity",
            "no model of this server has this setting; describe the length of the answer in the prompt",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid_value("top_logprobs", "needs logprobs: true")


def _template_variables(served: Served, body: ChatBody) -> dict[str, Any]:
    """Return the template's variables beside messages and tools. APIError for those that it never reads."""
    variables = dict(body.chat_template_kwargs or {})
    templates = "\n".join(served.tokenizer.templates.values())
    for name in variables:
        if name in _OWN or not re.search(rf"\b{re.escape(name)}\b", templates):
            raise unsupported(
                f"chat_template_kwargs.{name:.60}", "this model's chat template has no such variable"
            )
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in templates:
            raise unsupported("reasoning_effort", "this model's chat template has no such setting")
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return variables


# The answer


async def _whole(chat: Chat) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in chat.samplings]
    aligned = [Aligned() for _ in chat.samplings]
    logprobs: list[list[Placed]] = [[] for _ in chat.samplings]
    done: dict[int, Completion] = {}
    async with aclosing(
        steps(chat.served, chat.tokens, chat.samplings, chat.plan, whole=True)
    ) as answer_steps:
        async for step in answer_steps:
            pieces[step.index] += step.pieces
            if chat.with_logprobs:
                logprobs[step.index] += _aligned(aligned[step.index], step)
            if step.completion is not None:
                done[step.index] = step.completion
    choices = []
    for index, choice_pieces in enumerate(pieces):
        answer = gather(choice_pieces)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(logprobs[index], chat.served.tokenizer)
                if chat.with_logprobs
                else None,
                "finish_reason": finish_reason(done[index], bool(answer.calls)),
            }
        )
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.served.name,
        "system_fingerprint": chat.served.fingerprint,
        "service_tier": "default",
        "choices": choices,
        "usage": _usage(chat, done),
    }


async def _chunks(chat: Chat, usage_chunk: bool) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream: for each choice its role, its pieces, its end."""
    aligned = [Aligned() for _ in chat.samplings]
    called = [False] * len(chat.samplings)
    done: dict[int, Completion] = {}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(_chunk(chat, [choice], usage_chunk))

    opening = b"".join(
        chunk(index, {"role": "assistant", "content": ""}) for index in range(len(chat.samplings))
    )
    async with aclosing(
        steps(chat.served, chat.tokens, chat.samplings, chat.plan, whole=False)
    ) as answer_steps:
        async for step in answer_steps:
            parts, opening = [opening] if opening else [], b""
            tokens = _aligned(aligned[step.index], step) if chat.with_logprobs else []
            logprobs = chat_logprobs(tokens, chat.served.tokenizer) if tokens else None
            for piece in step.pieces:
                called[step.index] |= isinstance(piece, CallDelta)
                parts.append(chunk(step.index, _delta(piece), logprobs))
                logprobs = None
            if step.completion is not None:
                done[step.index] = step.completion
                reason = finish_reason(step.completion, called[step.index])
                parts.append(chunk(step.index, {}, logprobs, reason))
            if parts:
                yield b"".join(parts)
    last = b""
    if usage_chunk:
        last = event(_chunk(chat, [], True) | {"usage": _usage(chat, done)})
    yield last + DONE


def _chunk(chat: Chat, choices: list[dict[str, Any]], usage_chunk: bool) -> dict[str, Any]:
    head = {
        "id": chat.id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.served.name,
        "system_fingerprint": chat.served.fingerprint,
        "choices": choices,
    }
    return head | {"usage": None} if usage_chunk else head


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"content": piece}
    call: dict[str, Any] = {"index": piece.index}
    if piece.id is not None:  # in the first piece only: clients join the strings of all pieces
        call |= {"id": piece.id, "type": "function"}
    function = {"arguments": piece.arguments}
    if piece.name is not None:
        function = {"name": piece.name, **function}
    return {"tool_calls": [{**call, "function": function}]}


def _aligned(aligned: Aligned, step: Step) -> list[Placed]:
    text = "".join(piece for piece in step.pieces if isinstance(piece, str))
    return aligned.push(text, step.logprobs or (), step.completion is not None)


def finish_reason(completion: Completion, called: bool) -> str:
    """Return ``tool_calls`` only where the model ended the answer; ``length`` where it was cut off."""
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


def _usage(chat: Chat, done: dict[int, Completion]) -> dict[str, Any]:
    usages = [done[index].usage for index in range(len(chat.samplings))]
    return total_usage(len(chat.tokens), usages, len(usages))
