"""Requests that set no sampling fields, over HTTP: the model's defaults hold in every endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, local_model, serve_models

from tercet.serve.models import Models

PUBLISHED = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.7}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def running(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve one model under four names: as published, without published values, greedy and neutral."""
    directory = tmp_path_factory.mktemp("published") / "model"
    directory.mkdir()
    for file in tiny_directory.iterdir():
        if file.name != "generation_config.json":
            os.link(file, directory / file.name)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **PUBLISHED}))
    models = [local_model("published", directory), local_model("plain", tiny_directory)]
    for choice in ("greedy", "neutral"):
        models.append(local_model(choice, directory))
        models[-1].sampling = choice  # type: ignore[assignment]
    with serve_models(Models(models)) as running:
        yield running


def chat(running: Running, model: str, **fields: Any) -> str:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 20, "seed": 1, **fields}
    return str(
        running.http().post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    )


def message(running: Running, model: str, **fields: Any) -> str:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 20, **fields}
    return "".join(b["text"] for b in running.http().post("/v1/messages", json=body).json()["content"])


def response(running: Running, model: str, **fields: Any) -> str:
    body = {"model": model, "input": "hi", "max_output_tokens": 20, **fields}
    output = running.http().post("/v1/responses", json=body).json()["output"]
    return str(output[0]["content"][0]["text"])


def completion(running: Running, model: str, **fields: Any) -> str:
    body = {"model": model, "prompt": "hi", "max_tokens": 20, "seed": 1, **fields}
    return str(running.http().post("/v1/completions", json=body).json()["choices"][0]["text"])


@pytest.mark.parametrize("ask", [chat, message, response, completion])
def test_published_values_hold_where_a_request_sets_none(running: Running, ask: Any) -> None:
    # With top_k 1 nothing is drawn, so that the answers are the same every time.
    with_penalty = ask(running, "published")
    assert with_penalty == ask(running, "published")
    greedy = ask(running, "plain", temperature=0)
    assert with_penalty != greedy
    assert ask(running, "published", temperature=0) == greedy
    assert ask(running, "greedy") == greedy


@pytest.mark.parametrize("ask", [chat, completion])  # the protocols with a seed
def test_a_request_overrides_them_field_by_field(running: Running, ask: Any) -> None:
    assert ask(running, "published", repetition_penalty=1) == ask(running, "plain", temperature=0)
    assert ask(running, "neutral") == ask(running, "plain", temperature=1)
    assert ask(running, "plain") == ask(running, "plain", temperature=0.7)


def test_the_list_of_models_shows_what_applies(running: Running) -> None:
    models = {model["id"]: model["sampling"] for model in running.http().get("/v1/models").json()["data"]}
    off = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert models == {
        "published": {**off, "temperature": 1.0, "top_k": 1, "repetition_penalty": 1.7},
        "plain": off,
        "greedy": {**off, "temperature": 0.0},
        "neutral": {**off, "temperature": 1.0},
    }
    created = running.http().post(
        "/v1/responses", json={"model": "greedy", "input": "hi", "max_output_tokens": 1}
    )
    assert created.json()["temperature"] == 0
