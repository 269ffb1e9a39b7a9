"""/v1/messages and /v1/messages/count_tokens: Anthropic's Messages API, with errors in Anthropic's shape.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tercet.serve.api.anthropic_events import Json, MessageEvents, stopped_by
from tercet.serve.api.anthropic_input import conversation, ending_of
from tercet.serve.api.anthropic_requests import CountRequest, MessageRequest
from tercet.serve.api.anthropic_tools import tool_request
from tercet.serve.api.field_table import Ignored, ignored_of
from tercet.serve.api.fields import answer_limit
from tercet.serve.api.generation import Step, chat_tokens, steps
from tercet.serve.api.hosted_steps import chat_payload, hosted_steps
from tercet.serve.api.reasoning import knows, reasoning_variables, thinking_variables
from tercet.serve.api.typed_events import Events, discard, encode, encoded
from tercet.serve.errors import APIError, Disconnected, ErrorBody, api_error, from_validation, invalid_value
from tercet.serve.models import Models, Served
from tercet.serve.streaming import STREAMED, event_stream, while_connected
from tercet.serve.tools.plan import ToolPlan, plan_tools
from tercet.serve.tools.request import ToolRequest
from tercet.serve.worker import Reading

# https://docs.anthropic.com/en/api/errors
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessageError(BaseModel):
    """The description of an error."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """The body of an error in Anthropic's shape."""

    type: Literal["error"]
    error: MessageError


# The guard before all routes answers in OpenAI's shape; Anthropic's clients read the status.
_ERROR = {"model": MessageErrorBody | ErrorBody}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}


class AnthropicRoute(APIRoute):
    """A route whose errors have Anthropic's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler with its exceptions converted."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except Disconnected:
                raise
            except RequestValidationError as problem:
                return _response(from_validation(problem.errors(), problem.body))
            except HTTPException as problem:
                return _response(APIError(problem.status_code, "the body is not valid JSON"))
            except Exception as problem:
                return _response(api_error(problem))

        return handler


router = APIRouter(route_class=AnthropicRoute)


@router.post("/v1/messages", responses=STREAMED | ERRORS)
async def create_message(request: Request, body: MessageRequest) -> Response:
    """Return the assistant's next message."""
    models: Models = request.app.state.models
    served = models.get(body.model)
    stops = tuple(body.stop_sequences or ())
    messages, tools, variables = _read(served, body, ignored_of(request))
    reading = Reading() if body.stream else None
    if served.hosted is not None:
        answer, count = hosted_steps(request, served, _payload(served, body, messages, tools)), 0
    else:
        plan, tokens = await _prompt(served, body, messages, tools, variables)
        sampling, count = body.sampling(served, answer_limit(served, tokens, body.max_tokens)), len(tokens)
        answer = steps(served, tokens, [sampling], plan, whole=not body.stream, reading=reading)
    message = MessageEvents(served.name, count)
    events = _events(answer, message, served, stops)
    if body.stream:
        return await event_stream(request, encoded(events), _error_event, reading)
    await while_connected(request, discard(events))
    return JSONResponse(message.message)


@router.post("/v1/messages/count_tokens", responses=ERRORS)
async def count_tokens(request: Request, body: CountRequest) -> Response:
    """Return how many tokens the model would read."""
    models: Models = request.app.state.models
    served = models.get(body.model)
    _, tokens = await _prompt(served, body, *_read(served, body, ignored_of(request)))
    return JSONResponse({"input_tokens": len(tokens)})


def _read(served: Served, body: CountRequest, ignored: Ignored) -> tuple[list[Json], ToolRequest, Json]:
    """Return conversation, tools, and variables of the chat template. APIError 400 for a mistake in them."""
    body.review(ignored)
    messages = conversation(body, knows(served, "reasoning_content"), ignored)
    variables: Json = {}
    effort = body.output_config.effort if body.output_config else None
    variables |= reasoning_variables(served, effort, "output_config.effort", ignored, levels_only=True)
    if body.thinking is not None:
        variables |= thinking_variables(served, body.thinking.type, "thinking", ignored)
    return messages, tool_request(body, ignored), variables


async def _prompt(
    served: Served, body: CountRequest, messages: list[Json], tools: ToolRequest, variables: Json
) -> tuple[ToolPlan, list[int]]:
    """Return the plan of the tools, and the tokens that a local model reads."""
    form = await body.form()
    plan = await asyncio.to_thread(plan_tools, tools, served.tokenizer, form, "output_config.format")
    return plan, await asyncio.to_thread(
        chat_tokens, served, messages, plan, ending=ending_of(messages), **variables
    )


def _payload(served: Served, body: MessageRequest, messages: list[Json], tools: ToolRequest) -> Json:
    """Return the request as the body of a chat completion."""
    schema = body.output_config and body.output_config.format and body.output_config.format.schema_
    form = {"name": "answer", "schema": schema, "strict": True}
    fields = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "response_format": schema and {"type": "json_schema", "json_schema": form},
    }
    if messages[-1]["role"] == "assistant":
        if served.hosted is None or served.hosted.reference.kind != "http":
            raise invalid_value(
                f"messages[{len(body.messages) - 1}].role",
                "is assistant; this model's server does not continue a prefilled answer, so the last message must "
                "be the user's",
            )
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat_payload(served, messages, tools, body.max_tokens, fields)


async def _events(
    answer: AsyncGenerator[Step, None], message: MessageEvents, served: Served, stops: tuple[str, ...]
) -> Events:
    """Yield the events, those of one step together."""
    begun = False
    async with aclosing(answer):
        async for step in answer:
            events = [] if begun else message.begin()
            begun = True
            events += message.push(step.pieces)
            if step.completion is not None:
                # Another server does not report which stop sequence it was.
                local = served.local is not None
                stop = stopped_by(step.completion, stops, served.tokenizer) if local else None
                events += message.end(step.completion, stop)
            yield events


# Errors


def error_body(problem: APIError) -> Json:
    """Return the body of an error in Anthropic's shape."""
    kind = _TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message}}


def _response(problem: APIError) -> Response:
    return Response(
        json.dumps(error_body(problem)),
        problem.status,
        headers=problem.headers,
        media_type="application/json",
    )


def _error_event(problem: APIError) -> bytes:
    return encode([error_body(problem)])
