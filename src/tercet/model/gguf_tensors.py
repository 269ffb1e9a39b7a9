"""The weights of a GGUF file by the network's names: the inverse of the layout that export writes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.gguf_architecture import ARCHITECTURES, Architecture, Target, separate, targets
from tercet.model.gguf_file import TensorInfo
from tercet.model.gguf_index import read_tensors
from tercet.model.gguf_values import FLOAT_TYPES, Blocks, Bytes, Floats, check_readable, rows_of, to_float32
from tercet.model.tensor_names import network_tensors

# Tensors that hold no weights: the configuration contains what they say.
_IGNORED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight")


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the network lies: rows of a tensor, or a matrix of a stack."""

    info: TensorInfo
    target: Target
    index: slice | int
    heads: int  # by which its rows were reordered; 0: not

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.index, int):
            return self.info.shape[1:]
        return (self.index.stop - self.index.start, *self.info.shape[1:])


class GGUFTensors:
    """The tensors of the GGUF file behind a checkpoint directory.

    Attributes:
        dtype: safetensors' name of the matrices' type; "F32" if they are quantised or of several types.
        parameters: number of weights.

    Raises:
        UserError: a file is missing or has changed, or a tensor is missing, unexpected, of a wrong shape or
            of a type that can't be read.
    """

    def __init__(self, directory: str | Path, config: ModelConfig) -> None:
        self._maps: dict[Path, Bytes] = {}
        infos = read_tensors(directory)
        self._places = _places(config, infos)
        kinds = {place.info.type for place in self._places.values() if len(place.shape) == 2}
        kind = kinds.pop() if len(kinds) == 1 else "F32"
        self.dtype = kind if kind in FLOAT_TYPES else "F32"
        self.parameters = sum(math.prod(place.shape) for place in self._places.values())

    def values(self, name: str) -> Floats:
        """Return the tensor of that name in ``Transformer.state_dict()``, as float32."""
        place = self._places[name]
        info, target = place.info, place.target
        if len(info.shape) == 1:
            values = to_float32(info.type, self._stored(info), info.shape[0])[place.index]
            values = separate(values, place.heads) if place.heads else values
        else:
            values = to_float32(info.type, self._rows(place), info.shape[-1])
        if target.scale != 1:
            values = values / np.float32(target.scale)
        with np.errstate(invalid="ignore"):
            return values - np.float32(target.offset) if target.offset else values

    def blocks(self, name: str) -> Blocks | None:
        """Return the quantised rows of a matrix; None for float types and where values have to be changed."""
        kind = self.type_of(name)
        return None if kind in FLOAT_TYPES else Blocks(kind, self._rows(self._places[name]))

    def type_of(self, name: str) -> str:
        """Return GGUF's name of the type of `blocks`, or where it returns None a type that holds the values."""
        place = self._places[name]
        kind, target = place.info.type, place.target
        changed = len(place.shape) != 2 or target.scale != 1 or target.offset
        return self.dtype_of(name) if changed or kind == "F64" else kind

    def dtype_of(self, name: str) -> str:
        """Return safetensors' name of the type that holds a tensor's values exactly."""
        kind = self._places[name].info.type
        return kind if kind in FLOAT_TYPES else "F32"

    def _rows(self, place: _Place) -> Bytes:
        """Return the rows of a matrix in our order."""
        rows = self._stored(place.info)[place.index]
        return separate(rows, place.heads) if place.heads else rows

    def _stored(self, info: TensorInfo) -> Bytes:
        if info.file not in self._maps:
            try:
                self._maps[info.file] = np.memmap(info.file, np.uint8, mode="c")
            except OSError as problem:
                raise UserError(f"cannot read {info.file}: {problem.strerror or problem}") from problem
        return rows_of(info, self._maps[info.file])


def _places(config: ModelConfig, infos: dict[str, TensorInfo]) -> dict[str, _Place]:
    graph = ARCHITECTURES[config.family]
    shapes = {part.name: part.shape for part in network_tensors(config)}
    remaining = {name: info for name, info in infos.items() if not _IGNORED.fullmatch(name)}
    places: dict[str, _Place] = {}
    for target in targets(config, graph):
        for part in _as_stored(target, graph, remaining, shapes):
            info = remaining.pop(part.name, None)
            if info is None:
                file = next(iter(infos.values())).file if infos else "the file"
                raise UserError(f"{file}: tensor {part.name} is missing; convert the model again")
            _check(info, part)
            places |= _parts(info, part, shapes)
    for name, info in remaining.items():
        raise UserError(
            f"{info.file}: tensor {name} is unexpected; a {config.family} model with this metadata has no such tensor"
        )
    return places


def _as_stored(
    target: Target, graph: Architecture, infos: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]]
) -> list[Target]:
    """Return the tensors of a file for a target: itself, or its parts where the file has them apart."""
    layer, _, rest = target.name.rpartition(".")[0].rpartition(".")
    kind = target.name.rpartition(".")[2]
    names = graph.joined.get(rest, ())
    if target.name in infos or len(names) != len(target.parts) or f"{layer}.{names[0]}.{kind}" not in infos:
        return [target]
    return [
        replace(target, name=f"{layer}.{name}.{kind}", parts=(part,), shape=shapes[part])
        for name, part in zip(names, target.parts, strict=True)
    ]


def _check(info: TensorInfo, target: Target) -> None:
    check_readable(info)
    if info.shape != target.shape:
        raise UserError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}; the metadata requires {list(target.shape)}"
        )


def _parts(info: TensorInfo, target: Target, shapes: dict[str, tuple[int, ...]]) -> dict[str, _Place]:
    heads = target.heads or (0,) * len(target.parts)
    if len(info.shape) > len(shapes[target.parts[0]]):  # a stack of experts
        return {name: _Place(info, target, number, heads[number]) for number, name in enumerate(target.parts)}
    places, start = {}, 0
    for name, count in zip(target.parts, heads, strict=True):
        places[name] = _Place(info, target, slice(start, start + shapes[name][0]), count)
        start += shapes[name][0]
    return places
