"""The files of the chat page, and the headers that keep the text of a model from acting in it."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

import fastapi
from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tercet.serve.errors import APIError

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing from other hosts, no script or style in the markup, no frame around the page; only one named place in
# its code may turn text into HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types tercet"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

router = fastapi.APIRouter(include_in_schema=False)


@functools.cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Return content, type and tag of each file by its name; a request never names a path."""
    files = {}
    for entry in resources.files("tercet.serve.web").joinpath("page").iterdir():
        kind = TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            content = entry.read_bytes()
            files[entry.name] = content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    return files


def _answer(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise APIError(404, f"there is no file {name:.100} of the page", code="unknown_url")
    content, kind, tag = file
    headers = {
        "etag": tag,
        "cache-control": "no-cache",
    }  # browsers ask each time, and get the file if it has changed
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


@router.get("/")
def index(request: Request) -> Response:
    """Return the page."""
    return _answer(request, "index.html")


@router.get("/page/{name}")
def file(request: Request, name: str) -> Response:
    """Return a file of the page."""
    return _answer(request, name)


class PageHeaders:
    """Adds HEADERS to every response of the page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; those of the page get the headers."""
        if scope["type"] != "http" or not (scope["path"] == "/" or scope["path"].startswith("/page/")):
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        await self.app(scope, receive, with_headers)
