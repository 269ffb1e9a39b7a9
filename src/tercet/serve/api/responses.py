"""/v1/responses: OpenAI's Responses API, without storage.

It supports text and function tools, whole or as a stream.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.engine.request import Sampling
from tercet.serve.api.field_table import Ignored, ignored_of
from tercet.serve.api.fields import answer_limit, sampling_values
from tercet.serve.api.generation import Step, chat_tokens, content, steps
from tercet.serve.api.hosted_steps import chat_payload, hosted_steps
from tercet.serve.api.kept_items import KeptItems
from tercet.serve.api.logprobs import Aligned, chat_entry
from tercet.serve.api.offered_tools import offered_tools
from tercet.serve.api.reasoning import knows, reasoning_variables
from tercet.serve.api.response_events import Json, ResponseEvents
from tercet.serve.api.response_input import input_messages
from tercet.serve.api.response_requests import LOGPROBS, InputRequest, ResponseRequest, check_logprobs
from tercet.serve.api.typed_events import Events, discard, encode, encoded
from tercet.serve.errors import APIError, unsupported
from tercet.serve.models import Models, Served
from tercet.serve.streaming import STREAMED, event_stream, while_connected
from tercet.serve.tools.plan import ToolPlan, plan_tools
from tercet.serve.tools.request import ToolRequest, read_tools
from tercet.serve.worker import Reading

router = APIRouter()


@router.post("/v1/responses", responses=STREAMED)
async def create_response(request: Request, body: ResponseRequest) -> Response:
    """Answer ``input``."""
    models: Models = request.app.state.models
    served, ignored = models.get(body.model), ignored_of(request)
    body.review(ignored)
    asked = _read(request, served, body, ignored)
    check_logprobs(body, bool(asked.tools.functions))
    reading = Reading() if body.stream else None
    answer = await _steps(request, served, body, asked, reading)
    response = ResponseEvents(_start(served, body, asked.tools))
    kept: KeptItems = request.app.state.kept_items
    events = _events(answer, response, served, kept)
    if body.stream:
        return await event_stream(
            request, encoded(events), lambda problem: encode(response.fail(problem.message)), reading
        )
    await while_connected(request, discard(events))
    return JSONResponse(response.response)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request, body: InputRequest) -> Response:
    """Return how many tokens the model would read."""
    models: Models = request.app.state.models
    served, ignored = models.get(body.model), ignored_of(request)
    body.review(ignored)
    _, tokens = await _prompt(served, body, _read(request, served, body, ignored))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(tokens)})


@router.get("/v1/responses/{response_id}")
@router.delete("/v1/responses/{response_id}")
@router.get("/v1/responses/{response_id}/input_items")
@router.post("/v1/responses/{response_id}/cancel")
async def stored_response(response_id: str) -> Response:
    """Answer 404: responses are not stored."""
    raise APIError(
        404,
        f"Response with id '{response_id:.100}' not found: this server does not store responses",
        code="not_found",
    )


@dataclass(frozen=True)
class Asked:
    """What a request asks a model: its conversation, its tools, and the variables of its chat template."""

    messages: list[Json]
    tools: ToolRequest
    variables: Json


def _read(request: Request, served: Served, body: InputRequest, ignored: Ignored) -> Asked:
    """Read a request's input and tools. APIError 400 for a mistake in them."""
    kept: KeptItems = request.app.state.kept_items
    offered, choice = offered_tools(body.tools, body.tool_choice, ignored, flat=True)
    tools = read_tools(offered, choice, body.parallel_tool_calls, flat=True)
    shows_reasoning = knows(served, "reasoning_content")
    messages = input_messages(body.instructions, body.input, kept, shows_reasoning, ignored)
    variables = {}
    if served.hosted is None:
        variables = reasoning_variables(served, body.effort, "reasoning.effort", ignored)
    return Asked(messages, tools, variables)


def _start(served: Served, body: ResponseRequest, tools: ToolRequest) -> Json:
    """Return a response before it has begun: the request's settings, with defaults filled in."""
    sampling = Sampling(**sampling_values(served, temperature=body.temperature, top_p=body.top_p))
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": served.name,
        "parallel_tool_calls": tools.parallel is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {
            "format": body.format.model_dump(by_alias=True, exclude_none=True),
            "verbosity": "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": [
            {"description": None, "parameters": None, "strict": False, **tool}
            for tool in body.tools or []
            if tool.get("type") == "function"
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


async def _steps(
    request: Request, served: Served, body: ResponseRequest, asked: Asked, reading: Reading | None
) -> AsyncGenerator[Step, None]:
    """Return the steps of the answer of a local or a hosted model. APIError for mistakes in the request."""
    if served.hosted is not None:
        return hosted_steps(request, served, _payload(served, body, asked))
    plan, tokens = await _prompt(served, body, asked)
    sampling = body.sampling(served, answer_limit(served, tokens, body.max_output_tokens))
    return steps(served, tokens, [sampling], plan, whole=not body.stream, reading=reading)


async def _prompt(served: Served, body: InputRequest, asked: Asked) -> tuple[ToolPlan, list[int]]:
    """Return the plan of the tools, and the tokens that a local model reads."""
    form = await body.form()
    plan = await asyncio.to_thread(plan_tools, asked.tools, served.tokenizer, form, "text.format")
    return plan, await asyncio.to_thread(chat_tokens, served, asked.messages, plan, **asked.variables)


def _payload(served: Served, body: ResponseRequest, asked: Asked) -> Json:
    """Return the request as the body of a chat completion."""
    if body.wants_logprobs:
        raise unsupported("include", f"{LOGPROBS} is not passed on to other servers")
    form = body.format.model_dump(by_alias=True, exclude_none=True)
    kind = form.pop("type")
    response_format: Json = {"type": kind} | ({"json_schema": form} if kind == "json_schema" else {})
    fields = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "reasoning_effort": body.effort,
        "response_format": None if kind == "text" else response_format,
    }
    return chat_payload(served, asked.messages, asked.tools, body.max_output_tokens, fields)


async def _events(
    answer: AsyncGenerator[Step, None], response: ResponseEvents, served: Served, kept: KeptItems
) -> Events:
    """Yield the events, those of one step together; keep the items of the answer."""
    begun, aligned = False, Aligned()
    async with aclosing(answer):
        async for step in answer:
            events = [] if begun else response.begin()
            begun = True
            logprobs = aligned.push(content(step.pieces), step.logprobs or (), step.completion is not None)
            events += response.push(
                step.pieces, [chat_entry(placed.token, served.tokenizer) for placed in logprobs]
            )
            if step.completion is not None:
                cut_off = step.completion.finish_reason == "length"
                events += response.end(step.completion.usage, cut_off=cut_off, completed_at=int(time.time()))
                kept.keep(response.response["output"])
            yield events
