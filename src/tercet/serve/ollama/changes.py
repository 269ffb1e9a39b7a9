"""/api/pull behind a setting, and the requests that would change models, which are refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.model.reference import parse_reference
from tercet.model.store import StoredModel, fetch_model
from tercet.serve.api.field_table import ignored_of
from tercet.serve.errors import APIError, invalid_value
from tercet.serve.ollama.replies import LINES, STREAMED, OllamaRoute, error_line, line, served_model
from tercet.serve.ollama.requests import PullRequest
from tercet.serve.settings import Settings
from tercet.serve.streaming import event_stream, while_connected

reader = APIRouter(route_class=OllamaRoute)  # of routes with a body
router = APIRouter()

# No paths and no addresses: a client must not make this server read its files or call other servers.
_PULLED = re.compile(r"builtin:[\w.-]+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?(@[\w./-]+)?")
_HUB_HOSTS = ("hf.co/", "huggingface.co/")


@reader.post("/api/pull", responses=STREAMED)
async def pull(request: Request, body: PullRequest) -> Response:
    """Fetch a model into the cache, as ``tercet pull``; it is served after the next start with its name."""
    body.review(ignored_of(request))
    name = body.model or body.name
    if not name:
        raise APIError(400, "model is required", param="model")
    settings: Settings = request.app.state.settings
    served = _is_served(request, name)
    if not served and not settings.allow_pull:
        raise APIError(
            403,
            f"pulling models is off: this server has no model '{name:.200}', and its setting `allow_pull` would "
            "let clients fetch it",
            "permission_error",
        )
    reference = name
    for host in _HUB_HOSTS:
        reference = reference.removeprefix(host)
    if not served and not _PULLED.fullmatch(reference):
        raise invalid_value(
            "model", f"is {name!r:.200}; this server pulls builtin:NAME, org/name and org/name:QUANTISATION"
        )
    if body.stream is False:
        if not served:
            await while_connected(request, asyncio.to_thread(_fetched, reference))
        return JSONResponse({"status": "success"})
    busy = line({"status": f"pulling {name}"})
    return await event_stream(
        request,
        _statuses(None if served else reference, busy),
        error_line,
        idle=lambda progress: busy,
        media_type=LINES,
    )


def _is_served(request: Request, name: str) -> bool:
    try:
        served_model(request, name)
    except APIError:
        return False
    return True


async def _statuses(reference: str | None, busy: bytes) -> AsyncGenerator[bytes, None]:
    """Yield the lines of a download; None: the model is here."""
    yield line({"status": "pulling manifest"})
    if reference is not None:
        yield busy
        model = await asyncio.to_thread(_fetched, reference)
        yield line({"status": f"{model.name}: {model.bytes} bytes"})
    yield line({"status": "success"})


def _fetched(text: str) -> StoredModel:
    reference = parse_reference(text)
    if reference.kind not in ("hub", "builtin"):  # a directory of that name on this machine
        raise invalid_value("model", f"is {text!r:.200}, which is no model of the Hub")
    return fetch_model(reference)


def _refuse(action: str, instead: str) -> Response:
    raise APIError(501, f"this server does not {action} models; {instead} on its machine")


@router.post("/api/create")
async def create() -> Response:
    """Refuse: models are made by `tercet tune` and `tercet export`."""
    return _refuse("create", "use tercet tune or tercet export")


@router.post("/api/copy")
async def copy() -> Response:
    """Refuse: NAME=REF gives a model another name."""
    return _refuse("copy", "serve a model as NAME=REF for another name")


@router.delete("/api/delete")
async def delete() -> Response:
    """Refuse: models are removed by `tercet rm`."""
    return _refuse("delete", "use tercet rm")


@router.post("/api/push")
async def push() -> Response:
    """Refuse."""
    return _refuse("push", "upload the files")


@router.post("/api/blobs/{digest}")
async def blob(digest: str) -> Response:
    """Refuse."""
    return _refuse("create", "use tercet tune or tercet export")
