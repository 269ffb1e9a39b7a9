"""A server of OpenAI's protocol that records the requests and returns scripted answers."""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One HTTP answer: ``body`` at once, or ``pieces`` written and flushed one by one."""

    status: int = 200
    body: bytes = b""
    pieces: list[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    delay: float = 0.0  # seconds before the answer


def completion(text: str, prompt_tokens: int = 7, completion_tokens: int = 3, **choice: Any) -> Answer:
    message = {"role": "assistant", "content": text}
    body = {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "small",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None} | choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return Answer(body=json.dumps(body).encode())


def error(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(body).encode(), headers=named)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def chunk(text: str | None = None, finish: str | None = None, **choice: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    return event(
        {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "small",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish} | choice],
        }
    )


def usage_chunk(prompt_tokens: int = 7, completion_tokens: int = 3) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}
    return event(
        {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "small",
            "choices": [],
            "usage": usage,
        }
    )


DONE = b"data: [DONE]\n\n"


def stream(*pieces: bytes) -> Answer:
    return Answer(pieces=list(pieces), content_type="text/event-stream")


def spoken(*texts: str, finish: str = "stop") -> Answer:
    """Return a complete stream of ``texts``, with usage."""
    return stream(*[chunk(text) for text in texts], chunk(finish=finish), usage_chunk(), DONE)


def models(*names: str) -> Answer:
    data = [{"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in names]
    return Answer(body=json.dumps({"object": "list", "data": data}).encode())


@dataclass
class Seen:
    path: str
    headers: dict[str, str]  # lower-case names
    body: dict[str, Any]


class FakeServer:
    """A server that returns the answers of ``script`` in order, then completions that repeat the last message."""

    def __init__(self) -> None:
        self.script: deque[Answer] = deque()
        self.seen: list[Seen] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _answer(self, body: dict[str, Any]) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append(Seen(self.path, headers, body))
                try:
                    answer = outer.script.popleft()
                except IndexError:
                    answer = outer.echo(body)
                if answer.delay:
                    outer.stopping.wait(answer.delay)
                self.send_response(answer.status)
                self.send_header("content-type", answer.content_type)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.pieces is None:
                    self.send_header("content-length", str(len(answer.body)))
                    self.end_headers()
                    self.wfile.write(answer.body)
                    return
                self.send_header("connection", "close")  # the end of the body is the end of the connection
                self.end_headers()
                for piece in answer.pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()
                self.close_connection = True

        self.stopping = threading.Event()

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # some tests disconnect early

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def echo(body: dict[str, Any]) -> Answer:
        text = body.get("messages", [{"content": ""}])[-1]["content"]
        return spoken(text) if body.get("stream") else completion(text)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def reference(self) -> str:
        return f"{self.url}#small"

    def bodies(self) -> list[dict[str, Any]]:
        return [seen.body for seen in self.seen]

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
