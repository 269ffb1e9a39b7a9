"""What replies of Ollama's API share: lines of JSON, times, and how a route reads a request."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tercet.serve.errors import OLLAMA_PATHS, APIError, ErrorText
from tercet.serve.models import Models, Served

Json = dict[str, Any]
LINES = "application/x-ndjson"
# For the OpenAPI document.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, LINES: {}}}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorText}, "5XX": {"model": ErrorText}}
LATEST = ":latest"


class OllamaRoute(APIRoute):
    """A route that reads every body as JSON: Ollama's users send it without a content type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler for the request with the content type of JSON."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            headers = [entry for entry in request.scope["headers"] if entry[0] != b"content-type"]
            request.scope["headers"] = [*headers, (b"content-type", b"application/json")]
            if not await request.body():
                raise APIError(400, "missing request body")
            return await handle(request)

        return handler


def line(data: Mapping[str, Any]) -> bytes:
    """Encode one line of a stream."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def error_line(problem: APIError) -> bytes:
    """Encode an error in the middle of a stream, as Ollama's clients read it."""
    # ASCII: a message may quote characters that UTF-8 cannot express.
    return json.dumps(problem.body_of(OLLAMA_PATHS)).encode() + b"\n"


def timestamp(seconds: float | None = None) -> str:
    """Return a time (default: now), in seconds since 1970, as RFC 3339 has it."""
    moment = datetime.datetime.fromtimestamp(time.time() if seconds is None else seconds, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass
class Clock:
    """When a request came, was ready for the model, had its first token, and was complete, in nanoseconds."""

    began: int = field(default_factory=time.perf_counter_ns)
    ready: int = 0
    first: int = 0

    def start(self) -> None:
        """Record that the model begins to read."""
        self.ready = time.perf_counter_ns()

    def token(self) -> None:
        """Record that a token has come."""
        self.first = self.first or time.perf_counter_ns()

    def durations(self) -> Json:
        """Return all durations of a request that is complete now."""
        end = time.perf_counter_ns()
        first = self.first or end
        return {
            "total_duration": end - self.began,
            "load_duration": self.ready - self.began,
            "prompt_eval_duration": first - self.ready,
            "eval_duration": end - first,
        }


def listed_name(served: Served) -> str:
    """Return a model's name as Ollama's clients list it: with a tag."""
    return served.name if ":" in served.name.rpartition("/")[2] else served.name + LATEST


def served_model(request: Request, name: str | None) -> Served:
    """Return the model of a request; ``:latest`` and the case of letters make no difference.

    Raises:
        APIError: 404, in words on which Ollama's clients match; 400 for no name and several models.
    """
    models: Models = request.app.state.models
    if not name:
        if len(models) > 1:
            raise APIError(400, "model is required", param="model")
        return models.default
    named = {model.name: model for model in models}
    if name in named:
        return named[name]
    short = name.casefold().removesuffix(LATEST)
    for model in models:
        if model.name.casefold().removesuffix(LATEST) == short:
            return model
    names = ", ".join([*named][:5])
    raise APIError(404, f"model '{name:.200}' not found; this server has {names}", param="model")
