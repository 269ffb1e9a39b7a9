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
    answer = json.loads(shown.out)
    assert answer.pop("seconds") >= 0
    assert answer == {
        "model": server.reference,
        "text": "Hello",
        "parsed": None,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cost": None},
    }
    assert "stopped at the token limit" in shown.err
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
        (["--template", "ask.txt", "--var", "language"], "write K=V, such as"),
        (["--template", "ask.txt", "--var", "language=x", "--var", "language=y"], "given twice"),
        (["hi", "--template", "ask.txt", "--var", "language=x"], "nothing uses {text}"),
        (["hi", "--var", "language=x"], "--var needs --template FILE"),
        (["--template", "gone.txt"], "gone.txt"),
        (["hi", "--price", "1"], "--price is '1'"),
        (["hi", "--top-p", "2"], "--top-p is 2"),
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


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_a_schema_is_sent_and_what_came_is_parsed(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("city.json").write_text(json.dumps(SCHEMA))
    arguments = ["prompt", server.reference, "where?", "--schema", "city.json"]
    server.script.append(spoken('{"city": ', '"Oslo"}'))
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"city": "Oslo"}
    assert server.bodies()[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    server.script.append(completion('{"city": "Oslo"}'))
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parsed"] == {"city": "Oslo"}


def test_an_answer_that_was_cut_off_is_shown_and_is_an_error(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("city.json").write_text(json.dumps(SCHEMA))
    arguments = ["prompt", server.reference, "where?", "--schema", "city.json"]
    server.script.append(spoken('{"city": "Os', finish="length"))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == '{"city": "Os\n'
    assert "raise --max-tokens" in shown.err
    server.script.append(completion('{"city": "Os', finish_reason="length"))
    assert main([*arguments, "--json"]) == 2
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert (answer["text"], answer["parsed"], answer["finish_reason"]) == ('{"city": "Os', None, "length")
    assert "raise --max-tokens" in shown.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--schema", "gone.json"], "gone.json"),
        (["--schema", "broken.json"], "broken.json:1:10 is not valid JSON"),
        (["--schema", "list.json"], "list.json holds a list; a JSON Schema is an object"),
        (["--schema", "list.json", "--regex", "a"], "--schema and --regex contradict each other"),
        (["--regex", "a"], "supports only --schema, not --regex"),
        (["--regex", ""], "is ''; it must be a string that is not empty"),
        (["--choices", "a,b"], "supports only --schema, not --choices"),
        (["--choices", "a,,b"], "--choices is 'a,,b'"),
        (["--grammar", "gone.lark"], "gone.lark"),
    ],
)
def test_mistakes_in_the_form_of_the_answer(
    server: FakeServer, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    Path("broken.json").write_text('{"type": ')
    Path("list.json").write_text("[]")
    assert main(["prompt", server.reference, "hi", *arguments]) == 2
    assert part in capsys.readouterr().err
    assert server.seen == []


@pytest.mark.parametrize(
    ("option", "content", "part"),
    [
        (
            "--schema",
            '{"properties": {"age": {"type": "integr"}}}',
            "error: form: schema.properties.age: Invalid type: integr\n",
        ),
        ("--grammar", "start: x", 'error: form: grammar: line 1, column 8: unknown name: "x"\n'),
    ],
)
def test_a_wrong_form_for_a_local_model_is_told_with_file_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, content: str, part: str
) -> None:
    from tiny_model import write_model

    Path("form").write_text(content)
    model = write_model(tmp_path / "model", chat=True)
    capsys.readouterr()
    assert main(["prompt", str(model), "hi", option, "form"]) == 2
    assert part in capsys.readouterr().err
