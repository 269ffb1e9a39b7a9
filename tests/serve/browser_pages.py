"""Helpers of the browser tests: headless Chromium against a page server in a separate process."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install -e '.[dev]')"
)
expect = playwright.expect
# A condition that a test waits for holds within a second on an idle machine; the tests beside it may take both cores.
PATIENCE = 60_000  # milliseconds
expect.set_options(timeout=PATIENCE)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)

SERVER = Path(__file__).with_name("page_models.py")
DELAY = 0.002  # seconds per token, where no test acts while an answer is being written


class Server:
    """A server of the page that can be killed and started again on the same port and database."""

    def __init__(self, directory: Path, delay: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.database, self.delay = directory / "chat.db", delay
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(SERVER), str(self.port), str(self.database), str(self.delay)]
        self.process = subprocess.Popen(command)
        for _ in range(1200):
            try:
                urllib.request.urlopen(self.url, timeout=30).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/page/api{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


Open = Callable[..., "Page"]


def say(page: Page, text: str, done: bool = True) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    if done:
        expect(page.locator(".message.assistant:not(.running)").last).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden()


def wait_until_still(page: Page) -> None:
    """Wait until nothing of the conversation has changed for a third of a second."""
    page.evaluate(
        """() => new Promise((resolve) => {
          let timer = setTimeout(resolve, 300);
          new MutationObserver(() => { clearTimeout(timer); timer = setTimeout(resolve, 300); })
            .observe(document.getElementById("thread"), { subtree: true, childList: true, characterData: true });
        })"""
    )


def wait_for_settings(page: Page, server: Server, **settings: Any) -> None:
    """Wait until the server has stored these settings of the page's conversation."""
    path = "/conversations/" + page.url.rpartition("#")[2]
    end = time.monotonic() + PATIENCE / 1000
    while not settings.items() <= server.get(path)["conversation"]["settings"].items():
        assert time.monotonic() < end, "the settings were not sent"
        page.wait_for_timeout(20)


def answer(page: Page) -> Any:
    return page.locator(".message.assistant").last


def texts(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".message .said").all_inner_texts()]
