"""Streams begin before the prompt is read, and say how far it is read; errors before that are HTTP errors."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
from running_server import Running, SlowBackend, serve_models, slow_model
from tool_templates import PLAIN, tokenizer_with

from tercet.serve import streaming
from tercet.serve.models import Models

# 1,500 tokens are six feeds of the slow model.
LONG: list[dict[str, Any]] = [{"role": "user", "content": "word " * 300}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": LONG, "max_tokens": 5},
    "/v1/completions": {"prompt": "word " * 300 + "<|assistant|>", "max_tokens": 5},
    "/v1/responses": {"input": "word " * 300, "max_output_tokens": 5},
    "/v1/messages": {"messages": LONG, "max_tokens": 5},
}
FIRST = {
    "/v1/chat/completions": '"role":"assistant"',
    "/v1/completions": ": the request is queued",
    "/v1/responses": "response.created",
    "/v1/messages": "message_start",
}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SILENCE", 0.03)


@pytest.fixture
def slow(frequent: None) -> Iterator[tuple[Running, SlowBackend]]:
    model, backend = slow_model("slow", tokenizer_with(PLAIN), 0.08)
    with serve_models(Models([model])) as running:
        yield running, backend


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_begins_before_the_prompt_is_read_and_tells_the_progress(
    slow: tuple[Running, SlowBackend], path: str
) -> None:
    running, backend = slow
    body = {"model": "slow", "stream": True, **BODIES[path]}
    with running.http() as http, http.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        first = [next(lines), next(lines)]
        assert FIRST[path] in "\n".join(first) and backend.feeds <= 3
        rest = [*lines]
    comments = [line for line in rest if line.startswith(":")]
    counts = [int(line.split()[1]) for line in comments if "tokens of the prompt are read" in line]
    assert len(set(counts)) >= 2 and counts == sorted(counts)
    assert all(line.split()[3].isdecimal() for line in comments if "tokens" in line)
    data = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
    assert "xxxxx" in "".join(json.dumps(piece) for piece in data) or len(data) >= 5


def test_clients_skip_the_comments(slow: tuple[Running, SlowBackend]) -> None:
    running, _ = slow
    messages: Any = LONG
    client = running.client()
    chunks = [*client.chat.completions.create(model="slow", messages=messages, max_tokens=5, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "xxxxx"
    with client.responses.stream(model="slow", input="word " * 299, max_output_tokens=16) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == "x" * 16
    other = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "word " * 298}]
    with other.messages.stream(model="slow", messages=messages, max_tokens=5) as answer:
        assert answer.get_final_text() == "xxxxx"


@pytest.mark.parametrize("path", BODIES)
def test_a_prompt_that_is_too_long_is_still_400(slow: tuple[Running, SlowBackend], path: str) -> None:
    running, _ = slow
    text = json.dumps(BODIES[path]).replace("word ", "word " * 4)
    answer = running.http().post(path, json={"model": "slow", "stream": True, **json.loads(text)})
    assert answer.status_code == 400 and "4096 tokens" in answer.json()["error"]["message"]


def test_the_first_token_is_measured_when_it_comes(slow: tuple[Running, SlowBackend]) -> None:
    running, _ = slow
    body = {"model": "slow", "stream": True, **BODIES["/v1/chat/completions"]}
    running.http().post("/v1/chat/completions", json=body)
    metrics = running.http().get("/metrics").text
    line = next(line for line in metrics.splitlines() if line.startswith("tercet_first_token_seconds_sum"))
    assert float(line.split()[1]) > 0.3


def test_a_stream_without_a_first_event_begins_after_a_while(
    frequent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PATIENCE", 0.05)
    model, backend = slow_model("slow", tokenizer_with(PLAIN), 0)
    busy = model.worker.run(lambda engine: time.sleep(0.4))  # the engine's thread takes no requests meanwhile
    with serve_models(Models([model])) as running:
        backend.seconds = 0.001
        threading.Thread(target=lambda: asyncio.run(_awaited(busy)), daemon=True).start()
        time.sleep(0.05)
        body = {"model": "slow", "stream": True, "messages": LONG[:1], "max_tokens": 3}
        with running.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = [*answer.iter_lines()]
    assert lines[0] == ": waiting for the model" and lines[-2] == "data: [DONE]"
    assert any('"role":"assistant"' in line for line in lines)


async def _awaited(work: Any) -> None:
    await work


def test_a_client_that_leaves_before_the_first_event_frees_the_engine(
    slow: tuple[Running, SlowBackend],
) -> None:
    running, backend = slow
    body = {"model": "slow", "stream": True, **BODIES["/v1/chat/completions"], "max_tokens": 2000}
    with running.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    worker = running.app.state.models.default.worker
    wait_for(lambda: not worker.load.running)
    fed = backend.feeds
    time.sleep(0.3)
    assert worker.load.running == 0 and backend.feeds <= fed + 1
    assert not worker._reading


def test_a_stream_of_a_full_queue_is_429(frequent: None) -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN), max_batch=1, max_waiting=1)
    with serve_models(Models([model])) as running:
        body: dict[str, Any] = {"model": "slow", "messages": [{"role": "user", "content": "a"}]}
        streams = []  # one runs, one waits
        for waiting in range(2):
            streams.append(running.client().chat.completions.create(**body, stream=True))
            next(iter(streams[-1]))
            wait_for(lambda waiting=waiting: model.worker.load.waiting == waiting)
        with pytest.raises(openai.RateLimitError):
            running.client().chat.completions.create(**body, stream=True)
        for stream in streams:
            stream.close()
        assert httpx.get(f"{running.url}/health").status_code == 200
