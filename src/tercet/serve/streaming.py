"""Cancel answers whose client disconnects, and stream answers: by server-sent events, or as lines of JSON.

An answer is computed in a task of its own, beside a task that waits for the client to disconnect. The first
of them to end cancels the other; so does the deadline.

A stream begins as soon as its request is known to be good, before the model reads the prompt. Where nothing
else is sent for a while it sends comments, which say how far the prompt is read: proxies and clients end
connections on which they hear nothing. Comments are lines that begin with a colon, which every reader of
server-sent events skips (https://html.spec.whatwg.org/multipage/server-sent-events.html).
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
from tercet.serve.worker import Reading

T = TypeVar("T")

EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
# For the OpenAPI document: content types of a route that may stream.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
_DEADLINE = "tercet.deadline"
SILENCE = 3.0  # seconds without an event before a comment; proxies wait for 30 seconds or more
PATIENCE = 5.0  # seconds for a first event, in which an error still becomes an HTTP error


def event(data: Mapping[str, Any]) -> bytes:
    """Encode one event; text is UTF-8 without escapes."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def comment(text: object) -> bytes:
    """Encode a comment, which readers skip; the text is one line."""
    return f": {text}\n\n".encode()


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
    reading: Reading | None = None,
    idle: Callable[[str], bytes] = comment,
    media_type: str = EVENTS,
) -> Response:
    """Return a response that streams ``chunks``.

    It waits `PATIENCE` for the first chunk, so that a failure before it becomes an HTTP error.

    Args:
        request: its client may disconnect.
        chunks: encoded events.
        error: encodes an error after the first chunk.
        reading: how far the prompt is read, for comments.
        idle: encodes a comment, or what else tells the client that the server works.
        media_type: of the stream.
    """
    first = asyncio.ensure_future(anext(chunks, b""))
    try:
        await while_connected(request, _early(first))
    except BaseException:
        await _cancelled(first)
        raise
    return _EventStream(request, first, chunks, error, reading, idle, media_type)


async def _early(first: asyncio.Future[bytes]) -> None:
    """Wait for the first chunk, not too long. Raises what happened instead of it."""
    done, _ = await asyncio.wait({first}, timeout=PATIENCE)
    if done:
        first.result()


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _EventStream(Response):
    def __init__(
        self,
        request: Request,
        first: asyncio.Future[bytes],
        chunks: AsyncGenerator[bytes, None],
        error: Callable[[APIError], bytes],
        reading: Reading | None,
        idle: Callable[[str], bytes],
        media_type: str,
    ) -> None:
        super().__init__()
        self._request, self._first, self._chunks, self._error = request, first, chunks, error
        self._reading, self._idle = reading, idle
        self._sent = 0.0  # when the last piece was sent, by the loop's clock
        # No content-length; x-accel-buffering keeps a proxy (nginx) from collecting the pieces.
        self.raw_headers = [
            (b"content-type", media_type.encode()),
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
            await _cancelled(self._first)
            await self._chunks.aclose()
        # A client that reads nothing must not hold its connection for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._request.app.state.settings.read_timeout):
                await send({"type": "http.response.body", "body": last})

    async def _write(self, send: Send) -> None:
        comments = asyncio.ensure_future(self._comments(send))
        try:
            await self._send(send, await self._first)
            async for chunk in self._chunks:
                await self._send(send, chunk)
        finally:
            await _cancelled(comments)

    async def _comments(self, send: Send) -> None:
        """Send a comment whenever nothing has been sent for a while."""
        loop = asyncio.get_running_loop()
        if not self._first.done():
            await self._send(send, self._idle(self._progress))
        while True:
            quiet = loop.time() - self._sent
            if quiet >= SILENCE:
                await self._send(send, self._idle(self._progress))
            else:
                await asyncio.sleep(SILENCE - quiet)

    @property
    def _progress(self) -> str:
        return "waiting for the model's server" if self._reading is None else str(self._reading)

    async def _send(self, send: Send, piece: bytes) -> None:
        self._sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": piece, "more_body": True})
