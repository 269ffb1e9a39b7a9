"""/v1/models, the list of models, and /health."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.serve.models import Models, Served

router = APIRouter()


def model_object(model: Served) -> dict[str, Any]:
    """Return a model in OpenAI's shape, with vLLM's ``max_model_len`` where it is known.

    ``sampling`` holds what applies to a request that sets none of these fields.
    """
    entry: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tercet",
    }
    if model.local is not None:
        entry["max_model_len"] = model.context_length
        entry["sampling"] = model.sampling_values
    return entry


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List every model that requests can name."""
    models: Models = request.app.state.models
    return JSONResponse({"object": "list", "data": [model_object(model) for model in models]})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> Response:
    """Return one model; its name may contain slashes."""
    models: Models = request.app.state.models
    return JSONResponse(model_object(models.get(model)))


@router.get("/health")
async def health(request: Request) -> Response:
    """Answer 200 while every engine accepts requests, 503 otherwise."""
    models: Models = request.app.state.models
    healthy = all(worker.alive for worker in models.workers)
    return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)
