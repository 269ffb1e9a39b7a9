"""Pytest collects every test file, and every test file contains a test."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs pytest's own collection, with testpaths, norecursedirs and the options of pyproject.toml, but
# replaces each module by an empty one: which files are collected is known without importing them.
COLLECT = """
import sys, pytest

class Recorder:
    class Empty(pytest.Module):
        def collect(self):
            return []

    def pytest_pycollect_makemodule(self, module_path, parent):
        print("collected", module_path)
        return self.Empty.from_parent(parent, path=module_path)

status = pytest.main(["--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Recorder()])
sys.exit(0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else 1)
"""


def collected(*options: str) -> set[str]:
    """Return the paths, relative to the repository, of the files that pytest collects."""
    # Plugins of other packages, which take seconds to import, choose no files.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", COLLECT, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = [line.removeprefix("collected ") for line in done.stdout.splitlines() if line.startswith("coll")]
    return {Path(path).relative_to(ROOT).as_posix() for path in paths if path.startswith("/")}


def repository_files() -> set[str]:
    """Return the test files under version control and the new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", ":(glob)tests/**/test_*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return {path for path in done.stdout.splitlines() if (ROOT / path).is_file()}


def names_of_tests(source: str) -> list[str]:
    """Return the names of a module's tests as pytest finds them: functions and methods of classes."""
    return [
        name
        for node in ast.parse(source).body
        for name in (_names(node) if not isinstance(node, ast.ClassDef) else _names_in_class(node))
    ]


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name] if node.name.startswith("test") else []
    if isinstance(node, ast.Assign):  # TestMachine = Machine.TestCase, a state machine of hypothesis
        targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return [name for name in targets if name.startswith("Test")]
    return []


def _names_in_class(node: ast.ClassDef) -> list[str]:
    if not node.name.startswith("Test"):
        return []
    return [name for statement in node.body for name in _names(statement)]


def test_pytest_collects_exactly_the_test_files_of_the_repository() -> None:
    assert collected() == repository_files()


@pytest.mark.parametrize(
    "option", ["norecursedirs=data", "testpaths=tests/cli", "python_files=test_data_*.py"]
)
def test_a_setting_that_leaves_test_files_out_is_seen(option: str) -> None:
    assert collected("--noconftest", "-o", option) < repository_files()


def test_every_test_file_has_a_test() -> None:
    assert [
        path for path in sorted(repository_files()) if not names_of_tests((ROOT / path).read_text("utf-8"))
    ] == []


@pytest.mark.parametrize(
    "source", ["", "def helper(): ...", "class Test:\n    def helper(self): ...", "x = 1"]
)
def test_a_file_without_tests_is_seen(source: str) -> None:
    assert names_of_tests(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "def test_it(): ...",
        "async def test_it(): ...",
        "class TestIt:\n    def test_it(self): ...",
        "TestMachine = Machine.TestCase",
    ],
)
def test_tests_of_every_form_are_counted(source: str) -> None:
    assert len(names_of_tests(source)) == 1
