"""Models behind another server: requests are forwarded and responses returned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_openai_server import Answer, FakeServer, completion
from running_server import Running, serve_models
from tiny_model import write_model

from tercet.serve.launch import LoadOptions, load_models
from tercet.serve.models import Models

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def upstream() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def running(upstream: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("TERCET_API_KEY", "our-own-key-for-them")
    models = load_models([f"far={upstream.url}#their-name"], [], LoadOptions())
    monkeypatch.delenv("TERCET_API_KEY")
    with serve_models(models) as running:
        yield running


def test_an_answer_is_passed_on_under_our_name(running: Running, upstream: FakeServer) -> None:
    upstream.script.append(completion("hello"))
    answer = running.client(api_key="the-clients-own").chat.completions.create(
        model="far", messages=HI, temperature=0.5, seed=3, user="u", extra_body={"top_k": 4}
    )
    assert answer.choices[0].message.content == "hello" and answer.model == "far"
    assert answer.usage and answer.usage.prompt_tokens == 7
    sent = upstream.seen[-1]
    assert sent.body == {
        "model": "their-name", "messages": HI, "temperature": 0.5, "seed": 3, "user": "u", "top_k": 4,
    }  # fmt: skip
    # The server's own key is forwarded; the client's is not.
    assert sent.headers["authorization"] == "Bearer our-own-key-for-them"
    assert "the-clients-own" not in json.dumps(sent.headers)
    assert 'tercet_prompt_tokens_total{model="far"} 7.0' in running.http().get("/metrics").text


def test_a_stream_is_passed_on_chunk_by_chunk(running: Running, upstream: FakeServer) -> None:
    def chunk(**choice: Any) -> bytes:
        body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "their-name"}
        return b"data: " + json.dumps(body | {"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"

    pieces = [
        chunk(delta={"role": "assistant", "content": ""}, finish_reason=None),
        chunk(delta={"content": "Grüße"}, finish_reason=None),
        chunk(delta={}, finish_reason="stop"),
        b"data: [DONE]\n\n",
    ]
    upstream.script.append(Answer(pieces=pieces, content_type="text/event-stream"))
    chunks = [*running.client().chat.completions.create(model="far", messages=HI, stream=True)]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Grüße", None]
    assert {chunk.model for chunk in chunks} == {"far"} and chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("status", "error", "expected", "message"),
    [
        (
            400,
            {"message": "too long", "code": "context_length_exceeded", "param": "messages"},
            400,
            "too long",
        ),
        (404, {"message": "no such model"}, 404, "no such model"),
        (422, {"message": "strange"}, 400, "strange"),
        (429, {"message": "slow down"}, 429, "slow down"),
        (401, {"message": "wrong key our-own-key-for-them"}, 502, "rejects the key of this server"),
        (403, {"message": "no"}, 502, "rejects the key of this server"),
        (500, {"message": "boom"}, 502, "boom"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_other_server_are_converted(
    running: Running,
    upstream: FakeServer,
    status: int,
    error: dict[str, Any],
    expected: int,
    message: str,
    stream: bool,
) -> None:
    body = json.dumps({"error": error}).encode()
    upstream.script.extend([Answer(status, body, headers={"retry-after-ms": "1"}) for _ in range(3)])
    with pytest.raises(openai.APIStatusError, match=message) as problem:
        running.client().chat.completions.create(model="far", messages=HI, stream=stream)
    assert problem.value.status_code == expected and "our-own-key" not in str(problem.value)
    assert problem.value.code == (error.get("code") or problem.value.code)


def test_a_server_that_is_not_there_is_502(running: Running, upstream: FakeServer) -> None:
    upstream.close()
    with pytest.raises(openai.InternalServerError, match="cannot reach") as problem:
        running.client().chat.completions.create(model="far", messages=HI)
    assert problem.value.status_code == 502


def test_wrong_requests_are_refused_before_they_are_passed_on(running: Running, upstream: FakeServer) -> None:
    before = len(upstream.seen)
    with pytest.raises(openai.BadRequestError):
        running.client().chat.completions.create(model="far", messages=HI, temperature=5)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        answer = running.http().post(path, json={"model": "far", **body})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_model"
    assert len(upstream.seen) == before


def test_one_of_our_servers_behind_another_says_the_same(tmp_path: Path, tiny_directory: Path) -> None:
    behind = load_models([f"tiny={write_model(tmp_path / 'm', chat=True)}"], [], LoadOptions(quantize="none"))
    with serve_models(behind) as second:
        front = load_models([f"front={second.url}/v1#tiny"], [], LoadOptions())
        with serve_models(front) as first:
            mine, other = first.client(), second.client()
            request: Any = {"prompt": "ab", "seed": 3, "max_tokens": 8, "logprobs": 2}
            here = mine.completions.create(model="front", **request)
            there = other.completions.create(model="tiny", **request)
            assert here.choices == there.choices and here.usage == there.usage
            streamed = mine.completions.create(model="front", **request, stream=True)
            assert "".join(chunk.choices[0].text for chunk in streamed) == there.choices[0].text
            vector = mine.embeddings.create(model="front", input="a b").data[0].embedding
            assert vector == other.embeddings.create(model="tiny", input="a b").data[0].embedding
            raw = first.http().post("/v1/embeddings", json={"model": "front", "input": "a b"}).json()
            assert raw["data"][0]["embedding"] == pytest.approx(vector)
            with pytest.raises(openai.BadRequestError) as long:
                mine.chat.completions.create(model="front", messages=[{"role": "user", "content": "x" * 200}])
            assert long.value.code == "context_length_exceeded"


def test_anthropics_endpoint_gets_nothing_that_it_would_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key-for-anthropic")
    models: Models = load_models(["c=anthropic:some-model"], [], LoadOptions())
    with serve_models(models) as running:
        for extra in (
            {"seed": 1},
            {"logprobs": True},
            {"presence_penalty": 1.0},
            {"response_format": {"type": "json_object"}},
        ):
            with pytest.raises(openai.BadRequestError, match="would ignore it"):
                running.client().chat.completions.create(model="c", messages=HI, extra_body=extra)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"message": "no free worker", "code": 429}}, 429),
        ({"error": {"message": "no free worker"}}, 502),
        ({"error": "no free worker"}, 502),
        ({"detail": "no free worker"}, 502),
    ],
)
def test_an_error_with_status_200_gives_the_other_servers_reason(
    running: Running, upstream: FakeServer, body: dict[str, Any], status: int, stream: bool
) -> None:
    upstream.script += [Answer(body=json.dumps(body).encode())] * 2
    with pytest.raises(openai.APIStatusError, match="no free worker") as problem:
        running.client().chat.completions.create(model="far", messages=HI, stream=stream)
    assert problem.value.status_code == status
    with pytest.raises(openai.APIStatusError, match="no free worker"):
        running.client().responses.create(model="far", input="hi", stream=stream)
