"""GGUF files inside installed packages: ``package:NAME`` and ``package:NAME/FILE``.

A package is found by its metadata; nothing of it is imported or run.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from tercet.errors import UserError, nearest

_LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf", re.DOTALL)
# A file cut into pieces that a package with code of its own joins.
_PIECE = re.compile(r".*\.gguf[.-](part|split|chunk)?[-_]?\w{1,6}", re.IGNORECASE)


def package_file(name: str) -> Path:
    """Return the GGUF file of the installed package ``name``, or of ``name/FILE``.

    Raises:
        UserError: no such package is installed, or it has no GGUF file, several, or only pieces of one.
    """
    package, _, file = name.partition("/")
    try:
        installed = distribution(package)
    except (PackageNotFoundError, ValueError):
        raise UserError(_not_installed(package)) from None
    files = gguf_files(installed)
    if not files:
        raise UserError(f"the package {package} contains no GGUF file{_pieces(installed)}")
    matching = [path for path in files if not file or path.as_posix().endswith(f"/{file}")]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(f"package:{package}/{path.name}" for path in files)
    if matching:
        raise UserError(f"the package {package} contains {len(matching)} GGUF files; name one: {names}")
    raise UserError(f"the package {package} contains no {file}, only {names}")


def gguf_files(installed: Distribution) -> list[Path]:
    """Return the GGUF files of an installed package; of a split file the first part."""
    return [
        path
        for entry in installed.files or ()
        if entry.name.endswith(".gguf") and not _LATER_PART.fullmatch(entry.name)
        if (path := Path(str(entry.locate()))).is_file()
    ]


def package_models() -> list[tuple[str, Path]]:
    """Return the reference and the file of every GGUF file in an installed package."""
    models = []
    for installed in distributions():
        files = gguf_files(installed)
        name = installed.metadata["Name"] if files else ""
        for path in files:
            models.append((f"package:{name}" if len(files) == 1 else f"package:{name}/{path.name}", path))
    return sorted(set(models))


def _not_installed(package: str) -> str:
    models = [name.removeprefix("package:") for name, _ in package_models()]
    similar = nearest(package, models, limit=3) or models[:3]
    hint = f"; with GGUF files are installed: {', '.join(similar)}" if similar else ""
    return f"no package {package} is installed in this environment{hint}"


def _pieces(installed: Distribution) -> str:
    pieces = sorted(entry.name for entry in installed.files or () if _PIECE.fullmatch(entry.name))
    if not pieces:
        return ""
    return (
        f", only {pieces[0]}, a piece of a file; pieces, which may lie in several packages, are not joined: join "
        "them into a file, and name that"
    )
