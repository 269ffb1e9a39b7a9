"""A corpus that every machine has: docstrings and source of the running Python.

``builtin:python-docs`` reads the standard library and the installed packages as text, with :mod:`ast`. It
imports no module, so reading has no side effects and works for broken installations too. Python itself has
about 1.5 MB of docstrings and 10 MB of source. With packages such as torch and scikit-learn there are about
40 MB of docstrings.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import inspect
import io
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tercet.data.document import Document
from tercet.files import fingerprint

BUILTIN = "builtin:python-docs"
Kind = Literal["docstrings", "source", "all"]

# Tests repeat the code that they test; vendored trees repeat other packages.
_SKIPPED_DIRECTORIES = {
    *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "node_modules"),
    *("test", "tests", "testing", "idle_test", "_vendor", "vendor", "_vendored", "third_party"),
}
_TEST_FILE = re.compile(r"test_.*|.*_tests?|conftest")
# Generated code says so in its first lines. Generated repetition (API clients, codec tables, copies of models)
# teaches a model little.
_GENERATED = re.compile(
    rb"(?i)do not edit|auto-?generated|automatically generated"
    rb"|^#.*\bgenerated (?:by|from|with)\b|generated from '",
    re.MULTILINE,
)
_HEAD_BYTES = 600
_MAX_BYTES = 1_000_000
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class ModuleFile:
    """A Python file, its dotted module name, and its source: ``stdlib/json`` or ``package/torch``."""

    path: Path
    module: str
    source: str


@dataclass(frozen=True)
class Docstring:
    """The docstring of a module, class, function or method.

    Attributes:
        module: dotted module name, ``json.decoder``.
        name: qualified name, ``json.decoder.JSONDecoder.decode``; for a module its dotted name.
        signature: ``(self, s, _w)`` for functions (names only), empty for classes and modules.
        text: the docstring, indentation removed as :func:`inspect.cleandoc` does.
    """

    module: str
    name: str
    signature: str
    text: str


def stdlib_files() -> list[ModuleFile]:
    """Return the standard library's files, without its tests, sorted by module."""
    return _files(Path(sysconfig.get_path("stdlib")), "stdlib")


def package_files() -> list[ModuleFile]:
    """Return the files of the packages installed for the running interpreter, sorted by module."""
    roots = dict.fromkeys(Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib"))
    return [file for root in roots for file in _files(root, "package")]


def _files(root: Path, origin: str) -> list[ModuleFile]:
    modules = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name.isidentifier() and name not in _SKIPPED_DIRECTORIES]
        here = Path(directory)
        packages = here.relative_to(root).parts
        for file in files:
            stem = file.removesuffix(".py")
            if stem == file or not stem.isidentifier() or _TEST_FILE.fullmatch(stem):
                continue
            if stem.startswith("_sysconfigdata"):  # build settings of this machine, not text
                continue
            parts = packages if packages and stem == "__init__" else (*packages, stem)
            modules.append(ModuleFile(here / file, ".".join(parts), f"{origin}/{parts[0]}"))
    return sorted(modules, key=lambda file: (file.module, str(file.path)))


def read_module(file: ModuleFile, skipped: Counter[str] | None = None) -> tuple[str, ast.Module] | None:
    """Return the file's text and syntax tree, or None if it is unusable; ``skipped`` counts the reasons."""
    skipped = Counter() if skipped is None else skipped
    try:
        data = file.path.read_bytes()
    except OSError:
        skipped["unreadable"] += 1
        return None
    if not data.strip():
        skipped["empty"] += 1
    elif len(data) > _MAX_BYTES:
        skipped["over 1 MB"] += 1
    elif _GENERATED.search(data, 0, _HEAD_BYTES):
        skipped["generated"] += 1
    else:
        try:
            text = _decode(data)
            return text, _parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            skipped["does not parse"] += 1
    return None


def _decode(data: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)  # PEP 263
    return io.TextIOWrapper(io.BytesIO(data), encoding).read()


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings of the corpus
        return ast.parse(text)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector while a syntax tree is alive.

    A tree is tens of thousands of new objects without reference cycles. Collecting frees none of them and
    takes a third of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_docstrings(file: ModuleFile, skipped: Counter[str] | None = None) -> list[Docstring]:
    """Return the file's docstrings in source order; an empty list if `read_module` returns None."""
    with _collector_paused():
        parsed = read_module(file, skipped)
        texts = list(docstrings(file, parsed[1])) if parsed else []
        del parsed
    return texts


def read_source(file: ModuleFile, skipped: Counter[str] | None = None) -> str | None:
    """Return the file's text, or None if `read_module` returns None."""
    with _collector_paused():
        parsed = read_module(file, skipped)
        text = parsed[0] if parsed else None
        del parsed
    return text


def docstrings(file: ModuleFile, tree: ast.Module) -> Iterator[Docstring]:
    """Yield the docstrings of a module, its classes, functions and methods in source order."""
    yield from _docstrings(tree, file.module, "", file.module)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    name: str,
    signature: str,
    module: str,
) -> Iterator[Docstring]:
    text = ast.get_docstring(node, clean=False)
    if text and (text := inspect.cleandoc(text).strip()):
        yield Docstring(module, name, signature, text)
    if isinstance(node, (ast.Module, ast.ClassDef)):  # functions inside functions are no interface
        for child in _definitions(node.body):
            arguments = "" if isinstance(child, ast.ClassDef) else _arguments(child.args)
            yield from _docstrings(child, f"{name}.{child.name}", arguments, module)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the definitions among statements, including those under ``if`` and ``try``."""
    for statement in body:
        if isinstance(statement, _DEFINITIONS):
            yield statement
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _definitions(statement.body)
            for handler in getattr(statement, "handlers", ()):
                yield from _definitions(handler.body)
            yield from _definitions(statement.orelse)


def _arguments(arguments: ast.arguments) -> str:
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(names)})"


def iterate(kind: Kind = "all", *, seed: int = 0, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Yield the corpus in a fixed order whose beginning is a useful sample.

    Docstrings come before source, and the standard library before packages. Within each, modules are sorted
    by a hash of ``seed`` and their name, so any beginning covers many packages. Repeated files and docstrings
    are skipped.

    Args:
        kind: ``docstrings`` (a document per module), ``source`` (a document per file), or ``all``.
        seed: changes the order of the modules.
        skipped: counts skipped files by reason.

    Raises:
        ValueError: the kind is unknown.
    """
    skipped = Counter() if skipped is None else skipped
    makers: dict[str, Callable[[list[ModuleFile], Counter[str]], Iterator[Document]]] = {
        "docstrings": _docstring_documents,
        "source": _source_documents,
    }
    if kind not in (*makers, "all"):
        raise ValueError(f"kind is {kind!r}; it is one of docstrings, source, all")
    order = _shuffle(stdlib_files(), seed) + _shuffle(package_files(), seed)
    for name, make in makers.items():
        if kind in (name, "all"):
            yield from make(order, skipped)


def _shuffle(files: list[ModuleFile], seed: int) -> list[ModuleFile]:
    return sorted(files, key=lambda file: hashlib.sha256(f"{seed}:{file.module}".encode()).digest())


def _docstring_documents(files: list[ModuleFile], skipped: Counter[str]) -> Iterator[Document]:
    seen: set[int] = set()
    for file in files:
        parts = []
        for docstring in read_docstrings(file, skipped):
            if (key := hash(docstring.text)) not in seen:
                seen.add(key)
                parts.append(f"{docstring.name}{docstring.signature}\n\n{docstring.text}\n")
        if parts:
            yield Document("\n".join(parts), file.source, f"docstrings:{file.module}")


def _source_documents(files: list[ModuleFile], skipped: Counter[str]) -> Iterator[Document]:
    seen: set[int] = set()
    for file in files:
        if (text := read_source(file, skipped)) is not None and (key := hash(text)) not in seen:
            seen.add(key)
            yield Document(text, file.source, f"source:{file.module}")


def corpus_fingerprint() -> str:
    """Return a fingerprint of the versions of Python and the installed packages, without reading the corpus."""
    distributions = importlib.metadata.distributions()
    packages = sorted({f"{package.name} {package.version}" for package in distributions})
    return fingerprint([BUILTIN, sys.version, packages])
