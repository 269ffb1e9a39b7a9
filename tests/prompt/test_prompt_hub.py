"""Names on the Hub, in separate processes that use the address of a small fake Hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

COMMIT = "1" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"print('no')",
    "onnx/config.json": b"{}",
}
FETCH = (
    "import sys\n"
    "from tercet.errors import UserError\n"
    "from tercet.model.hub import fetch\n"
    "try: print(fetch(*sys.argv[1:]))\n"
    "except UserError as problem: print('error:', problem)\n"
)


class Hub:
    def __init__(self) -> None:
        self.files = {
            "org/small": FILES,
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
                parts = urlsplit(self.path).path.strip("/").split("/")
                api = parts[0] == "api"
                parts = parts[1:] if parts[0] == "datasets" else parts
                name = "/".join(parts[2:4] if api else parts[:2])
                files = outer.files.get(name)
                revision = parts[5] if api else parts[3]
                if files is None:
                    self.reply(404, b"{}", {"x-error-code": "RepoNotFound"})
                elif revision not in ("main", "v1", COMMIT):
                    self.reply(404, b"{}", {"x-error-code": "RevisionNotFound"})
                elif api and parts[4] == "tree":
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


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def fetch(endpoint: str, home: Path, *arguments: str, **environment: str) -> str:
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    variables = {**ours, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments], env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_weights_and_configuration_are_fetched_once_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    directory = Path(fetch(hub.url, tmp_path, "org/small", "v1"))
    assert sorted(path.name for path in directory.rglob("*") if path.is_file()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert sorted(hub.downloaded) == ["chat_template.jinja", "config.json", "model.safetensors"]
    hub.close()
    # Without the Hub, cached files still work, whether the Hub is unreachable or HF_HUB_OFFLINE is set.
    assert fetch(hub.url, tmp_path, "org/small", "v1") == str(directory)
    assert fetch(hub.url, tmp_path, "org/small", "v1", HF_HUB_OFFLINE="1") == str(directory)


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    assert f"error: no model org/none on {hub.url}" in fetch(hub.url, tmp_path, "org/none")
    assert "org/small has no revision 'v9'" in fetch(hub.url, tmp_path, "org/small", "v9")
    assert "org/pickled holds no .safetensors" in fetch(hub.url, tmp_path, "org/pickled")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    message = fetch("http://127.0.0.1:9", tmp_path, "org/small")
    assert message.startswith(
        "error: org/small is neither a directory here nor in the cache, and http://127.0.0.1:9 "
    )
    assert "cannot be reached" in message
    assert "\n" not in message
    assert "HF_HUB_OFFLINE forbids" in fetch("http://127.0.0.1:9", tmp_path, "org/small", HF_HUB_OFFLINE="1")


def test_a_data_set_is_read_through_the_cache(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tercet.data.documents import read_documents\n"
        "from tercet.errors import UserError\n"
        "try: print([(d.text, d.licence) for d in read_documents(sys.argv[1:])])\n"
        "except UserError as problem: print('error:', problem)\n"
    )

    def read(source: str, **more: str) -> str:
        # Other tests set HF_HUB_OFFLINE for this process.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**ours, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **more}
        done = subprocess.run(
            [sys.executable, "-c", code, source], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert read("hub:org/texts#data/train-*") == "[('one', 'CC0')]"
    assert hub.downloaded == ["data/train-0.jsonl"]
    assert read("hub:org/texts@v1") == "[('about', None), ('two', None), ('one', 'CC0')]"
    assert "weights.bin" not in hub.downloaded
    # Cached files need no connection; files fetched by other patterns are not read.
    assert read("hub:org/texts#data/train-*", HF_HUB_OFFLINE="1") == "[('one', 'CC0')]"
    assert "no dataset org/none on" in read("hub:org/none")
    assert "the data set org/texts holds no file data/dev-*" in read("hub:org/texts#data/dev-*")
