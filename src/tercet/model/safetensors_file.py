"""Single safetensors files: mapped into memory when read, written atomically.

A safetensors file consists of eight bytes with the length of a JSON header, the header (tensor names
with type, shape and byte range), and the tensors' bytes, little-endian, without gaps
(https://github.com/huggingface/safetensors#format). Every error message names the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. ``data`` maps its bytes: writing to it changes memory, never the file."""

    name: str
    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    file: Path


# Reading


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """Return all tensors of a file, mapped into memory but not read.

    Raises:
        UserError: the file is missing, has another format, is truncated or has a wrong header.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            _check_is_safetensors(path, start + stream.read(32), size, length)
            stream.seek(8)
            header_bytes = stream.read(length)
        data: NDArray[np.uint8] = np.empty(0, np.uint8)
        if size > 8 + length:
            data = np.memmap(path, np.uint8, mode="c", offset=8 + length)
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from problem
    header = _parse_header(path, header_bytes)
    header.pop("__metadata__", None)
    entries = sorted(
        (_entry(path, name, value) for name, value in header.items()), key=lambda e: (e[2], e[3])
    )
    tensors, end = {}, 0
    for name, dtype, begin, stop, shape in entries:
        if begin != end:
            raise UserError(
                f"{path} is damaged: tensor {name} begins at byte {begin} of the data, not at byte {end}; "
                "copy or download the file again"
            )
        if stop > data.size:
            raise UserError(
                f"{path} is truncated: tensor {name} ends at byte {stop} of the data, which has {data.size}; "
                "copy or download the file again"
            )
        tensors[name] = StoredTensor(name, dtype, shape, data[begin:stop], path)
        end = stop
    if end != data.size:
        raise UserError(
            f"{path} is damaged: {data.size - end} bytes after the last tensor belong to no tensor; "
            "copy or download the file again"
        )
    return tensors


def _check_is_safetensors(path: Path, start: bytes, size: int, length: int) -> None:
    header = start[8:9] == b"{"
    if not header and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise UserError(
            f"{path} is a PyTorch pickle, which can run code and is not read; convert it to safetensors with "
            "transformers' save_pretrained"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights; run 'git lfs pull' in its repository")
    if size < 8:
        raise UserError(
            f"{path} is truncated: it has {size} bytes, too few for a safetensors file; copy or download it again"
        )
    if length > MAX_HEADER_BYTES or not header:
        raise UserError(
            f"{path} is not a safetensors file: it does not begin with a header; download it again"
        )
    if 8 + length > size:
        raise UserError(
            f"{path} is truncated: its header needs {length} bytes and the whole file has {size}; "
            "copy or download it again"
        )


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the header contains {duplicate!r} twice; download the file again")
        return entries

    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as problem:
        raise UserError(
            f"{path} is not a safetensors file: its header is not JSON; download it again"
        ) from problem
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: the header is a JSON {type(parsed).__name__}; it must be an object")
    return parsed


def _entry(path: Path, name: str, entry: Any) -> tuple[str, str, int, int, tuple[int, ...]]:
    """Check a header entry and return (name, dtype, begin, end, shape)."""

    def counts(key: str) -> list[int]:
        values = entry.get(key)
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise UserError(
                f"{path}: {key!r} of tensor {name} is {values!r}; it must be a list of integers of at least 0"
            )
        return values

    if not isinstance(entry, dict):
        raise UserError(f"{path}: the header's entry for tensor {name} is {entry!r}; it must be an object")
    dtype, shape, offsets = entry.get("dtype"), counts("shape"), counts("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(
            f"{path}: 'dtype' of tensor {name} is {dtype!r}; it must be one of {', '.join(ITEM_BYTES)}"
        )
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise UserError(
            f"{path}: 'data_offsets' of tensor {name} is {offsets}; shape {shape} and dtype {dtype} need {nbytes} bytes"
        )
    return name, dtype, offsets[0], offsets[1], tuple(shape)


# Writing


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's entry in a file's header. ``dtype`` is safetensors' name, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's values in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Item = tuple[str, str, tuple[int, ...], NDArray[np.uint8]]  # name, dtype, shape, bytes


def write_safetensors(path: str | Path, tensors: Sequence[Item]) -> None:
    """Write one file atomically: readers see the old file or the new one.

    Raises:
        UserError: the file can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_items(temporary, tensors)
        temporary.replace(path)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def spec_of(item: Item) -> TensorSpec:
    """Return the header entry of a tensor that is in memory."""
    name, dtype, shape, _ = item
    return TensorSpec(name, dtype, shape)


def write_items(path: Path, tensors: Sequence[Item]) -> None:
    """Write tensors that are in memory as `write_file` does."""
    data = {item[0]: item[3] for item in tensors}
    write_file(path, [spec_of(item) for item in tensors], lambda spec: data[spec.name])


def write_file(
    path: Path, specs: Sequence[TensorSpec], data: Callable[[TensorSpec], NDArray[np.uint8]]
) -> None:
    """Write a safetensors file at ``path`` itself and flush it to the disk.

    Args:
        path: the file; a reader may see a part of it until this returns.
        specs: names, types and shapes of all tensors, which the header needs before any value.
        data: returns the bytes of a tensor; called once for each, when it is written.

    Raises:
        OSError: the disk refuses.
        ValueError: ``data`` returns a wrong number of bytes.
    """
    # Larger items first, so that each tensor lies at a multiple of its item size and can be mapped.
    ordered = sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for spec in ordered:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            values = data(spec)
            if values.nbytes != spec.nbytes:
                raise ValueError(
                    f"tensor {spec.name} has {values.nbytes} bytes; its shape and dtype need {spec.nbytes}"
                )
            stream.write(values.data)
        stream.flush()
        os.fsync(stream.fileno())
