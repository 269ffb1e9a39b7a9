"""From what the command line says to a server that runs: models, keys, a socket, and an end in good order."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import uvicorn
from fastapi import FastAPI

from tercet.engine.engine import Engine
from tercet.errors import UserError
from tercet.files import read_text
from tercet.model.adapter_config import is_adapter, read_adapter_config
from tercet.model.reference import Reference, parse_reference
from tercet.model.source import base_directories
from tercet.prompt.hosted import HostedModel
from tercet.prompt.local import LocalModel
from tercet.serve.app import make_app
from tercet.serve.models import Models, Served
from tercet.serve.security import HEADER_BYTES, timed_protocol
from tercet.serve.settings import Settings, hash_key
from tercet.serve.worker import Worker

if TYPE_CHECKING:
    from tercet.serve.web.store import Store

KEEP_ALIVE = 30  # seconds that an idle connection stays open for its client's next request
SHORTEST_KEY = 8
_NAMED = re.compile(r"([A-Za-z0-9][\w.:/@-]*)=(.+)", re.DOTALL)

Note = Callable[[str], None]


# Models


@dataclass(frozen=True)
class LoadOptions:
    """How local models are loaded."""

    quantize: str | None = None
    speculate: str | None = None
    max_batch: int | None = None
    max_waiting: int | None = None


def load_models(
    references: Sequence[str], adapters: Sequence[str], options: LoadOptions, note: Note = lambda line: None
) -> Models:
    """Every model that is named, loaded. All names are read before the first is loaded.

    references: ``REF`` or ``NAME=REF``; adapters: ``NAME=DIRECTORY``, each beside the base it belongs to.

    Raises:
        UserError: a wrong reference, two of one name, a model that can't be loaded, an option that would
            do nothing.
    """
    named = [(name, parse_reference(text)) for name, text in map(_split, references)]
    beside = [_adapter(text) for text in adapters]
    names = [name for name, _ in [*named, *beside]]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name}; name one of them otherwise: NAME=REF")
    if not named:
        raise UserError("there is no model to serve; name one: tercet serve REF")
    if not any(reference.is_local for _, reference in named):
        _refuse_local_options(options, beside)
    served: list[Served] = []
    local: list[tuple[LocalModel, Worker]] = []
    try:
        for name, reference in named:
            if not reference.is_local:
                served.append(Served(name, hosted=HostedModel(reference)))
                continue
            note(f"loading {reference.text}")
            model = _load(reference, options)
            worker = Worker(model.engine)
            local.append((model, worker))
            served.append(Served(name, local=worker))
        for name, directory in beside:
            worker = _base_of(directory, local)
            worker.engine.add_adapter(name, directory)
            served.append(Served(name, local=worker, adapter=name))
        return Models(served)
    except BaseException:
        for _, worker in local:
            worker.close()
        raise


def _split(text: str) -> tuple[str, str]:
    """Name and reference; a path that exists is a path, whatever is in it."""
    found = _NAMED.fullmatch(text)
    if found is None or Path(text).expanduser().exists():
        return text, text
    return found[1], found[2]


def _adapter(text: str) -> tuple[str, Path]:
    found = _NAMED.fullmatch(text)
    if found is None:
        raise UserError(f"--adapter {text} has no name; write --adapter NAME=DIRECTORY")
    directory = Path(found[2]).expanduser()
    # A run directory of ours stands for the model in it, as everywhere.
    for candidate in (directory, directory / "model"):
        if is_adapter(candidate):
            return found[1], candidate
    raise UserError(f"--adapter {text}: {directory} is no adapter directory (it has no adapter_config.json)")


def _refuse_local_options(options: LoadOptions, adapters: Sequence[object]) -> None:
    given = [name.replace("_", "-") for name, value in vars(options).items() if value is not None]
    if adapters:
        given.append("adapter")
    if given:
        raise UserError(f"--{given[0]} is for models that run here; all that are named run on other servers")


def _load(reference: Reference, options: LoadOptions) -> LocalModel:
    drafter: Engine | Literal["ngram"] | None = None
    if options.speculate == "ngram":
        drafter = "ngram"
    elif options.speculate is not None:
        smaller = parse_reference(options.speculate)
        if not smaller.is_local:
            raise UserError(f"{smaller.text} is hosted and cannot draft for another model; use a local model")
        drafter = LocalModel(smaller).draft_engine()
    model = LocalModel(reference, quantize=options.quantize, speculation=drafter)
    engine = model.engine
    engine.max_batch = options.max_batch or engine.max_batch
    engine.max_waiting = engine.max_waiting if options.max_waiting is None else options.max_waiting
    return model


def _base_of(directory: Path, local: Sequence[tuple[LocalModel, Worker]]) -> Worker:
    """The engine of the base that an adapter names; the only one there is, whatever it names."""
    if len(local) == 1:
        return local[0][1]
    config = read_adapter_config(directory)
    named = config.base_model or ""
    paths = {path.resolve() for path in base_directories(directory, config)}
    for model, worker in local:
        if model.directory.resolve() in paths or model.reference.name == named:
            return worker
    there = ", ".join(model.reference.text for model, _ in local)
    raise UserError(f"{directory} is an adapter of {named or 'an unnamed base'}, which is not among {there}")


# Keys


def read_keys(given: Sequence[str], file: Path | None) -> tuple[bytes, ...]:
    """The hashes of all API keys: those given, those of a file (one a line), TERCET_API_KEY's.

    Raises:
        UserError: the file can't be read or holds none, or a key is no key.
    """
    keys = [*given]
    if file is not None:
        lines = [line.strip() for line in read_text(file).splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"{file} holds no key; write one a line")
        keys += found
    if not keys and (from_environment := os.environ.get("TERCET_API_KEY", "").strip()):
        keys = [from_environment]
    for key in keys:
        if len(key) < SHORTEST_KEY or not all("!" <= letter <= "~" for letter in key):
            raise UserError(
                f"an API key is {SHORTEST_KEY} or more letters, digits and signs without blanks; make one: "
                "python -c 'import secrets; print(secrets.token_urlsafe(24))'"
            )
    return tuple(dict.fromkeys(hash_key(key) for key in keys))


# The socket


def check_reach(host: str, keys: Sequence[bytes]) -> None:
    """UserError for an address that others can reach, without a key."""
    if keys or is_loopback(host):
        return
    raise UserError(
        f"--host {host} can be reached by others, so it needs a key: --api-key-file FILE, --api-key KEY or "
        "TERCET_API_KEY"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as problem:
        raise UserError(f"--host {host} is no address of this machine ({problem.strerror})") from problem
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def bind(host: str, port: int) -> socket.socket:
    """The socket to listen on. UserError where that can't be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as problem:
        raise UserError(f"--host {host} is no address of this machine ({problem})") from problem
    found = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as problem:
        found.close()
        if problem.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; stop what runs there, or take another with --port "
                "(0: any that is free)"
            ) from problem
        if problem.errno == errno.EACCES:
            raise UserError(f"port {port} is not for this user; take one above 1023 with --port") from problem
        raise UserError(f"{host} port {port} can't be listened on: {problem.strerror}") from problem
    return found


def address_of(listening: socket.socket) -> str:
    """How a client on this machine reaches it: ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# The server


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens.

    And it tells the chat page first that it ends: the page's event streams would never do so by themselves.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.asgi, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let what runs finish for `Settings.drain_timeout` at most, end the engines."""
        page = getattr(self.asgi.state, "page", None)
        if page is not None:
            await page.close()
        await super().shutdown(sockets)


def make_server(app: FastAPI, settings: Settings, ready: Callable[[], None] = lambda: None) -> Server:
    """A server of ``app``, not yet listening; ``ready`` is called when it does."""
    config = uvicorn.Config(
        app,
        http=timed_protocol(settings.read_timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever connects could claim any address
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Server(config, app, ready)


def run(
    models: Models,
    settings: Settings,
    store: Store | None,
    listening: socket.socket,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM; then finish what runs. A second SIGINT does not wait for it.

    ready: called when clients can connect.
    """
    server = make_server(make_app(models, settings, store), settings, ready)
    try:
        with _quiet_signals():
            server.run(sockets=[listening])
    finally:
        models.close()
        if store is not None:
            store.close()


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more when it is done: that is no reason to die of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
