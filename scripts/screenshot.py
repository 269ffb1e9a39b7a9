"""Take the screenshot of the chat page that the README shows, from a running server with a real model.

    python scripts/screenshot.py REF docs/images/chat-page.png

Needs Chromium and playwright (`pip install -e '.[dev]'`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

QUESTION = "What is the capital of France?"
SIZE = {"width": 1100, "height": 640}


def main(reference: str, out: str) -> None:
    """Serve ``reference``, ask one question in the page, open Inspect and write a PNG to ``out``."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as data:
        command = [
            sys.executable,
            "-m",
            "tercet",
            "serve",
            reference,
            "--port",
            "0",
            "--data",
            data,
            "--quantize",
            "none",
        ]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            address = _address(server)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport=SIZE, color_scheme="light")
                page.goto(address)
                _ask(page)
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=out)
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        if match := re.search(r"chat page: (\S+)", line):
            return match[1]
    sys.exit("the server ended before it printed its address")


def _ask(page: Page) -> None:
    """Ask the question with a low temperature, wait for the whole answer, and select a token in Inspect."""
    page.locator("#settings-toggle").click()
    page.get_by_label("Temperature").fill("0")
    page.locator("#settings-toggle").click()
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.get_by_label("Message", exact=True).press("Enter")
    page.locator(".message.assistant:not(.running)").last.wait_for(timeout=300_000)
    page.locator("#inspect").click()
    page.locator(".message.assistant .said .token").nth(3).click()
    page.wait_for_timeout(500)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
