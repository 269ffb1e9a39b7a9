from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from fake_openai_server import FakeServer, completion, error, spoken

from tercet.cli.main import main


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> object:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def test_the_answer_is_on_stdout_and_what_it_took_on_stderr(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script.append(spoken("Hel", "lo"))
    arguments = ["prompt", server.reference, "hi", "--system", "S", "--max-tokens", "5", "--temperature", "0"]
    assert main([*arguments, "--stop", "a", "--stop", "b", "--price", "1000,2000"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Hello\n"
    assert shown.err.startswith("7 + 3 tokens, ")
    assert shown.err.endswith(" s, $0.013\n")
    assert server.bodies()[0]["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
    ]
    body = server.bodies()[0]
    assert (body["max_tokens"], body["temperature"], body["stop"]) == (5, 0, ["a", "b"])
    assert "seed" not in body


def test_json_is_one_object_and_nothing_else(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script.append(completion("Hello", finish_reason="length"))
    assert main(["prompt", server.reference, "hi", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found.pop("seconds") >= 0
    assert found == {
        "model": server.reference,
        "text": "Hello",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cost": None},
    }
    assert "cut at the token limit" in shown.err
    assert "$" not in shown.err


def test_json_prints_nothing_when_it_fails(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script.append(error(400, "no"))
    assert main(["prompt", server.reference, "hi", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_a_template_takes_its_fields_from_var_and_text(server: FakeServer) -> None:
    Path("ask.txt").write_text("Translate to {language}: {text}\n")
    main(["prompt", server.reference, "good day", "--template", "ask.txt", "--var", "language=a=b"])
    assert server.bodies()[0]["messages"][0]["content"] == "Translate to a=b: good day"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--template", "ask.txt"], "no value for {language}"),
        (["--template", "ask.txt", "--var", "language=x", "--var", "langage=x"], "nothing uses {langage}"),
        (["--template", "ask.txt", "--var", "language"], "must be K=V"),
        (["--template", "ask.txt", "--var", "language=x", "--var", "language=y"], "given twice"),
        (["hi", "--template", "ask.txt", "--var", "language=x"], "nothing uses {text}"),
        (["hi", "--var", "language=x"], "there is none"),
        (["--template", "gone.txt"], "gone.txt"),
        (["hi", "--price", "1"], "--price is '1'"),
        (["hi", "--top-p", "2"], "top_p is 2"),
        (["hi\udcff"], "not valid Unicode"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    server: FakeServer, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    Path("ask.txt").write_text("Say it in {language}\n")
    assert main(["prompt", server.reference, *arguments]) == 2
    assert part in capsys.readouterr().err
    assert server.seen == []


def test_text_from_standard_input(
    server: FakeServer, stdin: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(stdin)
    stdin("grüße\n".encode())
    assert main(["prompt", server.reference, "-"]) == 0
    assert server.bodies()[0]["messages"][0]["content"] == "grüße\n"
    stdin(b"\xff\xfe")
    assert main(["prompt", server.reference, "-"]) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err
