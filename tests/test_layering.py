"""The layers of the package: imports go downwards only and without circles; files and functions stay short.

ARCHITECTURE.md describes the layers.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

import tercet

PACKAGE = Path(tercet.__file__).parent
# From the top, as the documentation shows them. Packages of one layer never import each other.
LAYERS = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "generate_docs.py"))["FLOORS"]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
# These modules at the top of the package may import all others: they make its public functions.
ENTRANCES = ("__init__", "__main__", "compose")
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

LONGEST_FILE = 450
LONGEST_FUNCTION = 90
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Options of other programs (the Hugging Face command line, llama.cpp, pip, uv, torchrun), and of commands that the
# report of a climb suggests to run.
ALLOWED_OPTIONS = {
    "evaluate/task.py": {"--repo-type", "--local-dir"},
    "ladder/conclusions.py": {"--model", "--temperature"},
    "model/gguf_architecture.py": {"--ctx-size"},
    "model/wheels.py": {
        "--dest",
        "--disable-pip-version-check",
        "--hash",
        "--no-cache",
        "--no-cache-dir",
        "--no-deps",
        "--no-input",
        "--only-binary",
        "--python",
        "--quiet",
        "--require-hashes",
        "--retries",
        "--target",
        "--timeout",
    },
    "pretrain/pretrain.py": {"--nproc-per-node"},
}


def name_of(path: Path) -> str:
    """Return the path relative to the package, for messages."""
    return path.relative_to(PACKAGE).as_posix()


def package_of(path: Path) -> str | None:
    """Return the package of a file; None for the modules at the top, which all packages may use."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Return the line and absolute name of every import, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:  # `from tercet import prompt` imports tercet.prompt
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def wrong_imports(package: str | None, source: str) -> list[str]:
    """Return the imports that are relative or do not go downwards."""
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
    """Return the modules of ``sources`` that each of them imports; `from a.b import c` imports a.b.c or else a.b."""
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
    """Return every set of modules that reach each other: those left after removing leaves and roots repeatedly.

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


def options(source: str) -> list[tuple[int, str]]:
    """Return the command line options in a module's strings and docstrings, each with its line.

    A setting may declare its option: ``setting(option="--rslora")``.
    """
    tree = ast.parse(source)
    declared = {
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "option"
    }
    return [
        (node.lineno, option)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in declared
        for option in OPTION.findall(node.value)
    ]


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Return the name and number of lines of every function, without decorators."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


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


def test_strings_outside_of_the_command_line_name_settings_and_no_options() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {option}"
        for path, source in SOURCES.items()
        if package_of(path) != "cli"
        for line, option in options(source)
        if option not in ALLOWED_OPTIONS.get(name_of(path), ())
    ]
    assert wrong == []


def test_no_file_is_longer_than_450_lines() -> None:
    lengths = {name_of(path): len(source.splitlines()) for path, source in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_has_90_lines() -> None:
    lengths = {
        f"{name_of(path)}: {function}": length
        for path, source in SOURCES.items()
        for function, length in functions(source)
    }
    assert {name: length for name, length in lengths.items() if length >= LONGEST_FUNCTION} == {}


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


def test_an_option_in_a_string_is_seen() -> None:
    assert options('f"{x} needs --max-tokens"') == [(1, "--max-tokens")]
    assert options('x\n"""Do as `--rank` says."""') == [(2, "--rank")]
    assert options('rank: int = setting(option="--rank/--no-rank", help="as --alpha")') == [(1, "--alpha")]
    assert options('"a -- dash, ---, `rank`, x--y"') == []


def test_the_lines_of_functions_are_counted() -> None:
    source = "@decorated\ndef f():\n    def g():\n        return 1\n\n    return g"
    assert list(functions(source)) == [("f", 5), ("g", 2)]
