from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_openai_server import DONE, FakeServer, chunk, error, spoken, stream, usage_chunk
from tiny_model import write_model

from tercet.cli.main import main


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_a_conversation_piped_in(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script.extend([spoken("Hel", "lo"), spoken("Bye")])
    pipe_in(monkeypatch, "hi\n\n/save talk.json\nand now?\n/exit\nnever sent")
    assert main(["chat", server.reference, "--system", "S", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Hello\nsaved 3 messages to talk.json\nBye\n"
    assert server.reference in shown.err
    assert len(server.seen) == 2
    assert [message["content"] for message in server.bodies()[1]["messages"]] == [
        "S",
        "hi",
        "Hello",
        "and now?",
    ]
    assert "max_tokens" not in server.bodies()[0]  # a hosted model has its own


def test_an_answer_that_fails_does_not_end_the_conversation_but_is_told(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script.extend([spoken("Hello"), error(403, "too rude")])
    pipe_in(monkeypatch, "hi\nrude\n/nonsense\nsorry\n")
    assert main(["chat", server.reference]) == 2
    shown = capsys.readouterr()
    assert shown.out.endswith("sorry\n")
    assert "too rude" in shown.err
    assert "there is no /nonsense" in shown.err
    contents = [message["content"] for message in server.bodies()[-1]["messages"]]
    assert contents == ["hi", "Hello", "sorry"]


def test_input_that_is_not_text(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, b"\xff\xfe\n")
    assert main(["chat", server.reference]) == 2
    assert "the input is not UTF-8" in capsys.readouterr().err


class Terminal:
    """``tercet chat`` in a pseudo-terminal: keys in, text out."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tercet", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Tests that run in the background ignore Ctrl-C, and child processes inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 20
        os.set_blocking(self._ours, False)
        while text not in self.shown:
            assert time.monotonic() < until, f"{text!r} did not come:\n{self.shown}"
            try:
                self.shown += os.read(self._ours, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # the other end is closed
                assert text in self.shown, self.shown

    def type(self, keys: str) -> None:
        self.shown = ""
        os.write(self._ours, keys.encode())

    def interrupt(self) -> None:
        self._process.send_signal(2)

    def ends(self) -> int:
        try:
            return self._process.wait(timeout=20)
        finally:
            os.close(self._ours)


def test_an_interrupt_that_a_library_swallows_still_stops_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tercet.cli import chat

    def answer() -> Iterator[str]:
        for number in range(100):
            if number == 3:
                with contextlib.suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.1)
            yield f"{number} "

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # standard input is not a terminal here: its end ends the command
        chat._show(None, answer())  # type: ignore[arg-type]
    assert capsys.readouterr().out == "0 1 2 3 "
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stops_an_answer_and_ctrl_d_exits(server: FakeServer, tmp_path: Path) -> None:
    endless = [chunk(f"{number} ") for number in range(200_000)]
    server.script.extend([spoken("Hey"), stream(*endless, chunk(finish="stop"), usage_chunk(), DONE)])
    terminal = Terminal(server.reference)
    terminal.wait_for("> ")
    terminal.type("hi\n")
    terminal.wait_for("7 + 3 tokens")
    terminal.wait_for("> ")
    terminal.type("count\n")
    terminal.wait_for("20 21 22")
    terminal.interrupt()
    terminal.wait_for("(stopped; the text is kept")
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("(Ctrl-D or /exit ends the chat)")
    terminal.type("/undo\n")
    terminal.wait_for("removed: count")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.ends() == 0
    history = tmp_path / "state" / "tercet" / "chat_history"
    assert [line for line in history.read_text().split("\n") if line in ("hi", "count", "/undo")] == [
        "hi",
        "count",
        "/undo",
    ]
    assert history.stat().st_mode & 0o077 == 0


def test_without_a_reference_the_newest_model_under_runs_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(Path("runs/old/model"), chat=True)
    write_model(Path("runs/new/model"), chat=False)
    os.utime("runs/old/model/model.safetensors", (1, 1))
    capsys.readouterr()  # discard the output of transformers while it writes the model
    pipe_in(monkeypatch, "Once upon a time\n")
    assert main(["chat", "--max-tokens", "5", "--seed", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("runs/new/model is the newest model under ./runs of 2; ")
    assert "base model: no chat template; it continues your text" in shown.err
    continued = shown.out
    assert main(["prompt", "runs/new", "Once upon a time", "--max-tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out == continued
    assert main(["prompt", "runs/new", "hi", "--system", "S"]) == 2
    assert "so it cannot use --system" in capsys.readouterr().err
    assert main(["chat", "runs/new", "--system", "S"]) == 2


def test_an_error_within_the_conversation_names_options(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    pipe_in(monkeypatch, "hi\n")
    assert main(["chat", "anthropic:m", "--temperature", "1.5"]) == 2
    assert "error: --temperature is 1.5; anthropic:m takes 0 to 1" in capsys.readouterr().err
