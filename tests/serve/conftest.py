"""Fixtures of the serving tests: a small random model behind a real server, the store and the chat page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from browser_pages import Open, Server
    from page_tab import Tab
    from playwright.sync_api import Browser, Page

    from tercet.serve.web.store import Store

for folder in ("prompt", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(autouse=True)
def no_keys_and_no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the API keys and proxies of the environment from the tests."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "TERCET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with a chat template, a context of 96 tokens and one token for each byte."""
    from tiny_model import write_model

    return write_model(tmp_path_factory.mktemp("served") / "tiny", chat=True)


@pytest.fixture(scope="session")
def tiny_url(tiny_directory: Path) -> Iterator[str]:
    """Return the address of a server whose one model, "tiny", is that checkpoint."""
    from running_server import local_model, serve_models

    from tercet.serve.models import Models

    with serve_models(Models([local_model("tiny", tiny_directory)])) as running:
        yield running.url


# The store and the page without a browser


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chat.db"


@pytest.fixture
def store(store_path: Path) -> Iterator[Store]:
    from tercet.serve.web.store import Store

    store = Store(store_path)
    yield store
    store.close()


@pytest.fixture
def tab(store: Store) -> Iterator[Tab]:
    """Open a tab on a server of the scripted models."""
    from page_models import scripted_models
    from page_tab import Tab
    from running_server import serve_models

    with serve_models(scripted_models(), store=store) as running:
        yield Tab(running)


@pytest.fixture
def tiny(store: Store, tiny_directory: Path) -> Iterator[Tab]:
    """Open a tab on a server of the small random model."""
    from page_tab import Tab
    from running_server import local_model, serve_models

    from tercet.serve.models import Models

    with serve_models(Models([local_model("tiny", tiny_directory)]), store=store) as running:
        yield Tab(running)


# The page in a browser


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from browser_pages import DELAY, Server

    server = Server(tmp_path_factory.mktemp("page"), DELAY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def slow_page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from browser_pages import Server

    server = Server(tmp_path_factory.mktemp("slow"), 0.01)
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from browser_pages import CHROMIUM, playwright

    # As root in a container, Chromium cannot set up its own sandbox.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open tabs; at the end no tab may have logged an error or sent a request to another host."""
    from browser_pages import PATIENCE, expect

    contexts, problems = [], []

    def open_tab(url: str, lost: bool = False, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        return watched(context.new_page(), url, lost)

    def watched(page: Page, url: str, lost: bool) -> Page:
        origin = "/".join(url.split("/")[:3])

        def check_origin(request: Any) -> None:
            if not request.url.startswith((origin, "data:", "blob:")):
                problems.append(f"requested {request.url}")

        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("request", check_origin)
        if not lost:  # a killed server causes console errors
            page.on(
                "console",
                lambda message: (
                    problems.append(message.text) if message.type in ("error", "warning") else None
                ),
            )
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.goto(url)
        expect(page.locator("#model option").first).to_be_attached()
        return page

    open_tab.again = watched  # type: ignore[attr-defined]
    yield open_tab
    for context in contexts:
        context.close()
    assert problems == []
