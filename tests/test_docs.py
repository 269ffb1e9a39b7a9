"""The documentation: generated parts are up to date, marked blocks run, links and commands exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tercet
from tercet.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[bool, str, str]]:
    """Return, for each code block, whether it is marked as runnable, its language and its text."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield match[1] is not None, match[2], match[3]


RUNNABLE = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (runnable, language, text) in enumerate(blocks(page))
    if runnable and language == "python"
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set up a directory with the files of the documentation's examples: a corpus, a small model, a task."""
    directory = tmp_path_factory.mktemp("docs")
    (directory / "corpus").mkdir()
    colours = ("red", "green", "blue")
    lines = [f"The {colours[n % 3]} ship number {n} came in from the sea at {n % 24}." for n in range(4000)]
    for number in range(40):
        (directory / "corpus" / f"{number}.txt").write_text(
            "\n".join(lines[number * 100 : number * 100 + 100])
        )
    rows = [f"{colours[n % 3]}\tthe {colours[n % 3]} sea, {n}\n" for n in range(120)]
    (directory / "messages.tsv").write_text("label\ttext\n" + "".join(rows))
    (directory / "task.yaml").write_text(
        "data: messages.tsv\nprompt: 'Message: {text}'\ntarget: label\nlabels: auto\nmetric: accuracy\n"
    )
    settings = {"tokens": 20_000, "layers": 1, "width": 32, "vocab_size": 300, "context": 64}
    tercet.build(directory / "corpus", directory / "runs" / "mine", **settings)
    return directory


@pytest.mark.parametrize("text", RUNNABLE)
def test_a_block_that_is_marked_runs(text: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    exec(compile(text, "<documentation>", "exec"), {"__name__": "__main__"})


def test_there_are_blocks_to_run() -> None:
    assert len(RUNNABLE) >= 7


def test_what_comes_from_the_code_is_up_to_date() -> None:
    """If this fails: make docs-generated."""
    script = ROOT / "scripts" / "generate_docs.py"
    result = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def commands(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks that begin with tercet or make, without comments."""
    lines = []
    for _, language, text in blocks(page):
        if language in ("", "sh", "bash", "console"):
            lines += [line.partition("  #")[0].partition("    #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(("tercet ", "make "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        word = line.split()[1]
        assert word in targets if line.startswith("make ") else word in (*COMMANDS, "--help", "--version"), (
            line
        )


def test_every_option_in_a_command_exists() -> None:
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = {part.split()[0]: part for part in reference.split("## tercet ")[1:]}
    for page in PAGES:
        for line in commands(page):
            words = line.split()
            if words[0] != "tercet" or words[1] not in sections:
                continue
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line):
                assert f"`{option}" in sections[words[1]] or f", {option}" in sections[words[1]], (
                    f"{page.name}: {line}"
                )


def test_the_chinese_readme_has_the_same_commands() -> None:
    assert commands(ROOT / "README.zh-CN.md") == commands(ROOT / "README.md")
    english = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    chinese = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.zh-CN.md").read_text(encoding="utf-8"))
    assert set(english) - {"README.zh-CN.md"} == set(chinese) - {"README.md"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.zh-CN.md"], ids=lambda page: page.stem)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_documentation_names_files_that_exist() -> None:
    """`engine/engine.py` in the prose of the architecture and of the tour is a file of the package."""
    package = Path(tercet.__file__).parent
    for name in ("architecture.md", "how-an-llm-works.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
            assert (package / path).is_file() or (ROOT / path).is_file(), f"{name}: {path}"


def test_the_report_that_is_documented_is_the_one_that_is_written() -> None:
    page = (ROOT / "docs" / "report-json.md").read_text(encoding="utf-8")
    from tercet.ladder.result import Report

    for field in json.loads(json.dumps(list(Report.__dataclass_fields__))):
        assert f"`{field}`" in page, field
