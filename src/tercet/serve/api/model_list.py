"""/v1/models: what there is, and /health."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.serve.models import Models, Served

router = APIRouter()


def model_object(one: Served) -> dict[str, Any]:
    """A model as OpenAI lists it; ``max_model_len`` as vLLM does, where it is known."""
    found: dict[str, Any] = {"id": one.name, "object": "model", "created": one.created, "owned_by": "tercet"}
    if one.local is not None:
        found["max_model_len"] = one.context_length
    return found


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Every model that requests can name."""
    models: Models = request.app.state.models
    return JSONResponse({"object": "list", "data": [model_object(one) for one in models]})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> Response:
    """One model; its name may hold slashes."""
    models: Models = request.app.state.models
    return JSONResponse(model_object(models.get(model)))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while every engine takes requests, 503 otherwise."""
    models: Models = request.app.state.models
    well = all(worker.alive for worker in models.workers)
    return JSONResponse({"status": "ok" if well else "failed"}, 200 if well else 503)
