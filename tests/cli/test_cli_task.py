"""``tercet task check``: what it prints, in 80 columns, and its exit status."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fake_openai_server import FakeServer
from rich.cells import cell_len
from tiny_model import write_model

from tercet.cli.main import main


@pytest.fixture
def task(tmp_path: Path) -> str:
    draw = random.Random(0)
    rows = [
        {"t": f"问题 {number} " + "好" * draw.randrange(30, 60), "y": draw.choice(["天气", "交通"])}
        for number in range(200)
    ]
    rows[0]["t"] += "\x1b[31m\tred"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "task.yaml").write_text(
        'data: rows.jsonl\nprompt: "{t}\\n?"\ntarget: y\nlabels: auto\nfew_shot: 2\n', encoding="utf-8"
    )
    return str(tmp_path / "task.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), chat=True))


def test_a_check_without_a_model(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "check", task]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "\x1b" not in shown.out and "\t" not in shown.out
    assert lines[0].startswith("task: ") and "2 labels; metric accuracy" in lines[0]
    assert lines[2] == "Warnings" and lines[3].startswith("- ")
    assert any(line.split()[:1] == ["天气"] for line in lines)
    assert sum(line.startswith("Prompt: ") for line in lines) == 3
    assert "With --model REF" in lines[-2]


def test_a_check_with_a_model(task: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "check", task, "--model", model]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert any("do not fit the context of 96 tokens: their" in line for line in lines)
    assert any(line.startswith("Context 96 tokens; the longest test prompt has ") for line in lines)
    assert any(line.startswith("  zero-shot ") and "for the test split" in line for line in lines)
    for method in ("lora", "full"):
        assert any(line.startswith(f"  {method} ") and "tokens an epoch" in line for line in lines)
    assert any("<|assistant|>" in line for line in lines)


def test_json_is_one_object_and_has_whole_prompts(
    task: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["task", "check", task, "--model", model, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["splits"].values()) == 200
    assert set(result["labels"]) == {"天气", "交通"}
    assert result["model"]["context"] == 96 and result["model"]["shortened"]["zero-shot"] > 0
    assert all(prompt["text"].endswith("<|assistant|>") for prompt in result["prompts"])


def test_a_hosted_model_is_not_asked(
    task: str, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["task", "check", task, "--model", server.reference, "--price", "1000,0"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert server.bodies() == []
    zero, few = result["prompts"][:2]
    assert zero["tokens"] is None and zero["text"].count("[user]") == 1 and "天气" in zero["text"]
    assert few["text"].count("[user]") == 3 and few["text"].count("[assistant]") == 2
    cost = result["model"]["prompting"][0]
    assert cost["seconds"] is None
    # A dollar for a thousand tokens of four bytes. An input has 100 to 200 bytes, the instruction some 70.
    assert 0.03 < cost["dollars"] / cost["answers"] < 0.08
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{cost['answers']} requests, about $" in shown and "is a hosted model" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["task", "check", "nowhere.yaml"], 1, "there is no task file nowhere.yaml"),
        (["task", "check", "builtin:doc-routing"], 1, "there is no built-in task 'builtin:doc-routing'"),
        (["task", "check", "broken.yaml"], 1, "broken.yaml: the field 'target' is missing"),
        (["task", "check", "--price", "1,2", "x.yaml"], 2, "--price is the price of the model given with --model"),
        (["task", "chek", "x.yaml"], 2, "No such command 'chek'. Did you mean 'check'?; see: tercet task --help"),
        (["task"], 2, "Missing command; see: tercet task --help"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_a_broken_task_gives_status_1(
    arguments: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.yaml").write_text("data: rows.jsonl\nprompt: '{t}'\n")
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and line in shown.err


def test_a_model_that_does_not_exist_is_no_mistake_of_the_task(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["task", "check", task, "--model", "no/such/model"]) == 2
    assert "no model at no/such/model" in capsys.readouterr().err


def test_help_of_the_group_and_of_its_command_show_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "--help"]) == 0
    assert "  check  Check a task before you climb it." in capsys.readouterr().out
    assert main(["task", "check", "--help"]) == 0
    assert "tercet task check task.yaml --model" in capsys.readouterr().out
