"""Start a server: load the models, read the keys, open the socket, serve, and shut down in good order."""

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
from tercet.engine.request import SamplingChoice
from tercet.errors import UserError
from tercet.files import read_text
from tercet.model.adapter_config import is_adapter, read_adapter_config
from tercet.model.control_text import ControlTokenMode
from tercet.model.reference import Reference, parse_reference
from tercet.model.source import is_base
from tercet.prompt.hosted import HostedModel
from tercet.prompt.local import LocalModel
from tercet.serve.app import make_app
from tercet.serve.models import Models, Served, check_names
from tercet.serve.security import HEADER_BYTES, timed_protocol
from tercet.serve.settings import Settings, hash_key
from tercet.serve.worker import Worker

if TYPE_CHECKING:
    from tercet.serve.web.store import Store

KEEP_ALIVE = 30  # seconds that an idle connection stays open for the client's next request
SHORTEST_KEY = 8
_NAMED = re.compile(r"([A-Za-z0-9][\w.:/@-]*)=(.+)", re.DOTALL)

Note = Callable[[str], None]


# Models


@dataclass(frozen=True)
class LoadOptions:
    """How local models are loaded. None: the engine's default.

    quantize: form of the weights in memory, as for `tercet.LLM`.
    speculation: "ngram", or the reference of a draft model.
    max_batch: largest number of requests in a batch.
    max_waiting: largest number of waiting requests.
    sampling: what chooses the next token where a request does not say.
    control_tokens: what control tokens that messages spell become.
    """

    quantize: str | None = None
    speculation: str | None = None
    max_batch: int | None = None
    max_waiting: int | None = None
    sampling: SamplingChoice | None = None
    control_tokens: ControlTokenMode | None = None


def load_models(
    references: Sequence[str], adapters: Sequence[str], options: LoadOptions, note: Note = lambda line: None
) -> Models:
    """Load every named model. All names are checked before the first model is loaded.

    Args:
        references: ``REF`` or ``NAME=REF``.
        adapters: ``NAME=DIRECTORY``, each served on the weights of its base model.
        options: how local models are loaded.
        note: called with a line of progress for each model.

    Raises:
        UserError: a wrong reference, two models of one name, a model that cannot be loaded, an option
            that would do nothing.
    """
    named = [(name, parse_reference(text)) for name, text in map(_split, references)]
    named_adapters = [_adapter(text) for text in adapters]
    names = [name for name, _ in named]
    check_names(names)
    check_names([*names, *(name for name, _ in named_adapters)])
    if not any(reference.is_local for _, reference in named):
        _refuse_local_options(options, named_adapters)
    sampling: SamplingChoice = options.sampling or "default"
    control_tokens: ControlTokenMode = options.control_tokens or "text"
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
            served.append(
                Served(
                    name,
                    local=worker,
                    reference=reference,
                    sampling=sampling,
                    control_tokens=control_tokens,
                )
            )
        for name, directory in named_adapters:
            worker = _base_of(directory, local)
            worker.engine.add_adapter(name, directory)
            served.append(
                Served(
                    name,
                    local=worker,
                    adapter=name,
                    reference=parse_reference(str(directory)),
                    sampling=sampling,
                    control_tokens=control_tokens,
                )
            )
        return Models(served)
    except BaseException:
        for _, worker in local:
            worker.close()
        raise


def _split(text: str) -> tuple[str, str]:
    """Split name and reference. An existing path is a path, even with a = in it."""
    match = _NAMED.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        return text, text
    return match[1], match[2]


def _adapter(text: str) -> tuple[str, Path]:
    match = _NAMED.fullmatch(text)
    if match is None:
        raise UserError(f"`adapter` {text} has no name; write NAME=DIRECTORY")
    directory = Path(match[2]).expanduser()
    # A run directory stands for the model in it, as everywhere.
    for candidate in (directory, directory / "model"):
        if is_adapter(candidate):
            return match[1], candidate
    raise UserError(
        f"`adapter` {text}: {directory} is not an adapter directory (it has no adapter_config.json)"
    )


def _refuse_local_options(options: LoadOptions, adapters: Sequence[object]) -> None:
    names = [name for name, value in vars(options).items() if value is not None]
    if adapters:
        names.append("adapter")
    if names:
        raise UserError(f"`{names[0]}` is for local models; every model of this server is hosted")


def _load(reference: Reference, options: LoadOptions) -> LocalModel:
    drafter: Engine | Literal["ngram"] | None = None
    if options.speculation == "ngram":
        drafter = "ngram"
    elif options.speculation is not None:
        smaller = parse_reference(options.speculation)
        if not smaller.is_local:
            raise UserError(
                f"{smaller.text} is a hosted model and cannot be a draft model; use a local model"
            )
        drafter = LocalModel(smaller).draft_engine()
    model = LocalModel(reference, quantize=options.quantize, speculation=drafter)
    engine = model.engine
    engine.max_batch = options.max_batch or engine.max_batch
    engine.max_waiting = engine.max_waiting if options.max_waiting is None else options.max_waiting
    return model


def _base_of(directory: Path, local: Sequence[tuple[LocalModel, Worker]]) -> Worker:
    """Return the worker of an adapter's base model; of the only local model, whichever base is named."""
    if len(local) == 1:
        return local[0][1]
    config = read_adapter_config(directory)
    base = config.base_model or ""
    for model, worker in local:
        if is_base(model.reference, model.directory, directory, config):
            return worker
    models = ", ".join(model.reference.text for model, _ in local)
    raise UserError(
        f"{directory} is an adapter of {base or 'an unnamed base'}, which is not among the models: {models}"
    )


# Keys


def read_keys(api_keys: Sequence[str], api_key_file: Path | None) -> tuple[bytes, ...]:
    """Return the hashes of all API keys.

    Args:
        api_keys: keys themselves.
        api_key_file: a file of keys, one per line; lines that begin with # are comments.

    The environment variable TERCET_API_KEY holds the key where neither is set.

    Raises:
        UserError: the file cannot be read or contains no key, or a key is malformed.
    """
    keys = [*api_keys]
    if api_key_file is not None:
        lines = [line.strip() for line in read_text(api_key_file).splitlines()]
        keys_in_file = [line for line in lines if line and not line.startswith("#")]
        if not keys_in_file:
            raise UserError(f"{api_key_file} contains no key; write one per line")
        keys += keys_in_file
    if not keys and (from_environment := os.environ.get("TERCET_API_KEY", "").strip()):
        keys = [from_environment]
    for key in keys:
        if len(key) < SHORTEST_KEY or not all("!" <= letter <= "~" for letter in key):
            raise UserError(
                f"an API key must be {SHORTEST_KEY} or more letters, digits and signs without spaces; make one: "
                "python -c 'import secrets; print(secrets.token_urlsafe(24))'"
            )
    return tuple(dict.fromkeys(hash_key(key) for key in keys))


# The socket


def check_reach(host: str, keys: Sequence[bytes]) -> None:
    """Raise UserError for an address that other machines can reach, unless there is a key."""
    if keys or is_loopback(host):
        return
    raise UserError(
        f"other machines can reach `host` {host}, so it needs a key: set `api_key_file`, `api_key` or "
        "TERCET_API_KEY"
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        addresses = socket.getaddrinfo(host, None)
    except OSError as problem:
        raise UserError(f"`host` {host} is not an address of this machine ({problem.strerror})") from problem
    return all(ipaddress.ip_address(address[4][0]).is_loopback for address in addresses)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to ``host`` and ``port``. UserError where the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as problem:
        raise UserError(f"`host` {host} is not an address of this machine ({problem})") from problem
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as problem:
        listening.close()
        if problem.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; stop the program that uses it, or choose another `port` "
                "(0: any free one)"
            ) from problem
        if problem.errno == errno.EACCES:
            raise UserError(
                f"this user may not listen on port {port}; choose a `port` above 1023"
            ) from problem
        raise UserError(f"cannot listen on port {port} of {host}: {problem.strerror}") from problem
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the URL for a client on this machine, such as ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# The server


class Server(uvicorn.Server):
    """uvicorn's server, with a callback once it listens.

    At shutdown it first closes the chat page, whose event streams would never end by themselves.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.asgi, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting requests, let running ones finish within `Settings.drain_timeout`, stop the engines."""
        page = getattr(self.asgi.state, "page", None)
        if page is not None:
            await page.close()
        await super().shutdown(sockets)


def make_server(app: FastAPI, settings: Settings, ready: Callable[[], None] = lambda: None) -> Server:
    """Return a server of ``app`` that does not listen yet; it calls ``ready`` once it does."""
    config = uvicorn.Config(
        app,
        http=timed_protocol(settings.read_timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # any client could claim any address
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
    """Serve until SIGINT or SIGTERM, then finish running requests. A second SIGINT stops at once.

    ready: called once clients can connect.
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
    """Ignore the signals that uvicorn raises once more after it has shut down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
