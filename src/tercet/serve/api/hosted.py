"""Pass requests for hosted models on to their servers, and return the answers unchanged.

The body has been checked before. The model's name is replaced by that of the other server, and back in the
answer. The request carries this server's key, never the client's. Fields that the other server would ignore
are refused.
"""

from __future__ import annotations

import json
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
    """Return the other server's answer to ``body`` at ``path``, as a stream if the body requests one."""
    payload = _checked(_hosted(served), body.model_dump(mode="json", by_alias=True, exclude_unset=True))
    if payload.get("stream"):
        return await event_stream(request, _chunks(request, served, path, payload))
    answer = await post_to(request, served, path, payload)
    return JSONResponse(answer | {"model": served.name})


async def post_to(request: Request, served: Served, path: str, payload: Json) -> Json:
    """Return the other server's answer to ``payload``, for protocols that it may not support."""
    checked = _checked(_hosted(served), payload)
    answer = await while_connected(request, _answer(_client(request, served), path, checked))
    _count(request, served, answer.get("usage"))
    return answer


async def chat_chunks(request: Request, served: Served, payload: Json) -> AsyncGenerator[Json, None]:
    """Yield the chunks of a chat completion, for protocols that the other server may not support."""
    streamed = payload | {"stream": True, "stream_options": {"include_usage": True}}
    checked = _checked(_hosted(served), streamed)
    async with aclosing(_received(request, served, "/chat/completions", checked)) as chunks:
        async for chunk in chunks:
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
        raise _translated(problem) from problem
    _raise_reason(answer)
    if not isinstance(answer, dict):
        raise bad_gateway("the model's server did not answer in OpenAI's protocol")
    return answer


def _raise_reason(body: object) -> None:
    """Raise APIError for an error that the other server sent with status 200."""
    from tercet.prompt.hosted_answer import reason_in

    reason = reason_in(body)
    if reason is None:
        return
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code < 600:  # OpenRouter puts the status there
        raise _of_status(code, {"message": reason})
    raise bad_gateway(reason)


async def _chunks(request: Request, served: Served, path: str, payload: Json) -> AsyncGenerator[bytes, None]:
    async with aclosing(_received(request, served, path, payload)) as chunks:
        async for chunk in chunks:
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
            if "json" in stream.response.headers.get("content-type", ""):
                _raise_reason(json.loads(await stream.response.aread()))
            async for chunk in stream:
                if isinstance(chunk, dict):
                    _count(request, served, chunk.get("usage"))
                    yield chunk
    except APIError:
        raise
    except Exception as problem:
        raise _translated(problem) from problem


def _translated(problem: Exception) -> Exception:
    """Return the error for the client: the other server's own, or that it did not answer."""
    import openai

    if isinstance(problem, openai.APITimeoutError):
        return APIError(504, "the model's server did not answer in time", "server_error", code="timeout")
    if isinstance(problem, openai.APIConnectionError):
        return bad_gateway("cannot reach the model's server")
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
    message = _field(body, "message") or f"the model's server answered {status}"
    if status == 429:
        error = queue_full(message)
        error.code = _field(body, "code") or error.code
        if retry_after is not None and retry_after.isdecimal():
            error.headers["retry-after"] = retry_after
        return error
    if status in (400, 404, 409, 413, 422):
        return APIError(
            400 if status == 422 else status, message, param=_field(body, "param"), code=_field(body, "code")
        )
    if status in (401, 403):  # this server's key, not the client's; the message might reveal it
        return bad_gateway("the model's server rejects the key of this server")
    return bad_gateway(message)


def bad_gateway(message: str) -> APIError:
    """Return the 502 for a failure of the other server."""
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
