"""The server's application: all routes, behind the guard, with all errors in one shape."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tercet.serve.api.field_table import HEADER, ignored_header
from tercet.serve.api.kept_items import KeptItems
from tercet.serve.errors import ERRORS, add_error_handlers, api_error
from tercet.serve.metrics import Metrics
from tercet.serve.models import Models
from tercet.serve.security import Guard
from tercet.serve.settings import Settings

if TYPE_CHECKING:
    from tercet.serve.web.store import Store

CORS_HEADERS = ("authorization", "content-type", "x-api-key", "anthropic-version", "anthropic-beta")


def make_app(models: Models, settings: Settings, store: Store | None = None) -> FastAPI:
    """Make the application. The end of its lifespan stops the engines.

    Args:
        models: the models that it serves.
        settings: of the server.
        store: the database of the chat page's conversations; None: no page.
    """
    from tercet import __version__

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if store is not None:
            await app.state.page.close()
        for worker in models.workers:
            await worker.drain(1.0)  # the server has waited for its requests already
        models.close()
        for client in app.state.hosted_clients.values():
            await client.close()

    app = FastAPI(
        title="Tercet",
        version=__version__,
        description="Large language models over the protocols of OpenAI, Anthropic and Ollama.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other servers
        redoc_url=None,
    )
    metrics = Metrics(models)
    app.state.models, app.state.settings, app.state.store = models, settings, store
    app.state.metrics, app.state.hosted_clients = metrics, {}
    app.state.kept_items = KeptItems()
    add_error_handlers(app)
    _add_routes(app)
    if store is not None:
        from tercet.serve.web.page_api import add_page

        add_page(app, store, models)
    else:
        from tercet.serve.ollama.catalog import root

        app.include_router(root)
    # The middleware that is added last is the outermost.
    app.add_middleware(Guard, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=list(CORS_HEADERS),
            expose_headers=["x-request-id", "retry-after", HEADER],
        )
    app.add_middleware(Observed, metrics=metrics)
    return app


def _add_routes(app: FastAPI) -> None:
    from tercet.serve import metrics, security
    from tercet.serve.api import (
        anthropic_messages,
        chat_completions,
        completions,
        embeddings,
        model_list,
        responses,
        tokens,
    )
    from tercet.serve.ollama import routes as ollama

    for module in (
        model_list,
        chat_completions,
        completions,
        embeddings,
        tokens,
        responses,
        anthropic_messages,
        metrics,
        security,
    ):
        app.include_router(module.router, responses=ERRORS)
    ollama.add_routes(app)


class Observed:
    """Middleware that gives answers an id, records them in the metrics, and handles uncaught exceptions."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        name = f"req_{secrets.token_hex(12)}".encode()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
                if ignored := ignored_header(scope):
                    message["headers"].append((HEADER.encode(), ignored.encode()))
            await send(message)

        if (
            scope["method"] == "HEAD"
        ):  # the protocol class sends the headers of the answer to GET, and no body
            scope = {**scope, "method": "GET"}
        try:
            await self.app(scope, receive, tagged)
        except Exception as problem:
            answer = api_error(problem).response(scope["path"])
            if status:
                raise  # too late for another answer: the connection is cut
            await answer(scope, receive, tagged)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.answered(path, status, time.perf_counter() - began)
