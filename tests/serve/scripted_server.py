"""A real server, over HTTP, of a model that says what it is told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn
from script_engine import ScriptBackend, engine_saying

from tercet.model.tokenizer import Tokenizer
from tercet.serve.app import make_app
from tercet.serve.models import Models, Served
from tercet.serve.settings import Settings
from tercet.serve.worker import Worker


class ScriptedServer:
    """Serves one model, called "scripted"."""

    def __init__(self, url: str, backend: ScriptBackend, tokenizer: Tokenizer) -> None:
        self.url, self._backend, self._tokenizer = url, backend, tokenizer

    def says(self, text: str) -> None:
        """What comes after every prompt from now on."""
        self._backend.says = text

    def prompt(self) -> str:
        """The prompt of the last answer."""
        text = self._tokenizer.decode(self._backend.last, skip_special=False)
        return text[: text.rindex("<|assistant|>") + len("<|assistant|>")]


@contextlib.contextmanager
def serve_script(tokenizer: Tokenizer, settings: Settings | None = None) -> Iterator[ScriptedServer]:
    engine, backend = engine_saying(tokenizer)
    worker = Worker(engine)
    app = make_app(Models([Served("scripted", worker)]), settings or Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield ScriptedServer(f"http://127.0.0.1:{port}", backend, tokenizer)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
