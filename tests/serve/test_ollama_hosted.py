"""Ollama's API in front of a server that speaks only OpenAI's protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from fake_openai_server import DONE, FakeServer, chunk, error, event, spoken, stream, usage_chunk
from running_server import serve_models

from tercet.model.reference import parse_reference
from tercet.prompt.hosted import HostedModel
from tercet.serve.models import Models, Served

HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture
def far() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def url(far: FakeServer) -> Iterator[str]:
    hosted = HostedModel(parse_reference(far.reference), retries=0)
    with serve_models(Models([Served("org/far", hosted=hosted)])) as running:
        yield running.url


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/api/{path}", json=body, timeout=20)


def delta(**fields: Any) -> bytes:
    return event(
        {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "small",
            "choices": [{"index": 0, "delta": fields, "finish_reason": None}],
        }
    )


def test_a_chat_goes_there_as_a_chat_completion(far: FakeServer, url: str) -> None:
    call = {
        "index": 0,
        "id": "c7",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
    }
    far.script += [
        stream(
            delta(reasoning_content="Hm."), chunk("Look."), delta(tool_calls=[call]), chunk(finish="tool_calls"),
            usage_chunk(), DONE,
        )
    ]  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    options = {"temperature": 0.5, "num_predict": 9, "stop": ["END"], "seed": 3, "top_p": 0.9}
    answer = post(
        url, "chat", model="org/far:latest", messages=HI, tools=[tool], options=options, stream=False
    )
    reply = answer.json()
    assert reply["model"] == "org/far:latest" and reply["message"]["content"] == "Look."
    assert reply["message"]["thinking"] == "Hm."
    assert reply["message"]["tool_calls"][0]["function"]["arguments"] == {"city": "Bonn"}
    assert reply["done_reason"] == "stop" and reply["eval_count"] > 0
    sent = far.bodies()[-1]
    assert (
        sent["temperature"] == 0.5 and sent["stop"] == ["END"] and sent["seed"] == 3 and sent["top_p"] == 0.9
    )
    assert 9 in (sent.get("max_tokens"), sent.get("max_completion_tokens"))
    assert sent["messages"] == HI and sent["tools"][0]["function"]["name"] == "weather"


def test_generate_streams_with_a_schema(far: FakeServer, url: str) -> None:
    far.script += [spoken("{", "}")]
    answer = post(url, "generate", prompt="hi", system="Be brief.", format=CITY)
    parts = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(part["response"] for part in parts) == "{}" and parts[-1]["done"]
    assert "context" not in parts[-1]
    sent = far.bodies()[-1]
    assert sent["response_format"]["json_schema"]["schema"] == CITY
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]


def test_errors_there_are_errors_here(far: FakeServer, url: str) -> None:
    far.script += [error(429, "slow down")]
    answer = post(url, "chat", messages=HI)
    assert answer.status_code == 429 and isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "x", "raw": True}, {"prompt": "x", "context": [1]}, {"prompt": "x", "logprobs": True}],
)
def test_what_a_chat_completion_does_not_carry_is_refused(far: FakeServer, url: str, fields: Any) -> None:
    answer = post(url, "generate", **fields)
    assert answer.status_code == 400 and isinstance(answer.json()["error"], str)


def test_the_catalog_lists_hosted_models(url: str) -> None:
    (entry,) = httpx.get(f"{url}/api/tags").json()["models"]
    assert entry["name"] == "org/far:latest" and entry["size"] == 0
    assert httpx.get(f"{url}/api/ps").json() == {"models": []}
    assert post(url, "show", model="org/far").json()["model_info"] == {
        "general.basename": "org/far",
        "general.parameter_count": 0,
    }
