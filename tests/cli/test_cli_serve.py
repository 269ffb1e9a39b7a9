"""``tercet serve``: start, announced address, requests, graceful exit; each mistake gives one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from tiny_model import write_model

from tercet.cli.main import main
from tercet.errors import UserError
from tercet.serve.launch import check_reach, is_loopback, read_keys
from tercet.serve.settings import hash_key


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "tiny", chat=True)


class Process:
    """The command in a separate process; ``lines`` holds its standard error up to the last line of its start."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tercet", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self._guard = threading.Timer(60, self.process.kill)
        self._guard.start()
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(("try: ", "error: ")):
                break
        address = re.search(r"http://[0-9.:]+", "\n".join(self.lines))
        self.url = address[0] if address else ""

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Return the exit status and the rest of standard error."""
        self.process.send_signal(number)
        out, rest = self.process.communicate(timeout=30)
        self._guard.cancel()
        assert out == ""
        return self.process.returncode, rest


@pytest.fixture
def started(tiny: Path, tmp_path: Path) -> Iterator[Process]:
    server = Process(f"tiny={tiny}", "--quantize", "none", "--data", str(tmp_path / "data"))
    yield server
    server.process.kill()


def test_it_says_where_it_is_and_how_to_call_it_and_serves(
    started: Process, tiny: Path, tmp_path: Path
) -> None:
    said = "\n".join(started.lines)
    assert f"loading {tiny}" in said and f"serving tiny at {started.url}/v1" in said
    assert f"chat page: {started.url}/" in said
    [call] = [line.removeprefix("try: ") for line in started.lines if line.startswith("try: ")]
    assert call.startswith(f"curl {started.url}/v1/chat/completions ") and '"model": "tiny"' in call
    body = re.search(r"-d '(.*)'$", call)
    assert body is not None
    answer = httpx.post(
        f"{started.url}/v1/chat/completions", content=body[1], headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200 and answer.json()["choices"]
    page = httpx.get(f"{started.url}/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    status, rest = started.end()
    assert (status, rest) == (0, "stopped\n")
    assert (tmp_path / "data" / "chat.db").is_file()


def test_ctrl_c_finishes_what_runs(started: Process) -> None:
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 90, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    status, rest = started.end(signal.SIGINT)
    reader.join(timeout=20)
    assert (status, rest) == (0, "stopped\n")
    assert "data: [DONE]" in lines


def test_without_the_page_only_the_api_is_there_and_a_key_from_the_environment_is_asked_for(
    tiny: Path,
) -> None:
    server = Process(str(tiny), "--quantize", "none", "--no-page", TERCET_API_KEY="sesame-open-1234")
    try:
        assert "Bearer $KEY" in server.lines[-1] and not any("chat page" in line for line in server.lines)
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        with httpx.Client(base_url=server.url, headers={"authorization": "Bearer sesame-open-1234"}) as http:
            assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [str(tiny)]
            assert http.get("/").text == "Ollama is running"
        assert server.end()[0] == 0
    finally:
        server.process.kill()


# Mistakes


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error line of a wrong command line."""
    assert main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    [line] = [row for row in err.splitlines() if not row.startswith("loading ")]
    assert out == "" and line.startswith("error: ")
    return line


def test_a_port_in_use_is_told_before_any_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tiny: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tiny), "--port", port]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: port {port} of 127.0.0.1 is in use") and "--port" in err and not out


def test_mistakes_are_a_line_each(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    model, empty = str(tiny), tmp_path / "keys"
    empty.write_text("# none yet\n\n")
    free = ("--port", "0")
    assert "no model at runs/no/thing" in error_line(capsys, "runs/no/thing", *free)
    assert "two models are called a" in error_line(capsys, f"a={model}", f"a={model}", *free)
    assert "needs a key" in error_line(capsys, model, "--host", "0.0.0.0", *free)
    assert "is not an address of this machine" in error_line(
        capsys, model, "--host", "no.such.host.invalid", *free
    )
    assert "cannot listen on port" in error_line(
        capsys, model, "--host", "192.0.2.1", "--api-key", "sesame-open-1234", *free
    )
    assert "8 or more" in error_line(capsys, model, "--api-key", "short", *free)
    assert "contains no key" in error_line(capsys, model, "--api-key-file", str(empty), *free)
    assert "nothing.txt" in error_line(capsys, model, "--api-key-file", "nothing.txt", *free)
    assert "--no-page turns the page off" in error_line(capsys, model, "--no-page", "--data", "x", *free)
    assert "is not an adapter directory" in error_line(capsys, model, "--adapter", f"x={model}", *free)
    assert "--quantize is 'int3'" in error_line(capsys, model, "--quantize", "int3", *free)
    assert "--max-batch is for local models" in error_line(
        capsys, "http://127.0.0.1:1/v1#m", "--max-batch", "3", *free
    )
    assert "missing" in error_line(capsys, *free).lower()


def test_keys_come_from_options_and_a_file_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst-key-1234\n\nsecond-key-1234\nfirst-key-1234\n")
    monkeypatch.setenv("TERCET_API_KEY", "from-the-environment")
    assert read_keys(["given-key-1234"], file) == tuple(
        map(hash_key, ("given-key-1234", "first-key-1234", "second-key-1234"))
    )
    assert read_keys([], None) == (hash_key("from-the-environment"),)
    monkeypatch.delenv("TERCET_API_KEY")
    assert read_keys([], None) == ()
    for wrong in ("with a blank", "tab\tkey-1234", "schlüssel-1234", ""):
        with pytest.raises(UserError, match="8 or more"):
            read_keys([wrong], None)


def test_only_loopback_needs_no_key() -> None:
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        assert is_loopback(host)
        check_reach(host, ())
    for host in ("0.0.0.0", "::", "192.168.1.2", "10.0.0.1"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="needs a key"):
            check_reach(host, ())
        check_reach(host, (hash_key("sesame-open-1234"),))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-body", "0.0001"), ("--max-body", "inf"), ("--max-body", "nan"), ("--request-timeout", "0.05"),
        ("--request-timeout", "nan"), ("--max-batch", "0"), ("--max-waiting", "-1"), ("--port", "65536"),
    ],
)  # fmt: skip
def test_a_limit_out_of_its_range_is_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "no/such/model", option, value]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {option} is ") and shown.count("\n") == 1
