"""All routes of Ollama's API."""

from __future__ import annotations

from fastapi import FastAPI

from tercet.serve.ollama import answers, catalog, changes, embeddings
from tercet.serve.ollama.replies import ERRORS

_ROUTERS = (
    answers.router,
    embeddings.router,
    catalog.router,
    catalog.reader,
    changes.router,
    changes.reader,
)


def add_routes(app: FastAPI) -> None:
    """Add the routes to the server's application."""
    for router in _ROUTERS:
        app.include_router(router, responses=ERRORS)
