"""Every command: help, mistakes, interruption, and few imports."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

import pytest

from tercet.cli import main as cli
from tercet.errors import UserError

HEAVY = {
    "fastapi",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numpy",
    "openai",
    "pandas",
    "pyarrow",
    "pydantic",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
    "yaml",
}


def tercet(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tercet", *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )


def imported_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


def test_importing_tercet_imports_nothing_heavy() -> None:
    assert not imported_by("import tercet") & HEAVY


def test_help_imports_nothing_heavy() -> None:
    heavy = imported_by("from tercet.cli.main import main\nassert main(['--help']) == 0") & HEAVY
    # typer imports its own dependencies; they do not count here.
    assert not heavy - imported_by("import typer")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_imports_nothing_heavy_and_shows_an_example(name: str) -> None:
    program = f"from tercet.cli.main import main\nassert main([{name!r}, '--help']) == 0"
    heavy = imported_by(program) & {
        "torch",
        "numpy",
        "sklearn",
        "openai",
        "transformers",
        "matplotlib",
        "pyarrow",
    }
    assert not heavy
    module = importlib.import_module(f"tercet.cli.{name}")
    assert module.EXAMPLE.startswith(f"tercet {name} ")
    assert inspect.getdoc(getattr(module, name))


def test_help_and_version_as_a_module() -> None:
    shown = tercet("--help")
    assert shown.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown.stdout
    assert "install-completion" not in shown.stdout
    assert tercet().stdout == shown.stdout
    assert tercet("--version").stdout.split()[0] == "tercet"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["promt", "x"], "No such command 'promt'. Did you mean 'prompt'?; see: tercet --help"),
        (["prompt"], "REF"),
        (["prompt", "x", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["prompt", "x", "hi", "--max-tokns", "3"], "--max-tokns"),
        (["prompt", "x", "hi", "there"], "see: tercet prompt --help"),
        (["build", "--data", "x", "--out", "y", "--optimizer", "sgd"], "'--optimizer': 'sgd' is not one of"),
        (["prompt", "no/such/model", "hi"], "no model at no/such/model"),
        (["prompt", "no/such/model", "hi", "--json"], "no model at no/such/model"),
        (["prompt", "http://127.0.0.1:9/v1#m"], "the prompt is missing"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert part in shown.err


def raising(problem: BaseException) -> object:
    def run(arguments: list[str]) -> int:
        raise problem

    return run


def test_interruption_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", raising(KeyboardInterrupt()))
    assert cli.main([]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_users_mistake_is_told_and_ours_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", raising(UserError("no such file")))
    assert cli.main([]) == 2
    assert capsys.readouterr() == ("", "error: no such file\n")
    monkeypatch.setattr(cli, "_run", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "tercet", "--version"], stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
