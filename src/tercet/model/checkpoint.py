"""Checkpoint directories: weights in one safetensors file or in shards, and JSON; read without torch."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.files import read_json, write_json
from tercet.model.config import ModelConfig
from tercet.model.families import config_from_hf
from tercet.model.gguf_index import holds_gguf, source_files
from tercet.model.safetensors_file import (
    Item,
    StoredTensor,
    TensorSpec,
    read_safetensors,
    spec_of,
    write_file,
    write_items,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

Value = TypeVar("Value")


# Reading


def open_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Return all tensors of a checkpoint directory, from its single file or from the shards of its index.

    Raises:
        UserError: there are no safetensors, a shard is missing or a file is damaged.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        return read_safetensors(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _open_shards(directory)
    if not directory.is_dir():
        raise UserError(f"the checkpoint directory {directory} does not exist")
    if pickles := sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
    ):
        raise UserError(
            f"{directory} holds weights only as a pickle ({pickles[0]}), which can run code and is not read; "
            "convert it to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"{directory} holds no weights: it has neither {SINGLE} nor {INDEX}")


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: field 'weight_map' must be an object that maps tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}; a shard must be a file in the same directory")
        if not (directory / file).is_file():
            raise UserError(f"{index} names {file}, which is missing from {directory}; download it again")
        for name, tensor in read_safetensors(directory / file).items():
            if places.get(name) == file:
                tensors[name] = tensor
            elif name not in places:
                raise UserError(
                    f"{directory / file} holds tensor {name}, which {INDEX} does not list; "
                    "the files are of different checkpoints"
                )
    if missing := sorted(places.keys() - tensors.keys()):
        raise UserError(
            f"{index} lists tensor {missing[0]} in {places[missing[0]]}, which does not hold it; "
            "the files are of different checkpoints"
        )
    return tensors


def read_config(directory: str | Path) -> ModelConfig:
    """Return the configuration of a checkpoint directory.

    Raises:
        UserError: ``config.json`` is missing, is not JSON, or describes an unsupported model.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise UserError(
                f"{path.parent} holds an adapter (adapter_config.json), not a whole model; name its base"
            )
        if path.parent.is_dir():
            raise UserError(f"the directory {path.parent} has no config.json, so it is not a checkpoint")
        raise UserError(f"the directory {path.parent} does not exist")
    return config_from_hf(read_json(path), str(path))


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """Return the content of ``generation_config.json``, or an empty dictionary if there is no such file."""
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def read_stop_ids(directory: str | Path) -> tuple[int, ...]:
    """Return every token id that ends a generation, from generation_config.json or else config.json."""
    path = Path(directory) / "generation_config.json"
    value = read_generation_config(directory).get("eos_token_id")
    if value is None:
        return read_config(directory).eos_token_ids
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(
            f"{path}: field 'eos_token_id' is {value!r}; it must be a token id or a list of token ids"
        )
    return tuple(ids)


# Writing


def write_tensors(
    directory: str | Path,
    tensors: Iterable[Item],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``(name, dtype, shape, bytes)`` as one file, or as shards with an index.

    At most one shard's tensors are in memory at a time. Readers see the old weights until the last rename.

    Raises:
        UserError: the directory can't be written to.
    """
    directory = Path(directory)
    written: list[tuple[Path, list[TensorSpec]]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for shard in _shards(tensors, lambda item: spec_of(item).nbytes, max_shard_bytes):
            temporary = directory / f".{len(written)}.{uuid.uuid4().hex}.tmp"
            written.append((temporary, [spec_of(item) for item in shard]))
            write_items(temporary, shard)
        names = _file_names(len(written))
        stale = {path for path in directory.glob("model*.safetensors*") if path.name not in names}
        for (temporary, _), name in zip(written, names, strict=True):
            temporary.replace(directory / name)
        if len(names) > 1:
            _write_index(directory, names, [specs for _, specs in written])
            stale.discard(directory / INDEX)
        for path in stale:  # shards of an earlier save, which a reader would prefer
            path.unlink()
    except OSError as problem:
        raise UserError(f"cannot write {directory}: {problem.strerror or problem}") from problem
    finally:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def stream_tensors(
    directory: Path,
    specs: Sequence[TensorSpec],
    data: Callable[[TensorSpec], NDArray[np.uint8]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write one file, or shards with an index, with no more than one tensor in memory at a time.

    `write_tensors` holds a shard's values until its header is written. For a model larger than memory
    the header has to come first, so types and shapes must be known before any value.

    Args:
        directory: an existing directory without weights.
        specs: names, types and shapes of all tensors.
        data: returns the bytes of a tensor; called once for each, when it is written.
        max_shard_bytes: largest size of a shard's tensors.

    Raises:
        OSError: the disk refuses.
    """
    shards = list(_shards(specs, lambda spec: spec.nbytes, max_shard_bytes))
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, data)
    if len(names) > 1:
        _write_index(directory, names, shards)


def _shards(tensors: Iterable[Value], nbytes: Callable[[Value], int], limit: int) -> Iterator[list[Value]]:
    """Divide tensors into groups of at most ``limit`` bytes, in their order; a larger tensor stands alone."""
    shard: list[Value] = []
    size = 0
    for tensor in tensors:
        if shard and size + nbytes(tensor) > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += nbytes(tensor)
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(directory: Path, names: Sequence[str], shards: Sequence[Sequence[TensorSpec]]) -> None:
    places = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    total = sum(spec.nbytes for shard in shards for spec in shard)
    weight_map = dict(sorted(places.items()))
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def weights_identity(directory: str | Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of a directory's weight files, which reveal a change without reading them."""
    if holds_gguf(directory):
        return [(str(file.path), file.size, file.mtime_ns) for file in source_files(directory)]
    files = sorted(Path(directory).glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
