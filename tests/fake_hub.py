"""A server that answers as the Hugging Face Hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"print('no')",
    "onnx/config.json": b"{}",
}


class Hub:
    """Repositories by name, each a dictionary of files; ``downloaded`` lists the files that were sent."""

    def __init__(self) -> None:
        self.files = {
            "org/small": FILES,
            "org/small-GGUF": {
                "README.md": b"about",
                "mmproj-small-Q8_0.gguf": b"GGUF of images",
                "small-Q8_0.gguf": b"GGUF 8",
                "small-Q4_0.gguf": b"GGUF 4",
                "BF16/small-BF16-00001-of-00002.gguf": b"GGUF b1",
                "BF16/small-BF16-00002-of-00002.gguf": b"GGUF b2",
            },
            "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "org/texts": {
                "README.md": b"about",
                "data/train-0.jsonl": b'{"text": "one", "license": "CC0"}\n',
                "data/test-0.jsonl": b'{"text": "two"}\n',
                "weights.bin": b"x",
            },
        }
        self.downloaded: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                api = parts[0] == "api"
                parts = parts[1:] if parts[0] == "datasets" else parts
                name = "/".join(parts[2:4] if api else parts[:2])
                files = outer.files.get(name)
                revision = parts[5] if len(parts) > 5 else "main"
                if not api:
                    revision = parts[3]
                if files is None:
                    self.reply(404, b"{}", {"x-error-code": "RepoNotFound"})
                elif revision not in ("main", "v1", COMMIT):
                    self.reply(404, b"{}", {"x-error-code": "RevisionNotFound"})
                elif api and "tree" in parts[4:5]:
                    entries = [
                        {"type": "file", "path": path, "size": len(data), "oid": oid(data)}
                        for path, data in files.items()
                    ]
                    self.reply(200, json.dumps(entries).encode())
                elif api:
                    siblings = [{"rfilename": path} for path in files]
                    self.reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
                else:
                    path = "/".join(parts[4:])
                    if path not in files:
                        self.reply(404, b"{}", {"x-error-code": "EntryNotFound"})
                        return
                    if self.command == "GET":
                        outer.downloaded.append(path)
                    self.reply(200, files[path], {"etag": f'"{oid(files[path])}"'})

            def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.send_header("x-repo-commit", COMMIT)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
