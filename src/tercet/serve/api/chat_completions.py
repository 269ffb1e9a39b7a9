"""/v1/chat/completions: the next message of a conversation, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from tercet.data.prompt_tokens import RESERVED
from tercet.engine.request import Completion, Sampling
from tercet.serve.api.chat_messages import Message, answer_ending, note_names, template_form
from tercet.serve.api.field_table import Hint, Ignored, Refused, Used, WhereKnown, ignored_of
from tercet.serve.api.fields import (
    NO_CACHE_SETTINGS,
    NO_TIERS,
    NOT_STORED,
    ParallelCalls,
    SamplingBody,
    TokenLimit,
    ToolChoice,
    Tools,
    User,
    answer_limit,
    new_id,
    total_usage,
)
from tercet.serve.api.generation import Step, steps
from tercet.serve.api.hosted import pass_on
from tercet.serve.api.logprobs import Aligned, Placed, chat_logprobs
from tercet.serve.api.offered_tools import offered_tools
from tercet.serve.api.reasoning import knows, reasoning_variables
from tercet.serve.api.response_format import ResponseFormat, answer_grammar
from tercet.serve.errors import invalid_value, unsupported
from tercet.serve.models import Models, Served
from tercet.serve.streaming import DONE, STREAMED, event, event_stream, while_connected
from tercet.serve.tools.answer import CallDelta, Piece, gather
from tercet.serve.tools.messages import checked_messages
from tercet.serve.tools.plan import ToolPlan, plan_tools
from tercet.serve.tools.request import read_tools
from tercet.serve.worker import Reading

router = APIRouter()


class ChatBody(SamplingBody):
    """OpenAI's request."""

    messages: Annotated[
        Annotated[list[Message], Field(min_length=1)],
        Used("the conversation; the roles are developer, system, user, assistant and tool"),
    ]
    max_tokens: Annotated[TokenLimit, Used("-1 or none: the answer may fill the context")] = None
    max_completion_tokens: Annotated[TokenLimit, Used("takes precedence over `max_tokens`")] = None
    logprobs: Annotated[
        bool | None,
        Used(
            "the joined tokens are the text (joined `bytes`, where several tokens form one character); not "
            "together with tools"
        ),
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, Used("0 to 20, with `logprobs: true`")
    ] = None
    response_format: Annotated[
        ResponseFormat | None,
        Used("`json_object` and `json_schema` are enforced token by token, with or without `strict`"),
    ] = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: ParallelCalls = None
    modalities: Annotated[list[str] | None, Refused("models of this server write text", (["text"],))] = None
    reasoning_effort: Annotated[str | None, WhereKnown("passed to a chat template that knows it")] = None
    # Not OpenAI's: as vLLM calls them.
    continue_final_message: Annotated[
        bool | None, Used("the answer continues the last message, which is usually the assistant's")
    ] = None
    add_generation_prompt: Annotated[
        bool | None,
        Used(
            "true: the prompt ends with the beginning of a message, even after an assistant's message; false: it "
            "ends with the last message; a conversation that ends with an assistant's message needs this or "
            "`continue_final_message`"
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Used("variables of the chat template; one that the template does not mention is refused"),
    ] = None
    # Hints
    verbosity: Annotated[
        Any, Hint("no model of this server has this setting; describe the length in the prompt", ("medium",))
    ] = None
    metadata: Annotated[Any, NOT_STORED] = None
    store: Annotated[Any, NOT_STORED] = None
    service_tier: Annotated[Any, NO_TIERS] = None
    safety_identifier: User = None
    prompt_cache_key: Annotated[Any, NO_CACHE_SETTINGS] = None
    prompt_cache_retention: Annotated[Any, NO_CACHE_SETTINGS] = None
    prompt_cache_options: Annotated[Any, NO_CACHE_SETTINGS] = None
    prediction: Annotated[Any, Hint("it changes the speed of an answer only")] = None
    web_search_options: Annotated[Any, Hint("this server does not search the web")] = None
    # Refused
    audio: Annotated[Any, Refused("models of this server read and write text")] = None
    functions: Annotated[Any, Refused("it is deprecated; use tools")] = None
    function_call: Annotated[Any, Refused("it is deprecated; use tool_choice")] = None
    moderation: Annotated[Any, Refused("this server has no moderation")] = None


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
    if served.hosted is not None:
        return await pass_on(request, served, "/chat/completions", body)
    chat = await prepare(served, body, ignored_of(request))
    if body.stream:
        reading = Reading()
        return await event_stream(request, _chunks(chat, body.usage_chunk, reading), reading=reading)
    return JSONResponse(await while_connected(request, _whole(chat)))


# The request


async def prepare(served: Served, body: ChatBody, ignored: Ignored) -> Chat:
    """Check the request and render its prompt. APIError 400 for everything that is not supported.

    ignored: receives the fields that have no effect.
    """
    body.review(ignored)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid_value("top_logprobs", "needs logprobs: true")
    worker = served.worker
    form = await answer_grammar(body.response_format)
    offered, choice = offered_tools(body.tools, body.tool_choice, ignored)
    tools = read_tools(offered, choice, body.parallel_tool_calls)
    plan = await asyncio.to_thread(plan_tools, tools, served.tokenizer, form)
    if body.logprobs and plan.form is not None:
        raise unsupported(
            "logprobs",
            "it cannot be combined with tools, because tool calls are not text; leave one of them out",
        )
    variables = _template_variables(served, body, ignored)
    ending = answer_ending(body.messages, body.continue_final_message, body.add_generation_prompt)

    if not knows(served, "reasoning_content"):
        for number, message in enumerate(body.messages):
            if message.reasoning_content:
                where = f"messages[{number}].reasoning_content"
                ignored.add(where, "this model's chat template does not show earlier reasoning")

    def render() -> list[int]:
        messages = checked_messages(template_form(body.messages))
        note_names(served, messages, plan.tools, ignored)
        return served.prompt_tokens(messages, plan.tools, ending=ending, **variables)

    # Rendering and encoding a long conversation takes a while; other requests do not wait for it.
    tokens = await asyncio.to_thread(render)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    limit = answer_limit(served, tokens, max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    samplings = [body.sampling(served, limit, logprobs, number) for number in range(body.n or 1)]
    if len(samplings) > worker.engine.max_waiting:
        raise invalid_value("n", f"is {body.n}; this server accepts at most {worker.engine.max_waiting}")
    return Chat(served, tokens, samplings, plan, new_id("chatcmpl"), int(time.time()))


def _template_variables(served: Served, body: ChatBody, ignored: Ignored) -> dict[str, Any]:
    """Return the template's variables beside messages and tools. APIError for those that it never reads."""
    variables = dict(body.chat_template_kwargs or {})
    for name in variables:
        if name in (*RESERVED, "documents") or not knows(served, name):
            raise unsupported(
                f"chat_template_kwargs.{name:.60}", "this model's chat template has no such variable"
            )
    return reasoning_variables(served, body.reasoning_effort, "reasoning_effort", ignored) | variables


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


async def _chunks(chat: Chat, usage_chunk: bool, reading: Reading) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream: for each choice its role, at once, then its pieces and its end."""
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
        steps(chat.served, chat.tokens, chat.samplings, chat.plan, whole=False, reading=reading)
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
