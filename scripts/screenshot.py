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

QUESTION = "What is the capital of France?"
SIZE = {"width": 1100, "height": 640}


def main(reference: str, out: str) -> None:
    """Serve ``reference``, ask one question in the page, open Inspect and write a PNG to ``out``."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "tercet", "serve", reference, "--port", "0", "--data", data]
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
