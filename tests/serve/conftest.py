"""One small random model behind a real server, for the tests of the API."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in ("prompt", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(autouse=True)
def no_keys_and_no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and proxies of whoever runs the tests stay out of them."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "TERCET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template, a context of 96 tokens, a token a byte."""
    from tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("served") / "tiny", chat=True)


@pytest.fixture(scope="session")
def tiny_url(tiny_directory: Path) -> Iterator[str]:
    """A server of it, called "tiny"."""
    from running_server import local_model, serve_models

    from tercet.serve.models import Models

    with serve_models(Models([local_model("tiny", tiny_directory)])) as running:
        yield running.url
