"""Checkpoint directories: safetensors and JSON, read and written without torch.

A safetensors file is eight bytes that give the length of a JSON header, the header
(name to type, shape and byte range), and the tensors' bytes, little-endian, without gaps
(https://github.com/huggingface/safetensors#format). Every fault is one line naming its file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.files import read_json, write_json
from tercet.model.config import ModelConfig
from tercet.model.families import config_from_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. ``data`` maps its bytes: writing to it changes memory, never the file."""

    name: str
    dtype: str  # as safetensors calls it: "BF16"
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    file: Path


# Reading


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """All tensors of one file, mapped into memory, not read.

    Raises:
        UserError: the file is missing, is something else, is truncated or its header is wrong.
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
            raise UserError(f"{path}: tensor {name} begins at byte {begin} of the data; {end} was expected")
        if stop > data.size:
            raise UserError(
                f"{path} is truncated: tensor {name} ends at byte {stop} of the data, which has {data.size}; "
                "copy or download the file again"
            )
        tensors[name] = StoredTensor(name, dtype, shape, data[begin:stop], path)
        end = stop
    if end != data.size:
        raise UserError(f"{path}: {data.size - end} bytes after the last tensor belong to none")
    return tensors


def _check_is_safetensors(path: Path, start: bytes, size: int, length: int) -> None:
    header = start[8:9] == b"{"
    if not header and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise UserError(
            f"{path} is a PyTorch pickle, not safetensors; pickles can run code and are not read: "
            "convert it with transformers' save_pretrained"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` there")
    if size < 8:
        raise UserError(f"{path} is truncated: {size} bytes are too few for a safetensors file")
    if length > MAX_HEADER_BYTES or not header:
        raise UserError(f"{path} is not a safetensors file: it does not begin with a header")
    if 8 + length > size:
        raise UserError(f"{path} is truncated: its header has {length} bytes, the file {size}; copy it again")


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: {twice!r} occurs twice in the header")
        return found

    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as problem:
        raise UserError(f"{path} is not a safetensors file: its header is not JSON") from problem
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: the header is a {type(parsed).__name__}; it must be an object")
    return parsed


def _entry(path: Path, name: str, entry: Any) -> tuple[str, str, int, int, tuple[int, ...]]:
    """Check one header entry: (name, dtype, begin, end, shape)."""

    def counts(key: str) -> list[int]:
        values = entry.get(key)
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise UserError(f"{path}: tensor {name} has {key} {values!r}; a list of counts is needed")
        return values

    if not isinstance(entry, dict):
        raise UserError(f"{path}: tensor {name} is described by {entry!r}; an object is needed")
    dtype, shape, offsets = entry.get("dtype"), counts("shape"), counts("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(f"{path}: tensor {name} has dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise UserError(
            f"{path}: tensor {name} of shape {shape} and dtype {dtype} takes {nbytes} bytes, not those of {offsets}"
        )
    return name, dtype, offsets[0], offsets[1], tuple(shape)


def open_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory, from one file or from the shards of its index.

    Raises:
        UserError: there are no safetensors, a shard is missing or a file is broken.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        return read_safetensors(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _open_shards(directory)
    if not directory.is_dir():
        raise UserError(f"there is no checkpoint directory {directory}")
    if pickles := sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
    ):
        raise UserError(
            f"{directory} holds weights only as a pickle ({pickles[0]}), which can run code and is not read: "
            "convert it with transformers' save_pretrained"
        )
    raise UserError(f"{directory} has no {SINGLE} and no {INDEX}")


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: field 'weight_map' must be an object of tensor names and files")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file of the directory itself")
        if not (directory / file).is_file():
            raise UserError(f"{index} names {file}, which is missing from {directory}")
        for name, tensor in read_safetensors(directory / file).items():
            if places.get(name) == file:
                tensors[name] = tensor
            elif name not in places:
                raise UserError(f"{directory / file} holds tensor {name}, which {INDEX} does not name")
    if missing := sorted(places.keys() - tensors.keys()):
        raise UserError(f"{index} places tensor {missing[0]} in {places[missing[0]]}, which does not hold it")
    return tensors


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a checkpoint directory.

    Raises:
        UserError: ``config.json`` is missing, not JSON, or describes what is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise UserError(f"{path.parent} holds an adapter (adapter_config.json), not a whole model")
        state = "has no config.json, so it is not a checkpoint" if path.parent.is_dir() else "does not exist"
        raise UserError(f"the directory {path.parent} {state}")
    return config_from_hf(read_json(path), str(path))


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """``generation_config.json`` as it is; an empty dictionary where there is none."""
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def read_stop_ids(directory: str | Path) -> tuple[int, ...]:
    """Every token that ends a generation: those of generation_config.json, or else of config.json."""
    path = Path(directory) / "generation_config.json"
    value = read_generation_config(directory).get("eos_token_id")
    if value is None:
        return read_config(directory).eos_token_ids
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: field 'eos_token_id' is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


# Writing

Item = tuple[str, str, tuple[int, ...], NDArray[np.uint8]]  # name, dtype, shape, bytes


def write_tensors(
    directory: str | Path,
    tensors: Iterable[Item],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``(name, dtype, shape, bytes)`` as one file, or as shards with an index.

    At most one shard's tensors are held at a time. Readers see the old weights until the last rename.

    Raises:
        UserError: the directory can't be written to.
    """
    directory = Path(directory)
    written: list[tuple[Path, list[str]]] = []
    total = 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for shard in _shards(tensors, max_shard_bytes):
            temporary = directory / f".{len(written)}.{uuid.uuid4().hex}.tmp"
            written.append((temporary, [name for name, *_ in shard]))
            total += _write_file(temporary, shard)
        names = [SINGLE]
        if len(written) > 1:
            count = len(written)
            names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        stale = {path for path in directory.glob("model*.safetensors*") if path.name not in names}
        for (temporary, _), name in zip(written, names, strict=True):
            temporary.replace(directory / name)
        if len(names) > 1:
            places = {tensor: file for (_, held), file in zip(written, names, strict=True) for tensor in held}
            weight_map = dict(sorted(places.items()))
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            stale.discard(directory / INDEX)
        for path in stale:  # of an earlier save with other shards; a reader would prefer them
            path.unlink()
    except OSError as problem:
        raise UserError(f"cannot write {directory}: {problem.strerror or problem}") from problem
    finally:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_safetensors(path: str | Path, tensors: list[Item]) -> None:
    """Write one file: readers see the old one or the new one. UserError when the disk refuses."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(temporary, tensors)
        temporary.replace(path)
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _nbytes(item: Item) -> int:
    _, dtype, shape, _ = item
    return math.prod(shape) * ITEM_BYTES[dtype]


def _shards(tensors: Iterable[Item], limit: int) -> Iterator[list[Item]]:
    shard: list[Item] = []
    size = 0
    for item in tensors:
        if shard and size + _nbytes(item) > limit:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += _nbytes(item)
    yield shard


def _write_file(path: Path, tensors: list[Item]) -> int:
    """Write one safetensors file and flush it to the disk; the number of bytes of tensors."""
    # Larger items first, so that each tensor lies at a multiple of its item size and can be mapped.
    ordered = sorted(tensors, key=lambda item: -ITEM_BYTES[item[1]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    end = 0
    for item in ordered:
        begin, end = end, end + _nbytes(item)
        header[item[0]] = {"dtype": item[1], "shape": list(item[2]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for item in ordered:
            if item[3].nbytes != _nbytes(item):
                raise ValueError(f"tensor {item[0]} has {item[3].nbytes} bytes, {_nbytes(item)} by its shape")
            stream.write(item[3].data)
        stream.flush()
        os.fsync(stream.fileno())
    return end


def weights_identity(directory: str | Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a directory's weight files: tells changed ones without reading them."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
