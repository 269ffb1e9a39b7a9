"""Full queues, disconnecting clients, timeouts, failing engines and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import pytest
from running_server import client_of, serve_models, slow_model
from tool_templates import PLAIN, tokenizer_with

from tercet.engine.engine import QueueFull
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
from tercet.serve.models import Models
from tercet.serve.settings import Settings
from tercet.serve.worker import EngineStopped

BODY: dict[str, Any] = {"model": "slow", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000}


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_within_a_token_when_its_client_disconnects(path: str, stream: bool) -> None:
    model, backend = slow_model("slow", tokenizer_with(PLAIN))
    body = (
        BODY
        if path.startswith("/v1/chat")
        else {"model": "slow", "prompt": "<|assistant|>", "max_tokens": 2000}
    )
    with serve_models(Models([model])) as running:
        begun = threading.Event()

        async def go_away() -> None:
            async with (
                httpx.AsyncClient(base_url=running.url, timeout=20) as http,
                http.stream("POST", path, json={**body, "stream": stream}) as answer,
            ):
                async for _ in answer.aiter_bytes():
                    begun.set()
                    return

        async def give_up() -> None:
            task = asyncio.ensure_future(go_away())
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(go_away() if stream else give_up())
        assert begun.is_set() == stream
        time.sleep(
            0.1
        )  # a stream begins before its prompt is read: the client may have gone before the first feed
        wait_until(lambda: model.worker.load.running == 0)
        fed = backend.feeds
        time.sleep(0.3)
        assert backend.feeds == fed < 100
        metrics = httpx.get(f"{running.url}/metrics").text
        assert stream or f'tercet_requests_total{{route="{path}",status="499"}} 1.0' in metrics


def test_a_client_that_disconnects_while_it_waits_leaves_the_queue() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN), max_batch=1)
    with (
        serve_models(Models([model])) as running,
        running.client().chat.completions.create(**BODY, stream=True) as first,
    ):
        next(iter(first))
        with pytest.raises(openai.APITimeoutError):
            running.client(timeout=0.3).chat.completions.create(**BODY)
        wait_until(lambda: model.worker.load.waiting == 0)
        assert model.worker.load.running == 1


def test_a_full_queue_is_429_with_a_time_to_come_back() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN), max_batch=1, max_waiting=1)
    with serve_models(Models([model]), Settings(drain_timeout=1)) as running:
        streams = []
        for waiting in (0, 1):
            body = json.dumps({**BODY, "stream": True}).encode()
            streams.append(threading.Thread(target=lambda body=body: _read(running.url, body), daemon=True))
            streams[-1].start()
            wait_until(
                lambda waiting=waiting: (model.worker.load.running, model.worker.load.waiting) == (1, waiting)
            )
        with pytest.raises(openai.RateLimitError) as full:
            running.client().chat.completions.create(**BODY)
        assert full.value.code == "rate_limit_exceeded" and full.value.type == "rate_limit_error"
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert running.client().models.list().data  # the other requests continue


def _read(url: str, body: bytes) -> None:
    with httpx.Client() as http:
        headers = {"content-type": "application/json"}
        with contextlib.suppress(httpx.HTTPError):
            http.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)


def test_more_answers_than_can_ever_wait_are_400() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN), max_waiting=3)
    with serve_models(Models([model])) as running:
        with pytest.raises(openai.BadRequestError, match="at most 3"):
            running.client().chat.completions.create(**BODY, n=4)
        with pytest.raises(openai.BadRequestError, match="3 at once"):
            running.client().completions.create(model="slow", prompt=["a", "b"], n=2)


def test_more_requests_than_the_server_holds_are_429() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    with serve_models(Models([model]), Settings(max_requests=1)) as running:
        with running.client().chat.completions.create(**BODY, stream=True) as first:
            next(iter(first))
            assert running.http().get("/v1/models").status_code == 429
        wait_until(lambda: running.http().get("/v1/models").status_code == 200)


def test_an_answer_that_takes_too_long_is_ended_and_says_so() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    with serve_models(Models([model]), Settings(request_timeout=0.4)) as running:
        with pytest.raises(openai.InternalServerError) as late:
            running.client().chat.completions.create(**BODY)
        assert late.value.status_code == 503 and late.value.code == "request_timeout"
        assert late.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match=r"longer than the 0\.4 s"):
            for _ in running.client().chat.completions.create(**BODY, stream=True):
                pass
        wait_until(lambda: model.worker.load.running == 0)


def test_an_engine_that_fails_is_500_in_shape_and_goes_on_afterwards() -> None:
    model, backend = slow_model("slow", tokenizer_with(PLAIN), 0)
    with serve_models(Models([model])) as running:
        client = running.client()
        well, feed = (
            client.completions.create(model="slow", prompt="<|assistant|>").choices[0].text,
            backend.feed,
        )

        def fail(chunks: Any) -> Any:
            raise MemoryError("secret detail")

        backend.feed = fail  # type: ignore[method-assign]
        with pytest.raises(openai.InternalServerError) as problem:
            client.completions.create(model="slow", prompt="<|assistant|>")
        assert problem.value.status_code == 500 and "secret" not in str(problem.value)
        backend.feed = feed  # type: ignore[method-assign]
        assert client.completions.create(model="slow", prompt="<|assistant|>").choices[0].text == well
        assert running.http().get("/health").json() == {"status": "ok"}


def test_an_error_in_the_middle_of_a_stream_is_an_event_and_the_stream_ends() -> None:
    model, backend = slow_model("slow", tokenizer_with(PLAIN), 0.01)
    with serve_models(Models([model])) as running:
        feed = backend.feed

        def fail_later(chunks: Any) -> Any:
            if backend.feeds > 5:
                raise RuntimeError("broken")
            return feed(chunks)

        backend.feed = fail_later  # type: ignore[method-assign]
        answer = running.http().post("/v1/chat/completions", json={**BODY, "stream": True})
        *_, error, done, _ = answer.text.split("\n\n")
        assert answer.status_code == 200 and done == "data: [DONE]"
        problem = json.loads(error.removeprefix("data: "))["error"]
        assert set(problem) == {"message", "type", "param", "code"} and problem["type"] == "server_error"
        backend.feeds = 0
        with pytest.raises(openai.APIError, match="the server failed"):
            for _ in running.client().chat.completions.create(**BODY, stream=True):
                pass


def test_a_shutdown_finishes_what_runs_and_takes_nothing_new() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    with serve_models(Models([model])) as running:
        with running.client().chat.completions.create(**{**BODY, "max_tokens": 40}, stream=True) as stream:
            chunks = [next(iter(stream))]
            running.stop()
            wait_until(lambda: not _answers(running.url))
            chunks += [*stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert sum(len(chunk.choices[0].delta.content or "") for chunk in chunks) == 40
        running.thread.join(timeout=10)
        assert not running.thread.is_alive() and not model.worker.alive


def test_a_shutdown_does_not_wait_for_ever() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    with (
        serve_models(Models([model]), Settings(drain_timeout=1)) as running,
        running.client().chat.completions.create(**BODY, stream=True) as stream,
    ):
        next(iter(stream))
        running.stop()
        running.thread.join(timeout=6)
        assert not running.thread.is_alive()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def test_many_clients_at_once_get_the_same_answers_as_alone(tiny_url: str) -> None:
    client = client_of(tiny_url)
    request: Any = {"model": "tiny", "temperature": 1, "max_tokens": 10}
    alone = [
        client.completions.create(**request, prompt="ab", seed=seed).choices[0].text for seed in range(12)
    ]
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        texts[seed] = client.completions.create(**request, prompt="ab", seed=seed).choices[0].text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[seed] for seed in range(12)] == alone


# The worker by itself


def test_a_worker_queues_all_of_some_requests_or_none() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN), max_batch=1, max_waiting=2)
    worker = model.worker
    tokens = tuple(worker.engine.tokenizer.encode("<|assistant|>"))
    right = Request(tokens, Sampling(max_tokens=3, temperature=0))

    async def go() -> None:
        with pytest.raises(UserError, match="empty"):
            await worker.generate([right, Request((), Sampling())])
        with pytest.raises(UserError, match="2 at most"):
            await worker.generate([right] * 3)
        results = await asyncio.gather(
            *(worker.generate([right, right]) for _ in range(3)), return_exceptions=True
        )
        assert sum(isinstance(result, QueueFull) for result in results) == 2
        assert [
            completion.text for result in results if isinstance(result, list) for completion in result
        ] == ["xxx", "xxx"]
        assert await worker.drain(5) and worker.load.running == worker.load.waiting == 0

    asyncio.run(go())
    worker.close()


def test_deltas_between_two_reads_are_joined() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN), 0.001)
    worker = model.worker
    tokens = tuple(worker.engine.tokenizer.encode("<|assistant|>"))
    requests = [Request(tokens, Sampling(max_tokens=count, temperature=0, logprobs=0)) for count in (20, 30)]

    async def go() -> None:
        stream = worker.stream(requests)
        deltas = [await anext(stream)]
        await asyncio.to_thread(wait_until, lambda: not worker.engine.has_work)
        await asyncio.sleep(0.05)
        deltas += [delta async for delta in stream]
        assert len(deltas) <= 5
        for index, count in enumerate((20, 30)):
            mine = [delta for delta in deltas if delta.index == index]
            assert "".join(delta.text for delta in mine) == "x" * count
            assert sum(len(delta.tokens) for delta in mine) == count
            assert sum(len(delta.logprobs or ()) for delta in mine) == count
            assert [delta.completion is not None for delta in mine] == [False] * (len(mine) - 1) + [True]

    asyncio.run(go())
    worker.close()


def test_a_worker_runs_functions_between_turns_and_raises_what_they_raise() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    worker = model.worker
    tokens = tuple(worker.engine.tokenizer.encode("<|assistant|>"))

    def fail(engine: object) -> None:
        raise ValueError("no")

    async def go() -> None:
        stream = worker.stream([Request(tokens, Sampling(max_tokens=500, temperature=0))])
        await anext(stream)
        assert await worker.run(lambda engine: engine is worker.engine)
        with pytest.raises(ValueError, match="no"):
            await worker.run(fail)
        await stream.aclose()
        assert await worker.drain(5)

    asyncio.run(go())
    worker.close()


def test_requests_to_a_closed_worker_end_at_once() -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    worker = model.worker
    tokens = tuple(worker.engine.tokenizer.encode("<|assistant|>"))

    async def go() -> None:
        running = asyncio.ensure_future(worker.generate([Request(tokens, Sampling(max_tokens=500))]))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(worker.close)
        for waiting in (running, worker.run(lambda engine: 1), worker.generate([Request(tokens)])):
            with pytest.raises(EngineStopped, match="shutting down"):
                await asyncio.wait_for(waiting, 5)

    asyncio.run(go())
