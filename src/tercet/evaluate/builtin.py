"""``builtin:docs-routing``: a real classification task made from the installed Python.

The input is the first paragraph of a docstring in the standard library. The label is the area of the
library reference that its module belongs to. The labels are the reference's chapters, with small
chapters merged into a neighbour. The task needs no annotation, and no data is shipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tercet.data import python_docs

MASK = "[module]"
MINIMUM_WORDS = 4  # shorter texts say too little to recognise an area, such as "Return the value."

# Label: modules. The chapters of docs.python.org/3/library, in its order. A package means all modules
# in it, and a leading underscore marks CPython's modules with the pure Python version.
AREAS: dict[str, str] = {
    # Text Processing, Binary Data (codecs), Internationalization
    "text": "string re difflib textwrap stringprep codecs encodings locale gettext readline rlcompleter",
    # Data Types
    "data types": (
        "datetime _pydatetime _strptime calendar zoneinfo collections _collections_abc heapq bisect "
        "weakref _weakrefset types copy pprint reprlib enum graphlib"
    ),
    # Numeric and Mathematical Modules, Functional Programming Modules
    "mathematics": "numbers decimal _pydecimal fractions random statistics functools operator",
    # File and Directory Access, Data Persistence
    "files": (
        "pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache "
        "shutil pickle copyreg shelve dbm sqlite3"
    ),
    # Data Compression and Archiving, File Formats
    "archives and formats": (
        "compression gzip bz2 lzma zipfile tarfile _compression csv configparser tomllib netrc plistlib"
    ),
    # Generic Operating System Services, Command-line Interface Libraries
    "operating system": (
        "os io _pyio argparse optparse getopt logging platform ctypes curses getpass tty pty cmd shlex"
    ),
    # Concurrent Execution
    "concurrency": "threading _threading_local multiprocessing concurrent subprocess sched queue",
    # Networking and Interprocess Communication
    "networking": "asyncio socket ssl selectors signal",
    # Internet Data Handling
    "email and json": "email json mailbox mimetypes base64 quopri",
    # Structured Markup Processing Tools
    "html and xml": "html xml _markupbase",
    # Internet Protocols and Support
    "internet protocols": (
        "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib uuid socketserver xmlrpc ipaddress "
        "nturl2path"
    ),
    # Development Tools, Debugging and Profiling
    "debugging and testing": (
        "typing pydoc doctest unittest bdb pdb timeit trace tracemalloc profile cProfile pstats"
    ),
    # Python Runtime Services, Custom Python Interpreters
    "runtime": (
        "sysconfig warnings dataclasses contextlib abc _py_abc traceback inspect annotationlib site "
        "_sitebuiltins __future__ code codeop"
    ),
    # Importing Modules, Python Language Services
    "language": (
        "importlib zipimport pkgutil modulefinder runpy ast symtable tokenize token keyword tabnanny "
        "pyclbr py_compile compileall dis opcode pickletools"
    ),
}

# Left out: modules that distributions package separately, so that the task would differ between machines
# (tkinter, turtle, idlelib, venv, ensurepip, lib2to3); modules that later Pythons have removed (PEP 594
# and 632: distutils, asyncore, cgi, nntplib, telnetlib and others); chapters too small to be a label
# (cryptography, multimedia); and modules that no chapter names.


def area_of(module: str) -> str | None:
    """Return the label of a dotted module name; None if it is left out."""
    return _AREA_OF_MODULE.get(module.partition(".")[0])


_AREA_OF_MODULE = {module: area for area, modules in AREAS.items() for module in modules.split()}


def first_paragraph(docstring: str) -> str:
    """Return the text before the first blank line, as one line."""
    return " ".join(re.split(r"\n[^\S\n]*\n", docstring.strip(), maxsplit=1)[0].split())


def mask_module(text: str, module: str) -> str:
    """Replace every part of the module's name, as a whole word in any case, with ``[module]``.

    The parts of ``xml.dom.minidom`` are xml, dom and minidom; they are also replaced in ``xml.sax`` and
    ``Minidom.parse()``. ``_pydecimal`` also means ``decimal``, and ``_strptime`` means ``strptime``.
    """
    names = set(module.split("."))
    names |= {name.removeprefix("_py").lstrip("_") for name in names if name.startswith("_")}
    pattern = "|".join(re.escape(name) for name in sorted(names))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", MASK, text, flags=re.IGNORECASE)


def docs_routing_rows() -> list[dict[str, str]]:
    """Return the examples, ordered by module: ``text`` (masked), ``area``, ``original`` and ``name``.

    Only public names are used. A repeated text is used once, or not at all if it occurs in several
    areas. Texts that are an interpreter session or have too few words are left out.
    """
    rows: dict[str, dict[str, str]] = {}
    areas: dict[str, set[str]] = {}
    for area, name, module, original in _paragraphs():
        text = mask_module(original, module)
        words = re.findall(r"\w+", text.replace(MASK, " ").casefold())
        if len(words) < MINIMUM_WORDS or original.startswith(">>>"):
            continue
        key = " ".join(words)
        areas.setdefault(key, set()).add(area)
        rows.setdefault(key, {"text": text, "area": area, "original": original, "name": name})
    return [row for key, row in rows.items() if len(areas[key]) == 1]


def _paragraphs() -> Iterator[tuple[str, str, str, str]]:
    for file in python_docs.stdlib_files():
        area = area_of(file.module)
        if area is None:
            continue
        for docstring in python_docs.read_docstrings(file):
            within = docstring.name[len(file.module) + 1 :].split(".")
            if not any(part.startswith("_") for part in within):
                yield area, docstring.name, file.module, first_paragraph(docstring.text)
