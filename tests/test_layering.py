"""The order of the house: imports go downwards only, and nothing heavy comes with ``import tercet``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tercet

PACKAGE = Path(tercet.__file__).parent
# From the top. Rooms on one floor never import each other.
FLOORS = (
    ("cli",),
    ("serve", "climb"),
    ("prompt", "tune", "build"),
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
    if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
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
        ("tune", "from tercet.pretrain.plan import Shape"),
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


def test_the_public_names_are_there_and_come_without_heavy_imports() -> None:
    program = (
        "import sys, tercet\n"
        "assert set(tercet.__all__) <= set(dir(tercet))\n"
        "assert tercet.UserError.__module__ == 'tercet.errors'\n"
        "assert tercet.Sampling(max_tokens=3).max_tokens == 3\n"
        "assert tercet.LLM.__name__ == 'LLM'\n"
        "assert callable(tercet.build) and callable(tercet.tune) and callable(tercet.climb)\n"
        "assert tercet.__version__[0].isdigit()\n"
        "heavy = {'torch', 'sklearn', 'matplotlib', 'openai', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["build", "tune", "climb"])
def test_a_package_is_also_the_function_of_its_name_whatever_was_imported_before(name: str) -> None:
    program = (
        "import importlib, pkgutil, tercet\n"
        f"package = importlib.import_module('tercet.{name}')\n"
        f"assert package is tercet.{name} and list(pkgutil.iter_modules(package.__path__))\n"
        f"module = importlib.import_module(tercet._ACTIONS['{name}'])\n"
        f"assert module.{name}.__module__ == module.__name__\n"
        f"setattr(module, '{name}', lambda *args, **options: (args, options))\n"
        f"assert tercet.{name}(1, out='x') == ((1,), {{'out': 'x'}})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_name_that_does_not_exist_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        _ = tercet.LLMs
