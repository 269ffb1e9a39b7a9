"""A server, over HTTP, of a model that writes a script."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from running_server import serve_models
from script_engine import ScriptBackend, scripted_engine

from tercet.model.tokenizer import Tokenizer
from tercet.serve.models import Models, Served
from tercet.serve.settings import Settings
from tercet.serve.worker import Worker


class ScriptedServer:
    """A server whose one model is called "scripted"."""

    def __init__(self, url: str, backend: ScriptBackend, tokenizer: Tokenizer) -> None:
        self.url, self._backend, self._tokenizer = url, backend, tokenizer

    def says(self, text: str) -> None:
        """Set the answer to every later prompt."""
        self._backend.says = text

    def read(self) -> str:
        """Return all that the model has read for the last answer: the prompt and the answer without its end."""
        return self._tokenizer.decode(self._backend.last, skip_special=False)

    def prompt(self) -> str:
        """Return the prompt of the last answer."""
        text = self.read()
        return text[: text.rindex("<|assistant|>") + len("<|assistant|>")]


@contextlib.contextmanager
def serve_script(tokenizer: Tokenizer, settings: Settings | None = None) -> Iterator[ScriptedServer]:
    engine, backend = scripted_engine(tokenizer)
    with serve_models(Models([Served("scripted", Worker(engine))]), settings) as running:
        yield ScriptedServer(running.url, backend, tokenizer)
