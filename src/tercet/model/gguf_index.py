"""``gguf.json``: names the GGUF file behind a checkpoint directory, and where its tensors lie.

The directory is made from a file's metadata (`tercet.model.gguf_directory`) and contains no weights. With
the table of tensors in it, opening the model again does not parse the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.errors import UserError
from tercet.files import directory_size, read_json, write_json
from tercet.model.gguf_file import BLOCKS, GGUFFile, TensorInfo

INDEX = "gguf.json"


@dataclass(frozen=True)
class SourceFile:
    """A file with its size in bytes and its time of change, which reveal that it is another one."""

    path: Path
    size: int
    mtime_ns: int


def source_file(path: Path) -> SourceFile:
    """Return a file's present size and time.

    Raises:
        UserError: it cannot be read.
    """
    try:
        status = path.stat()
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from problem
    return SourceFile(path, status.st_size, status.st_mtime_ns)


def holds_gguf(directory: str | Path) -> bool:
    """Return whether a directory's weights lie in a GGUF file."""
    return (Path(directory) / INDEX).is_file()


def write_index(directory: Path, file: GGUFFile) -> None:
    """Write ``gguf.json``."""
    sources = [source_file(path) for path in file.paths]
    numbers = {path: number for number, path in enumerate(file.paths)}
    content = {
        "files": [{"path": str(s.path), "size": s.size, "mtime_ns": s.mtime_ns} for s in sources],
        "tensors": {
            info.name: [info.type, list(info.shape), numbers[info.file], info.offset]
            for info in file.tensors.values()
        },
    }
    write_json(directory / INDEX, content)


def source_files(directory: str | Path) -> list[SourceFile]:
    """Return the files that ``gguf.json`` names.

    Raises:
        UserError: a file is missing or has changed.
    """
    sources = [
        SourceFile(Path(entry["path"]), entry["size"], entry["mtime_ns"]) for entry in _files(directory)
    ]
    for source in sources:
        if source_file(source.path) != source:
            raise UserError(
                f"{source.path} has changed since {directory} was made of it; name the file itself again"
            )
    return sources


def model_bytes(directory: Path) -> int:
    """Return the bytes of the files in a model's directory, with those of the GGUF file that it stands for.

    Raises:
        UserError: the GGUF file is missing or has changed.
    """
    own = directory_size(directory)
    return own + sum(source.size for source in source_files(directory)) if holds_gguf(directory) else own


def read_tensors(directory: str | Path) -> dict[str, TensorInfo]:
    """Return the table of tensors.

    Raises:
        UserError: a file is missing or has changed.
    """
    sources = source_files(directory)
    tensors = {}
    for name, (kind, shape, number, offset) in read_json(Path(directory) / INDEX)["tensors"].items():
        elements, size = BLOCKS[kind]
        nbytes = math.prod(shape) // elements * size
        tensors[name] = TensorInfo(name, kind, tuple(shape), offset, nbytes, sources[number].path)
    return tensors


def _files(directory: str | Path) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = read_json(Path(directory) / INDEX)["files"]
    return files
