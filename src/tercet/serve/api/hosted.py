"""Models behind another server: requests are passed on, and what comes back is given as it came.

The body has been checked here; the model's name is that of the other server on the way there and ours on
the way back. Our key goes there, the client's never does. What the other server would ignore is refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from tercet.serve.errors import APIError, queue_full, unsupported
from tercet.serve.models import Served
from tercet.serve.streaming import DONE, event, event_stream, while_connected

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tercet.prompt.hosted import HostedModel
    from tercet.serve.metrics import Metrics

Json = dict[str, Any]


async def pass_on(request: Request, served: Served, path: str, body: BaseModel) -> Response:
    """The other server's answer to ``body`` at ``path``, streamed where that was asked for."""
    payload = _checked(_hosted(served), body.model_dump(mode="json", by_alias=True, exclude_unset=True))
    if payload.get("stream"):
        return await event_stream(request, _chunks(request, served, path, payload))
    client = _client(request, served)
    answer = await while_connected(request, _answer(client, path, payload))
    _count(request, served, answer.get("usage"))
    return JSONResponse(answer | {"model": served.name})


async def chat_chunks(request: Request, served: Served, payload: Json) -> AsyncGenerator[Json, None]:
    """The chunks of the other server's stream of a chat completion, for protocols that it may not speak."""
    streamed = payload | {"stream": True, "stream_options": {"include_usage": True}}
    checked = _checked(_hosted(served), streamed)
    async with aclosing(_received(request, served, "/chat/completions", checked)) as found:
        async for chunk in found:
            yield chunk


def _hosted(served: Served) -> HostedModel:
    assert served.hosted is not None
    return served.hosted


def _checked(hosted: HostedModel, body: Json) -> Json:
    """Return the body to send. APIError for a field that the other server would ignore."""
    payload = {name: value for name, value in body.items() if value is not None}
    for name in payload:
        if name in hosted.ignored_fields:
            raise unsupported(name, f"{hosted.reference.text} would ignore it")
    return payload | {"model": hosted.name}


def _client(request: Request, served: Served) -> AsyncOpenAI:
    clients: dict[str, AsyncOpenAI] = request.app.state.hosted_clients
    if served.name not in clients:
        clients[served.name] = _hosted(served).async_client()
    return clients[served.name]


async def _answer(client: AsyncOpenAI, path: str, payload: Json) -> Json:
    try:
        answer = await client.post(path, body=payload, cast_to=object)
    except Exception as problem:
        raise _told(problem) from problem
    if not isinstance(answer, dict):
        raise bad_gateway("the model's server did not answer in OpenAI's protocol")
    return answer


async def _chunks(request: Request, served: Served, path: str, payload: Json) -> AsyncGenerator[bytes, None]:
    async with aclosing(_received(request, served, path, payload)) as found:
        async for chunk in found:
            yield event(chunk | {"model": served.name})
    yield DONE


async def _received(request: Request, served: Served, path: str, payload: Json) -> AsyncGenerator[Json, None]:
    from openai import AsyncStream

    client = _client(request, served)
    try:
        stream = await client.post(
            path, body=payload, cast_to=object, stream=True, stream_cls=AsyncStream[object]
        )
        async with stream:
            async for chunk in stream:
                if isinstance(chunk, dict):
                    _count(request, served, chunk.get("usage"))
                    yield chunk
    except Exception as problem:
        raise _told(problem) from problem


def _told(problem: Exception) -> Exception:
    """What the other server said, or that it said nothing."""
    import openai

    if isinstance(problem, openai.APITimeoutError):
        return APIError(504, "the model's server did not answer in time", "server_error", code="timeout")
    if isinstance(problem, openai.APIConnectionError):
        return bad_gateway("the model's server can't be reached")
    if isinstance(problem, openai.APIStatusError):
        return _of_status(problem.status_code, problem.body, problem.response.headers.get("retry-after"))
    if isinstance(problem, openai.APIError):  # in the middle of a stream
        return _of_status(
            400 if _field(problem.body, "type") == "invalid_request_error" else 502, problem.body
        )
    if isinstance(problem, ValueError | TypeError | AttributeError):  # not JSON
        return bad_gateway("the model's server did not answer in OpenAI's protocol")
    return problem


def _of_status(status: int, body: object, retry_after: str | None = None) -> APIError:
    said = _field(body, "message") or f"the model's server answered {status}"
    if status == 429:
        error = queue_full(said)
        error.code = _field(body, "code") or error.code
        if retry_after is not None and retry_after.isdecimal():
            error.headers["retry-after"] = retry_after
        return error
    if status in (400, 404, 409, 413, 422):
        return APIError(
            400 if status == 422 else status, said, param=_field(body, "param"), code=_field(body, "code")
        )
    if status in (401, 403):  # our key, not that of who asked; nor shall the answer tell about it
        return bad_gateway("the model's server does not accept this server's key")
    return bad_gateway(said)


def bad_gateway(message: str) -> APIError:
    """502: the other server failed."""
    return APIError(502, message, "server_error", code="bad_gateway")


def _field(body: object, name: str) -> str | None:
    value = body.get(name) if isinstance(body, dict) else None
    return value if isinstance(value, str) else None


def _count(request: Request, served: Served, usage: object) -> None:
    metrics: Metrics = request.app.state.metrics
    for name, counter in (
        ("prompt_tokens", metrics.prompt_tokens),
        ("completion_tokens", metrics.completion_tokens),
    ):
        count = usage.get(name) if isinstance(usage, dict) else None
        if isinstance(count, int) and count > 0:
            counter.labels(served.name).inc(count)
