"""The order of the house: imports go downwards only, and nothing heavy comes with ``import tercet``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tercet

PACKAGE = Path(tercet.__file__).parent
# From the top. Rooms on one floor never import each other.
FLOORS = (
    ("cli",),
    ("serve", "ladder"),
    ("prompt", "finetune", "pretrain", "curation", "evaluate"),
    ("engine", "train"),
    ("data",),
    ("model",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str | None:
    """The room a file stands in; None for the modules of the hall, which all rooms may use."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:  # `from tercet import prompt` imports tercet.prompt
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def wrong_imports(room: str | None, source: str) -> list[str]:
    wrong = []
    for line, name in imports(source):
        if name.startswith("."):
            wrong.append(f"{line}: {name} is relative")
            continue
        parts = name.split(".")
        other = parts[1] if parts[0] == "tercet" and len(parts) > 1 else None
        if other not in FLOOR or other == room:
            continue
        if room is None:
            wrong.append(f"{line}: the hall imports {name}")
        elif FLOOR[other] <= FLOOR[room]:
            wrong.append(f"{line}: {room} imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path: Path) -> None:
    if path.parent == PACKAGE and path.stem in ("__init__", "__main__", "compose"):
        return  # the front door leads to every room
    assert wrong_imports(room_of(path), path.read_text(encoding="utf-8")) == []


def test_every_directory_is_a_room_of_the_design() -> None:
    rooms = {entry.name for entry in PACKAGE.iterdir() if (entry / "__init__.py").is_file()}
    assert rooms <= set(FLOOR)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("engine", "from tercet.prompt.llm import LLM"),
        ("engine", "def f():\n    import tercet.train.loop"),
        ("finetune", "from tercet.pretrain.plan import Shape"),
        ("pretrain", "from tercet.curation.pipeline import curate"),
        ("model", "from tercet import data"),
        (None, "from tercet.model.config import ModelConfig"),
        ("prompt", "from . import llm"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_seen(room: str | None, source: str) -> None:
    assert wrong_imports(room, source)


def test_what_may_be_imported_is_let_through() -> None:
    source = "import torch\nfrom tercet.model.config import ModelConfig\nfrom tercet.errors import UserError"
    assert wrong_imports("engine", source) == []
