"""All routes of Ollama's API."""

from __future__ import annotations

from tercet.serve.ollama import answers, catalog, changes, embeddings

ROUTERS = (
    answers.router,
    embeddings.router,
    catalog.router,
    catalog.reader,
    changes.router,
    changes.reader,
)
