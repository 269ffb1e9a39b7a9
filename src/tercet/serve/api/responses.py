"""/v1/responses: OpenAI's Responses API, of which nothing is stored.

Text and function tools, whole or as a stream. A stream begins with its first token, so that a request
that can't be answered gets an HTTP error.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.serve.api.fields import answer_limit
from tercet.serve.api.generation import Step, chat_tokens, content, steps
from tercet.serve.api.hosted_steps import chat_payload, hosted_steps
from tercet.serve.api.logprobs import Aligned, chat_entry
from tercet.serve.api.response_events import Json, ResponseEvents
from tercet.serve.api.response_requests import LOGPROBS, ResponseRequest
from tercet.serve.api.typed_events import Events, encode, encoded, to_the_end
from tercet.serve.errors import APIError, unsupported
from tercet.serve.models import Models, Served
from tercet.serve.streaming import STREAMED, event_stream, while_connected
from tercet.serve.tools.plan import plan_tools
from tercet.serve.tools.request import ToolRequest, read_tools

router = APIRouter()


@router.post("/v1/responses", responses=STREAMED)
async def create_response(request: Request, body: ResponseRequest) -> Response:
    """An answer to ``input``."""
    models: Models = request.app.state.models
    served = models.get(body.model)
    body.check()
    wanted = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls, flat=True)
    found = await _steps(request, served, body, wanted)
    told = ResponseEvents(_start(body, wanted))
    events = _events(found, told, served)
    if body.stream:
        return await event_stream(
            request, encoded(events), lambda problem: encode(told.fail(problem.message))
        )
    await while_connected(request, to_the_end(events))
    return JSONResponse(told.response)


@router.get("/v1/responses/{response_id}")
@router.delete("/v1/responses/{response_id}")
@router.get("/v1/responses/{response_id}/input_items")
@router.post("/v1/responses/{response_id}/cancel")
async def stored_response(response_id: str) -> Response:
    """There are none."""
    raise APIError(
        404,
        f"Response with id '{response_id:.100}' not found: responses are not stored here",
        code="not_found",
    )


def _start(body: ResponseRequest, wanted: ToolRequest) -> Json:
    """A response before it has begun: what was asked for, with what is meant where nothing was said."""
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
        "parallel_tool_calls": wanted.parallel,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": body.format.model_dump(by_alias=True, exclude_none=True),
            "verbosity": "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": [
            {"description": None, "parameters": None, "strict": False, **tool} for tool in body.tools or []
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


async def _steps(
    request: Request, served: Served, body: ResponseRequest, wanted: ToolRequest
) -> AsyncGenerator[Step, None]:
    """The answer on its way, from a model here or behind another server. APIError for what is wrong."""
    messages = body.messages()
    if served.hosted is not None:
        return hosted_steps(request, served, _payload(served, body, messages, wanted))
    form = await body.form()
    plan = await asyncio.to_thread(plan_tools, wanted, served.tokenizer, form, "text.format")
    tokens = await asyncio.to_thread(chat_tokens, served, messages, plan)
    sampling = body.sampling(answer_limit(served, tokens, body.max_output_tokens))
    return steps(served, tokens, [sampling], plan, whole=not body.stream)


def _payload(served: Served, body: ResponseRequest, messages: list[Json], wanted: ToolRequest) -> Json:
    """The same as a chat completion."""
    if body.wants_logprobs:
        raise unsupported("include", f"{LOGPROBS} is not passed on to other servers")
    form = body.format.model_dump(by_alias=True, exclude_none=True)
    kind = form.pop("type")
    asked: Json = {"type": kind} | ({"json_schema": form} if kind == "json_schema" else {})
    fields = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "response_format": None if kind == "text" else asked,
    }
    return chat_payload(served, messages, wanted, body.max_output_tokens, fields)


async def _events(found: AsyncGenerator[Step, None], told: ResponseEvents, served: Served) -> Events:
    """The events, those of a step together."""
    begun, aligned = False, Aligned()
    async with aclosing(found):
        async for step in found:
            events = [] if begun else told.begin()
            begun = True
            logprobs = aligned.push(content(step.pieces), step.logprobs or (), step.completion is not None)
            events += told.push(step.pieces, [chat_entry(one.token, served.tokenizer) for one in logprobs])
            if step.completion is not None:
                cut_off = step.completion.finish_reason == "length"
                events += told.end(step.completion.usage, cut_off=cut_off, completed_at=int(time.time()))
            yield events
