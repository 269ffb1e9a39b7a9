"""Servers as `tercet serve` runs them, each in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
from fastapi import FastAPI
from numpy.typing import NDArray
from script_engine import ScriptBackend

from tercet.engine.backend import Chunk
from tercet.engine.engine import Engine
from tercet.model.reference import parse_reference
from tercet.model.tokenizer import Tokenizer
from tercet.prompt.local import LocalModel
from tercet.serve.app import make_app
from tercet.serve.launch import Server, address_of, bind, make_server
from tercet.serve.models import Models, Served
from tercet.serve.settings import Settings
from tercet.serve.worker import Worker


def local_model(name: str, directory: Path, **options: Any) -> Served:
    """Serve a checkpoint without quantization."""
    model = LocalModel(parse_reference(str(directory)), quantize="none", threads=1, **options)
    return Served(name, local=Worker(model.engine))


@dataclass
class Running:
    """A running server and its clients."""

    url: str
    app: FastAPI
    server: Server
    thread: threading.Thread
    clients: list[openai.OpenAI | httpx.Client] = field(default_factory=list)

    def client(self, **options: Any) -> openai.OpenAI:
        """Return OpenAI's client, without retries."""
        client = client_of(self.url, **options)
        self.clients.append(client)
        return client

    def http(self, **options: Any) -> httpx.Client:
        """Return an HTTP client, for requests that OpenAI's client cannot send."""
        client = httpx.Client(base_url=self.url, timeout=20, **options)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        """Begin a graceful shutdown."""
        self.server.should_exit = True


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        **{"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 20, **options}
    )


@contextlib.contextmanager
def serve_models(models: Models, settings: Settings | None = None, store: Any = None) -> Iterator[Running]:
    settings = settings or Settings()
    app = make_app(models, settings, store)
    server, listening = make_server(app, settings), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    running = Running(address_of(listening), app, server, thread)
    try:
        yield running
    finally:
        # A stream that a test has not read to its end keeps its request running, and a shutdown waits for that.
        for client in running.clients:
            client.close()
        server.should_exit = True
        thread.join(timeout=2)
        # A client of a fixture for the whole session may have left a stream open too; nobody reads it any more.
        server.force_exit = True
        thread.join(timeout=1)
        models.close()


class SlowBackend(ScriptBackend):
    """A backend that waits at every feed and counts the feeds."""

    def __init__(self, tokenizer: Tokenizer, seconds: float) -> None:
        super().__init__(tokenizer)
        self.seconds, self.feeds = seconds, 0

    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        self.feeds += 1
        time.sleep(self.seconds)
        return super().feed(chunks)


def slow_model(
    name: str, tokenizer: Tokenizer, seconds: float = 0.02, **limits: int
) -> tuple[Served, SlowBackend]:
    """Return a model that writes the letter x without end, one every ``seconds`` seconds, and its backend."""
    backend = SlowBackend(tokenizer, seconds)
    backend.says = "x" * 3000
    assert tokenizer.eos_id is not None
    engine = Engine(backend, tokenizer, [tokenizer.eos_id], **limits)
    return Served(name, local=Worker(engine)), backend
