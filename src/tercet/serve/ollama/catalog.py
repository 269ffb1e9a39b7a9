"""/api/tags, /api/show, /api/ps and /api/version: what this server has."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from tercet.data.reasoning import reasoning_of
from tercet.model.config import ModelConfig
from tercet.serve.api.field_table import ignored_of
from tercet.serve.api.reasoning import knows
from tercet.serve.models import Models, Served
from tercet.serve.ollama.replies import Json, OllamaRoute, listed_name, served_model, timestamp
from tercet.serve.ollama.requests import ShowRequest

# The version of Ollama whose API this is: clients compare it with what they need.
API_VERSION = "0.33.0"
RUNNING = "Ollama is running"  # the words on which clients match
_STAYS = 100 * 365 * 86400  # seconds: models stay loaded

router = APIRouter()
reader = APIRouter(route_class=OllamaRoute)  # of routes with a body
root = APIRouter(include_in_schema=False)


@root.get("/", response_class=PlainTextResponse)
async def running() -> Response:
    """Say that the server runs, where there is no chat page."""
    return PlainTextResponse(RUNNING)


@router.get("/api/version")
async def version() -> Response:
    """Return the version of Ollama whose API this server has, and Tercet's own."""
    from tercet import __version__

    return JSONResponse({"version": API_VERSION, "tercet": __version__})


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """List every model that requests can name."""
    models: Models = request.app.state.models
    return JSONResponse({"models": [await asyncio.to_thread(_listed, model) for model in models]})


@router.get("/api/ps")
async def loaded(request: Request) -> Response:
    """List the models in memory: all but the hosted ones."""
    models: Models = request.app.state.models
    entries = []
    for model in models:
        if model.local is None:
            continue
        backend = model.local.engine.backend
        size = int(getattr(backend, "weight_bytes", 0))
        entry = await asyncio.to_thread(_listed, model)
        del entry["modified_at"]
        entries.append(
            entry
            | {
                "size": size,
                "size_vram": 0 if hasattr(backend, "quantization") else size,
                "expires_at": timestamp(time.time() + _STAYS),
                "context_length": model.context_length,
            }
        )
    return JSONResponse({"models": entries})


@reader.post("/api/show")
async def show(request: Request, body: ShowRequest) -> Response:
    """Describe one model."""
    body.review(ignored_of(request))
    served = served_model(request, body.model or body.name)
    return JSONResponse(await asyncio.to_thread(_shown, served))


def _listed(served: Served) -> Json:
    """Return a model in the shape of ``/api/tags``."""
    stored, name = served.stored, listed_name(served)
    identity = [served.name, None if stored is None else [stored.path, stored.bytes, stored.type]]
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(_modified(served)),
        "size": 0 if stored is None else stored.bytes,
        "digest": hashlib.sha256(json.dumps(identity).encode("utf-8", "surrogatepass")).hexdigest(),
        "details": _details(served),
    }


def _modified(served: Served) -> float:
    if served.stored is not None:
        path = Path(served.stored.path)
        if path.exists():
            return path.stat().st_mtime
    return served.created


def _details(served: Served) -> Json:
    stored, config = served.stored, _config(served)
    family = config.family if config is not None else "" if stored is None else stored.family
    details: Json = {
        "parent_model": "",
        "format": "" if stored is None else "gguf" if stored.path.endswith(".gguf") else "safetensors",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _short(_parameters(served)),
        "quantization_level": "" if stored is None else stored.type,
    }
    if config is not None:
        details |= {"context_length": served.context_length, "embedding_length": config.hidden_size}
    return details


def _shown(served: Served) -> Json:
    """Return a model in the shape of ``/api/show``."""
    reply: Json = {
        "modelfile": f"# {served.name}: served by Tercet, which has no Modelfile",
        "parameters": "",
        "template": "",
        "details": _details(served),
        "model_info": {},
        "capabilities": ["completion"],
        "modified_at": timestamp(_modified(served)),
    }
    if served.local is None:
        return reply | {"capabilities": ["completion", "tools"], "model_info": _model_info(served)}
    tokenizer = served.tokenizer
    if tokenizer.chat_template is not None:
        reply["template"] = tokenizer.chat_template
        reply["capabilities"].append("tools")
        if reasoning_of(tokenizer) or knows(served, "enable_thinking") or knows(served, "reasoning_effort"):
            reply["capabilities"].append("thinking")
    reply["capabilities"].append("embedding")
    lines = [(_OPTIONS.get(name, name), f"{value:g}") for name, value in served.sampling_defaults.items()]
    stops = [tokenizer.token_text(token) for token in sorted(served.local.engine.stop_ids)]
    lines += [("stop", json.dumps(text, ensure_ascii=False)) for text in stops if text]
    reply["parameters"] = "\n".join(f"{name:<30} {value}" for name, value in lines)
    return reply | {"model_info": _model_info(served)}


_OPTIONS = {"repetition_penalty": "repeat_penalty"}


def _model_info(served: Served) -> Json:
    """Return what the keys of a GGUF file would say."""
    config = _config(served)
    info: Json = {"general.basename": served.name, "general.parameter_count": _parameters(served)}
    if config is None:
        return info
    family = config.family
    values: dict[str, Any] = {
        "context_length": served.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    return info | {"general.architecture": family} | {f"{family}.{key}": v for key, v in values.items()}


def _config(served: Served) -> ModelConfig | None:
    """Return the network's configuration, where Tercet's own code runs it."""
    if served.local is None:
        return None
    backend = served.local.engine.backend
    config = getattr(backend, "config", None) or getattr(getattr(backend, "model", None), "config", None)
    return config if isinstance(config, ModelConfig) else None


def _parameters(served: Served) -> int:
    return 0 if served.local is None else int(getattr(served.local.engine.backend, "parameters", 0))


def _short(count: int) -> str:
    """Return a number of parameters as 134.5M or 1.2B; "" for an unknown one."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count) if count else ""
