"""``tercet serve REF...``: serve models over OpenAI's protocol, with a chat page."""

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

Refs = Annotated[
    list[str],
    typer.Argument(
        metavar="REF...",
        help=f"{options.REFERENCE_HELP} NAME=REF sets the name for clients.",
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="LoRA adapter, served under its own name on the weights of its base model; may be repeated.",
    ),
]
Host = Annotated[
    str,
    typer.Option(
        "--host", metavar="H", help="Address to listen on; other addresses than loopback need a key."
    ),
]
Port = Annotated[
    int, typer.Option("--port", metavar="P", min=0, max=65535, help="Port; 0 chooses a free one.")
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option("--api-key", metavar="KEY", help="Key that clients must send (other users see it in ps)."),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="File of keys, one per line; TERCET_API_KEY is another way.",
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option("--max-batch", metavar="N", min=1, help="Largest number of requests in a batch (64)."),
]
MaxWaiting = Annotated[
    int | None,
    typer.Option(
        "--max-waiting",
        metavar="N",
        min=1,
        help="Largest number of waiting requests (1024); more get 429.",
    ),
]
MaxBody = Annotated[
    float, typer.Option("--max-body", metavar="MIB", min=0.001, help="Largest size of a request, in MiB.")
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        "--request-timeout",
        metavar="S",
        min=0.1,
        help="Seconds for one answer, including the time in the queue.",
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        metavar="ORIGIN",
        help="Origin of a web page that may call this server; * for all.",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Host name of this server, beside localhost and IP addresses.",
    ),
]
NoPage = Annotated[bool, typer.Option("--no-page", help="Serve only the API, without the chat page.")]
DataDirectory = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Directory for the page's conversations; default: your data directory.",
    ),
]


def serve(
    refs: Refs,
    adapter: Adapter = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    max_batch: MaxBatch = None,
    max_waiting: MaxWaiting = None,
    max_body: MaxBody = 8,
    request_timeout: RequestTimeout = 600,
    quantize: options.Quantize = None,
    speculation: options.Speculation = None,
    allow_origin: AllowOrigin = None,
    allow_host: AllowHost = None,
    no_page: NoPage = False,
    data: DataDirectory = None,
) -> None:
    """Serve models over HTTP, with a chat page.

    The protocols are those of OpenAI and Anthropic.
    """
    from tercet.serve.launch import LoadOptions, address_of, bind, check_reach, load_models, read_keys, run
    from tercet.serve.settings import Settings

    if no_page and data is not None:
        raise UserError(
            "--data is the directory of the chat page, and --no-page removes the page; leave one of them out"
        )
    keys = read_keys(api_key or [], api_key_file)
    check_reach(host, keys)
    listening = bind(host, port)
    try:
        loading = LoadOptions(quantize, speculation, max_batch, max_waiting)
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
    _note(f"serving {', '.join(model.name for model in models)} at {address}/v1")
    if page:
        _note(f"chat page: {address}/")
    quoted = body.replace("'", "'\\''")
    _note(f"try: curl {address}/v1/{route}{key} -H 'content-type: application/json' -d '{quoted}'")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
