"""/v1/responses: OpenAI's Responses API, without storage.

It supports text and function tools, whole or as a stream. A stream begins with its first token, so that a
request that cannot be answered gets an HTTP error.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.engine.request import Sampling
from tercet.serve.api.fields import answer_limit, sampling_values
from tercet.serve.api.generation import Step, chat_tokens, content, steps
from tercet.serve.api.hosted_steps import chat_payload, hosted_steps
from tercet.serve.api.logprobs import Aligned, chat_entry
from tercet.serve.api.response_events import Json, ResponseEvents
from tercet.serve.api.response_requests import LOGPROBS, ResponseRequest
from tercet.serve.api.typed_events import Events, discard, encode, encoded
from tercet.serve.errors import APIError, unsupported
from tercet.serve.models import Models, Served
from tercet.serve.streaming import STREAMED, event_stream, while_connected
from tercet.serve.tools.plan import plan_tools
from tercet.serve.tools.request import ToolRequest, read_tools

router = APIRouter()


@router.post("/v1/responses", responses=STREAMED)
async def create_response(request: Request, body: ResponseRequest) -> Response:
    """Answer ``input``."""
    models: Models = request.app.state.models
    served = models.get(body.model)
    body.check()
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls, flat=True)
    answer = await _steps(request, served, body, tools)
    response = ResponseEvents(_start(served, body, tools))
    events = _events(answer, response, served)
    if body.stream:
        return await event_stream(
            request, encoded(events), lambda problem: encode(response.fail(problem.message))
        )
    await while_connected(request, discard(events))
    return JSONResponse(response.response)


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
        "model": body.model,
        "parallel_tool_calls": tools.parallel,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
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
            {"description": None, "parameters": None, "strict": False, **tool} for tool in body.tools or []
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


async def _steps(
    request: Request, served: Served, body: ResponseRequest, tools: ToolRequest
) -> AsyncGenerator[Step, None]:
    """Return the steps of the answer of a local or a hosted model. APIError for mistakes in the request."""
    messages = body.messages()
    if served.hosted is not None:
        return hosted_steps(request, served, _payload(served, body, messages, tools))
    form = await body.form()
    plan = await asyncio.to_thread(plan_tools, tools, served.tokenizer, form, "text.format")
    tokens = await asyncio.to_thread(chat_tokens, served, messages, plan)
    sampling = body.sampling(served, answer_limit(served, tokens, body.max_output_tokens))
    return steps(served, tokens, [sampling], plan, whole=not body.stream)


def _payload(served: Served, body: ResponseRequest, messages: list[Json], tools: ToolRequest) -> Json:
    """Return the request as the body of a chat completion."""
    if body.wants_logprobs:
        raise unsupported("include", f"{LOGPROBS} is not passed on to other servers")
    form = body.format.model_dump(by_alias=True, exclude_none=True)
    kind = form.pop("type")
    response_format: Json = {"type": kind} | ({"json_schema": form} if kind == "json_schema" else {})
    fields = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "response_format": None if kind == "text" else response_format,
    }
    return chat_payload(served, messages, tools, body.max_output_tokens, fields)


async def _events(answer: AsyncGenerator[Step, None], response: ResponseEvents, served: Served) -> Events:
    """Yield the events, those of one step together."""
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
            yield events
