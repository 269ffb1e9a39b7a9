"""/v1/embeddings: a vector of length 1 for each text."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import Field

from tercet.engine.engine import Engine
from tercet.serve.api.field_table import Body, Used, ignored_of
from tercet.serve.api.fields import ModelName, User
from tercet.serve.api.hosted import pass_on
from tercet.serve.api.prompts import Prompts, encode_prompts, prompt_list
from tercet.serve.errors import invalid_value
from tercet.serve.models import Models, Served
from tercet.serve.streaming import while_connected

router = APIRouter()

MAX_INPUTS = 2048  # as at OpenAI
TURN_TOKENS = 2048  # read between two turns of the engine, so that streams continue meanwhile


class EmbeddingsBody(Body):
    """OpenAI's request."""

    model: ModelName = None
    input: Annotated[
        Prompts, Used("a string, a list of strings, a list of token ids, or a list of such lists")
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Used("a list of numbers, or the bytes of float32 in base64")
    ] = None
    dimensions: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Used("keeps the first components and scales them to length 1"),
    ] = None
    user: User = None


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingsBody) -> Response:
    """Return the mean of the hidden states that the output head reads.

    It is a list of numbers, or the bytes of float32 numbers in base64.
    """
    models: Models = request.app.state.models
    served = models.get(body.model)
    if served.hosted is not None:
        if body.encoding_format is None:  # null means "float" here; the other server's default may differ
            body.encoding_format = "float"
        return await pass_on(request, served, "/embeddings", body)
    body.review(ignored_of(request))
    prompts = prompt_list(body.input)
    if len(prompts) > MAX_INPUTS:
        raise invalid_value(
            "input", f"has {len(prompts)} texts; at most {MAX_INPUTS} are accepted in one request"
        )
    tokens = await encode_prompts(served, prompts, "input", begin=False)
    vectors = await while_connected(request, embed(served, tokens))
    if body.dimensions is not None:
        vectors = shortened(vectors, body.dimensions)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": served.name,
            "usage": {"prompt_tokens": sum(map(len, tokens)), "total_tokens": sum(map(len, tokens))},
        }
    )


async def embed(served: Served, prompts: Sequence[list[int]]) -> NDArray[np.float32]:
    """Return vectors [N, H] of N prompts, computed a few prompts at a time."""
    worker = served.worker
    vectors: list[NDArray[np.float32]] = []
    for part in parts(prompts, TURN_TOKENS):

        def read(engine: Engine, part: Sequence[list[int]] = part) -> NDArray[np.float32]:
            return engine.embed(part, adapter=served.adapter)

        vectors.append(await worker.run(read))
    if worker.meter is not None:
        worker.meter.read(served.adapter, sum(map(len, prompts)))
    return np.concatenate(vectors)


def parts(prompts: Sequence[list[int]], limit: int) -> Iterator[Sequence[list[int]]]:
    """Yield the prompts in order, in parts of at most ``limit`` tokens, or of one longer prompt."""
    begin, size = 0, 0
    for place, prompt in enumerate(prompts):
        if place > begin and size + len(prompt) > limit:
            yield prompts[begin:place]
            begin, size = place, 0
        size += len(prompt)
    yield prompts[begin:]


def shortened(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """Return the first ``dimensions`` of vectors [N, H], scaled to length 1. APIError 400 for more than H."""
    size = vectors.shape[1]
    if dimensions > size:
        raise invalid_value("dimensions", f"is {dimensions}; this model's vectors have {size}")
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (cut / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return scaled


def _encoded(vector: NDArray[np.float32], form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
