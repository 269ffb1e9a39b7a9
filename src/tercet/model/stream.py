"""Safetensors written one tensor at a time: types and shapes are known before any value is.

`tercet.model.checkpoint.write_tensors` holds a shard's values until its header is written; for a
model larger than memory the header has to come first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.files import write_json
from tercet.model.checkpoint import INDEX, ITEM_BYTES, MAX_SHARD_BYTES, SINGLE


@dataclass(frozen=True)
class Spec:
    """What a header says of one tensor. dtype: as safetensors calls it ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stream_tensors(
    directory: Path,
    specs: Sequence[Spec],
    data: Callable[[Spec], NDArray[np.uint8]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write one file, or shards with an index, into ``directory``, which is there and has no weights.

    data: the bytes of a tensor; asked for once each, when it is its turn.

    Raises:
        OSError: the disk refuses.
    """
    shards = _shards(specs, max_shard_bytes)
    if len(shards) == 1:
        _write(directory / SINGLE, shards[0], data)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(directory / name, shard, data)
        places |= {spec.name: name for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    write_json(
        directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    )


def _shards(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write(path: Path, specs: Sequence[Spec], data: Callable[[Spec], NDArray[np.uint8]]) -> None:
    # Larger items first, so that each tensor lies at a multiple of its item size and can be mapped.
    ordered = sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
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
                raise ValueError(f"tensor {spec.name} has {values.nbytes} bytes, {spec.nbytes} by its shape")
            stream.write(values.data)
