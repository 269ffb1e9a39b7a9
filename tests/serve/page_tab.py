"""A tab of the chat page without a browser: it sends the page's requests to a server."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from page_models import ScriptedWorker
from running_server import Running

Json = dict[str, Any]


class Tab:
    """Sends the requests that a tab of the browser sends."""

    def __init__(self, running: Running) -> None:
        self.running, self.http = running, running.http()

    def ask(self, method: str, path: str, body: Json | None = None, status: int = 200) -> Any:
        answer = self.http.request(method, f"/page/api{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def begin(self, kind: str = "chat", **settings: Any) -> str:
        made = self.ask("POST", "/conversations", {"kind": kind, "settings": settings})
        return str(made["conversation"]["id"])

    def view(self, name: str) -> Json:
        response: Json = self.ask("GET", f"/conversations/{name}")
        return response

    def say(self, name: str, content: str, wait: bool = True) -> Json:
        leaf = self.view(name)["conversation"]["leaf"]
        self.ask("POST", f"/conversations/{name}/messages", {"content": content, "parent": leaf})
        return self.settled(name) if wait else self.view(name)

    def settled(self, name: str) -> Json:
        """Wait until no answer is being written; return the view."""
        page = self.running.app.state.page
        wait_until(lambda: not page.answers.of(name))
        return self.view(name)

    def last(self, name: str) -> Json:
        message: Json = self.view(name)["turns"][-1]["message"]
        return message

    @contextlib.contextmanager
    def events(self, name: str) -> Iterator[Iterator[Json]]:
        with self.http.stream("GET", f"/page/api/conversations/{name}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            yield (json.loads(line.removeprefix("data: ")) for line in lines)


def wait_until(ready: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.005)


def worker_of(tab: Tab, name: str = "tiny-chat") -> ScriptedWorker:
    worker: ScriptedWorker = tab.running.app.state.models.get(name).local
    return worker
