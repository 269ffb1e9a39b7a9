"""``tercet serve REF...``: models over OpenAI's protocol, and a chat page, on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli import options
from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.serve.models import Models
    from tercet.serve.web.store import Store

EXAMPLE = "tercet serve runs/mine --adapter mine-support=runs/tuned --port 8000"


def serve(
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            help=f"{options.REFERENCE_HELP} NAME=REF gives it the name that clients call it by.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=DIR",
            help="A LoRA adapter beside its base, whose weights it shares; a model of its own name.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", metavar="H", help="Address to listen on; beyond loopback only with a key."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="P", min=0, max=65535, help="Port; 0 takes any that is free.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", metavar="KEY", help="A key that clients must send (others see it in ps)."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line. Also: TERCET_API_KEY."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", metavar="N", min=1, help="Requests computed at the same time (64)."),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            "--max-waiting", metavar="N", min=1, help="Requests that may wait (1024); more get 429."
        ),
    ] = None,
    max_body: Annotated[
        float, typer.Option("--max-body", metavar="MIB", min=0.001, help="Size of a request, in MiB.")
    ] = 8,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout", metavar="S", min=0.1, help="Seconds for one answer, waiting included."
        ),
    ] = 600,
    quantize: options.Quantize = None,
    speculate: options.Speculate = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="A web page's origin that may call this server; * for all.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A name of this server, beside localhost and addresses."
        ),
    ] = None,
    no_page: Annotated[
        bool, typer.Option("--no-page", help="Serve the API only, without the chat page.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", help="Where the page keeps conversations (your data directory)."
        ),
    ] = None,
) -> None:
    """Serve models over OpenAI's protocol, with a chat page in the browser."""
    from tercet.serve.launch import LoadOptions, address_of, bind, check_reach, load_models, read_keys, run
    from tercet.serve.settings import Settings

    if no_page and data is not None:
        raise UserError("--data is where the chat page keeps conversations, and --no-page leaves it out")
    keys = read_keys(api_key or [], api_key_file)
    check_reach(host, keys)
    listening = bind(host, port)
    try:
        loading = LoadOptions(quantize, speculate, max_batch, max_waiting)
        models = load_models(refs, adapter or [], loading, _note)
        store = None if no_page else _store(models, data)
    except BaseException:
        listening.close()
        raise
    settings = Settings(
        host=host.lower(),
        port=listening.getsockname()[1],
        keys=keys,
        allowed_hosts=tuple(name.lower() for name in allow_host or ()),
        allowed_origins=tuple(origin.rstrip("/") for origin in allow_origin or ()),
        max_body=int(max_body * 2**20),
        request_timeout=request_timeout,
    )
    address = address_of(listening)
    run(
        models,
        settings,
        store,
        listening,
        ready=lambda: _announce(models, address, with_key=bool(keys), page=not no_page),
    )
    _note("stopped")


def _store(models: Models, data: Path | None) -> Store:
    from tercet.serve.web.store import Store

    try:
        return Store(None if data is None else data / "chat.db")
    except BaseException:
        models.close()
        raise


def _announce(models: Models, address: str, *, with_key: bool, page: bool) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    body = json.dumps({"model": models.default.name, "messages": [{"role": "user", "content": "hi"}]})
    route = "chat/completions"
    if not models.default.has_chat_template:
        body = json.dumps({"model": models.default.name, "prompt": "Once upon a time"})
        route = "completions"
    _note(f"serving {', '.join(one.name for one in models)} at {address}/v1")
    if page:
        _note(f"chat page: {address}/")
    quoted = body.replace("'", "'\\''")
    _note(f"try: curl {address}/v1/{route}{key} -H 'content-type: application/json' -d '{quoted}'")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
