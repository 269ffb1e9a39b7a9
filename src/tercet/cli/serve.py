"""``tercet serve REF...``: serve models over OpenAI's protocol, with a chat page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.cli.command import command
from tercet.serve.settings import ServeSettings, Settings

if TYPE_CHECKING:
    from tercet.serve.models import Models
    from tercet.serve.web.store import Store

EXAMPLE = "tercet serve runs/mine --adapter mine-support=runs/tuned --port 8000"


@command(ServeSettings)
def serve(requested: ServeSettings) -> None:
    """Serve models over HTTP, with a chat page.

    The protocols are those of OpenAI, Anthropic and Ollama.
    """
    from tercet.serve.launch import LoadOptions, address_of, bind, check_reach, load_models, read_keys, run

    keys = read_keys(requested.api_key, requested.api_key_file)
    check_reach(requested.host, keys)
    listening = bind(requested.host, requested.port)
    try:
        loading = LoadOptions(
            requested.quantize,
            requested.speculation,
            requested.max_batch,
            requested.max_waiting,
            requested.sampling,
            requested.control_tokens,
        )
        models = load_models(requested.refs, requested.adapter, loading, _note)
        store = None if requested.no_page else _store(models, requested.data)
    except BaseException:
        listening.close()
        raise
    settings = Settings(
        host=requested.host.lower(),
        port=listening.getsockname()[1],
        keys=keys,
        allowed_hosts=tuple(name.lower() for name in requested.allow_host),
        allowed_origins=tuple(origin.rstrip("/") for origin in requested.allow_origin),
        max_body=int(requested.max_body * 2**20),
        request_timeout=requested.request_timeout,
        strict=requested.strict,
        allow_pull=requested.allow_pull,
    )
    address = address_of(listening)
    run(
        models,
        settings,
        store,
        listening,
        ready=lambda: _announce(models, address, with_key=bool(keys), page=not requested.no_page),
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
