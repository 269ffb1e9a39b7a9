"""Cancel answers whose client disconnects, and stream answers by server-sent events.

An answer is computed in a task of its own, beside a task that waits for the client to disconnect. The first
of them to end cancels the other; so does the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from tercet.serve.errors import APIError, Disconnected, api_error
from tercet.serve.settings import Settings

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# For the OpenAPI document: content types of a route that may stream.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
_DEADLINE = "tercet.deadline"


def event(data: Mapping[str, Any]) -> bytes:
    """Encode one event; text is UTF-8 without escapes."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(problem: APIError) -> bytes:
    """Encode an error in the middle of a stream, as OpenAI's client reads it, and the end of the stream."""
    return b"data: " + json.dumps(problem.body()).encode() + b"\n\n" + DONE


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, which is cancelled when the client disconnects.

    Raises:
        Disconnected: the client disconnected.
        APIError: 503; more than ``Settings.request_timeout`` passed since the request's first such call.
    """
    settings: Settings = request.app.state.settings
    loop = asyncio.get_running_loop()
    deadline = request.scope.setdefault(_DEADLINE, loop.time() + settings.request_timeout)
    task, gone = loop.create_task(work), loop.create_task(_disconnect(request))
    try:
        await asyncio.wait(
            {task, gone}, timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            return task.result()
        if gone.done():
            raise Disconnected
        raise APIError(
            503,
            f"the answer took longer than the {settings.request_timeout:g} s that this server allows "
            "(its setting `request_timeout`)",
            "server_error",
            code="request_timeout",
            headers={"x-should-retry": "false"},  # it would take as long again
        )
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def event_stream(
    request: Request,
    chunks: AsyncGenerator[bytes, None],
    error: Callable[[APIError], bytes] = error_event,
) -> Response:
    """Return a response that streams ``chunks``.

    It waits for the first chunk, so that a failure before it becomes an HTTP error.

    error: encodes an error after the first chunk.
    """
    first = await while_connected(request, _next(chunks))
    return _EventStream(request, first, chunks, error)


async def _next(chunks: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(chunks, b"")


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        request: Request,
        first: bytes,
        chunks: AsyncGenerator[bytes, None],
        error: Callable[[APIError], bytes],
    ) -> None:
        super().__init__()
        self._request, self._first, self._chunks, self._error = request, first, chunks, error
        # No content-length; x-accel-buffering keeps a proxy (nginx) from collecting the pieces.
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = b""
        try:
            await while_connected(self._request, self._write(send))
        except Disconnected:
            return
        except Exception as problem:
            last = self._error(api_error(problem))
        finally:
            await self._chunks.aclose()
        # A client that reads nothing must not hold its connection for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._request.app.state.settings.read_timeout):
                await send({"type": "http.response.body", "body": last})

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
