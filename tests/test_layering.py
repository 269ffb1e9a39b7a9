"""The layers of the package: imports go downwards only and without circles.

ARCHITECTURE.md describes the layers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

import tercet

PACKAGE = Path(tercet.__file__).parent
# From the top. Packages of one layer never import each other.
LAYERS = (
    ("cli",),
    ("serve", "ladder"),
    ("prompt", "finetune", "pretrain", "curation", "evaluate"),
    ("engine", "train"),
    ("data",),
    ("model",),
)
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
# These modules at the top of the package may import all others: they make its public functions.
ENTRANCES = ("__init__", "__main__", "compose")
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    """The path from the package, for messages."""
    return path.relative_to(PACKAGE).as_posix()


def package_of(path: Path) -> str | None:
    """The package that a file belongs to; None for the modules at the top, which all packages may use."""
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


def wrong_imports(package: str | None, source: str) -> list[str]:
    """Imports that are relative, or that do not go downwards."""
    wrong = []
    for line, name in imports(source):
        if name.startswith("."):
            wrong.append(f"{line}: {name} is relative")
            continue
        parts = name.split(".")
        target = parts[1] if parts[0] == "tercet" and len(parts) > 1 else None
        if target not in LAYER or target == package:
            continue
        if package is None:
            wrong.append(f"{line}: a module at the top imports {name}")
        elif LAYER[target] <= LAYER[package]:
            wrong.append(f"{line}: {package} imports {name}")
    return wrong


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules of ``sources`` that each of them imports; `from a.b import c` imports a.b.c or else a.b."""
    graph = {}
    for module, source in sources.items():
        targets = set()
        for _, name in imports(source):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            targets.add(name)
        graph[module] = targets - {"", module}
    return graph


def circles(graph: Mapping[str, Set[str]]) -> list[list[str]]:
    """Every set of modules that reach each other: modules that can't be removed by removing leaves or roots.

    A module that imports no remaining module, or that no remaining module imports, is in no circle.
    """
    left = {module: set(targets) for module, targets in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        outside = {module for module, targets in left.items() if not targets or module not in imported}
        if not outside:
            break
        left = {module: targets - outside for module, targets in left.items() if module not in outside}
    return sorted([module, *sorted(targets)] for module, targets in left.items())


def test_imports_go_downwards_only() -> None:
    wrong = [
        f"{name_of(path)}:{line}"
        for path, source in SOURCES.items()
        if not (path.parent == PACKAGE and path.stem in ENTRANCES)
        for line in wrong_imports(package_of(path), source)
    ]
    assert wrong == []


def test_every_directory_belongs_to_a_layer() -> None:
    packages = {entry.name for entry in PACKAGE.iterdir() if (entry / "__init__.py").is_file()}
    assert packages == set(LAYER)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """A package's ``__init__`` is left out: Python runs it before any of the package's modules."""
    sources = {
        ".".join(("tercet", *path.relative_to(PACKAGE).with_suffix("").parts)): source
        for path, source in SOURCES.items()
        if path.stem != "__init__"
    }
    assert circles(import_graph(sources)) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("engine", "from tercet.prompt.llm import LLM"),
        ("engine", "def f():\n    import tercet.train.loop"),
        ("finetune", "from tercet.pretrain.plan import Shape"),
        ("pretrain", "from tercet.curation.pipeline import curate"),
        ("ladder", "if TYPE_CHECKING:\n    from tercet.serve.launch import launch"),
        ("model", "from tercet import data"),
        (None, "from tercet.model.config import ModelConfig"),
        ("prompt", "from . import llm"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_seen(package: str | None, source: str) -> None:
    assert wrong_imports(package, source)


def test_an_import_that_goes_downwards_is_accepted() -> None:
    source = "import torch\nfrom tercet.model.config import ModelConfig\nfrom tercet.errors import UserError"
    assert wrong_imports("engine", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from tercet.data.a import f",
        "from tercet.data import a",
        "import tercet.data.a",
        "def f():\n    from tercet.data.a import f",
        "if TYPE_CHECKING:\n    from tercet.data.a import f",
    ],
)
def test_a_circle_is_seen_also_over_three_modules_and_inside_functions(source: str) -> None:
    sources = {
        "tercet.data.a": "from tercet.data.b import f",
        "tercet.data.b": "from tercet.data.c import f",
        "tercet.data.c": source,
        "tercet.data.d": "from tercet.data.a import f\nimport json",
    }
    assert [module for module, _ in circles(import_graph(sources))] == [
        "tercet.data.a",
        "tercet.data.b",
        "tercet.data.c",
    ]
    assert circles(import_graph({**sources, "tercet.data.c": "import json"})) == []
