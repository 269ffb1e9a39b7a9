"""/api/embed and the older /api/embeddings: vectors of length 1."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.data.conversation import check_text
from tercet.serve.api.embeddings import MAX_INPUTS, embed, shortened
from tercet.serve.api.field_table import ignored_of
from tercet.serve.api.hosted import bad_gateway, post_to
from tercet.serve.errors import APIError, invalid_value
from tercet.serve.models import Served
from tercet.serve.ollama.replies import Clock, Json, OllamaRoute, served_model
from tercet.serve.ollama.requests import EmbeddingsRequest, EmbedRequest
from tercet.serve.streaming import while_connected

router = APIRouter(route_class=OllamaRoute)


@router.post("/api/embed")
async def embed_texts(request: Request, body: EmbedRequest) -> Response:
    """Return a vector for each text."""
    clock = Clock()
    served = served_model(request, body.model)
    body.review(ignored_of(request))
    texts = [body.input] if isinstance(body.input, str) and body.input else body.input or []
    vectors, count = await _vectors(request, served, list(texts), cut=body.truncate is not False, clock=clock)
    if vectors and body.dimensions and 0 < body.dimensions < len(vectors[0]):
        vectors = shortened(np.asarray(vectors, np.float32), body.dimensions).tolist()
    durations = clock.durations()
    return JSONResponse(
        {
            "model": body.model or served.name,
            "embeddings": vectors,
            "total_duration": durations["total_duration"],
            "load_duration": durations["load_duration"],
            "prompt_eval_count": count,
        }
    )


@router.post("/api/embeddings")
async def embed_text(request: Request, body: EmbeddingsRequest) -> Response:
    """Return the vector of one text."""
    served = served_model(request, body.model)
    body.review(ignored_of(request))
    texts = [body.prompt] if body.prompt else []
    vectors, _ = await _vectors(request, served, texts, cut=True, clock=Clock())
    return JSONResponse({"embedding": vectors[0] if vectors else []})


async def _vectors(
    request: Request, served: Served, texts: list[str], *, cut: bool, clock: Clock
) -> tuple[list[list[float]], int]:
    """Return the vectors, and how many tokens were read."""
    if len(texts) > MAX_INPUTS:
        raise invalid_value("input", f"has {len(texts)} texts; at most {MAX_INPUTS} are accepted")
    clock.start()
    if not texts:
        return [], 0
    if served.hosted is not None:
        return await _hosted(request, served, texts)
    tokens = await asyncio.to_thread(lambda: [_tokens(served, text, cut) for text in texts])
    clock.start()
    vectors = await while_connected(request, embed(served, tokens))
    return vectors.tolist(), sum(map(len, tokens))


def _tokens(served: Served, text: str, cut: bool) -> list[int]:
    """Return the tokens of a text, at most as many as the context takes."""
    tokens = served.tokenizer.encode(check_text(text, "input")) if text else []
    if not tokens:
        raise invalid_value("input", "contains an empty text")
    limit = served.context_length
    if limit is None or len(tokens) <= limit:
        return tokens
    if not cut:
        raise APIError(400, "the input length exceeds the context length", param="input")
    return tokens[:limit]


async def _hosted(request: Request, served: Served, texts: list[str]) -> tuple[list[list[float]], int]:
    answer: Json = await post_to(request, served, "/embeddings", {"input": texts, "encoding_format": "float"})
    try:
        entries: list[Any] = sorted(answer["data"], key=lambda entry: entry["index"])
        vectors = [[float(value) for value in entry["embedding"]] for entry in entries]
        usage = answer.get("usage") or {}
        return vectors, int(usage.get("prompt_tokens") or 0)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise bad_gateway("the model's server did not answer in OpenAI's protocol") from problem
