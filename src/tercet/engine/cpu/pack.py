"""Pack a model's weights in one block of memory, in the order that the kernels read.

Everything is numpy on memory-mapped tensors, one matrix at a time. `load` caches the result.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.engine.cpu.formats import FORMATS, repack, row_bytes
from tercet.engine.cpu.layout import Layout, Matrix, Shape, Types, gate_and_up, layout, norms, padded
from tercet.model.block_quantization import quantize
from tercet.model.config import ModelConfig
from tercet.model.gguf_values import Blocks

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Get = Callable[[str], Floats]  # returns a tensor as float32, by our module names
GetBlocks = Callable[[str], Blocks | None]  # returns a file's own quantised rows, by our names of weights
GetRows = Callable[[int, int], Bytes]  # returns the bytes of a matrix's rows begin..end-1

ROWS_AT_ONCE = 4096  # a multiple of 32
LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


def allocate(size: int) -> Bytes:
    """Allocate zeroed memory, in large pages where the system has them: fewer address translations, faster reads."""
    if LARGE_PAGES is None:
        return np.zeros(max(size, 1), np.uint8)
    # Private memory: mmap's default is shared memory, which has small pages only.
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(LARGE_PAGES)
    return np.frombuffer(block, dtype=np.uint8)


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even."""
    raw = values.view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def encode(values: Floats, type_name: str, importance: Floats | None = None) -> Bytes:
    """Return rows [rows, columns] as bytes of a type [rows, bytes]; ``importance`` as in `quantize`."""
    if type_name in FORMATS:
        return quantize(values, type_name, importance)
    stored: NDArray[Any] = np.ascontiguousarray(values)
    if type_name == "BF16":
        stored = to_bfloat16(stored)
    elif type_name == "F16":
        stored = stored.astype(np.float16)
    return stored.view(np.uint8).reshape(len(values), -1)


def pack_matrix(memory: Bytes, place: Matrix, rows: GetRows) -> None:
    """Write a matrix into its place, a few thousand rows at a time, so that the temporary memory stays small."""
    weights, scales = place.weights, place.scales
    for begin in range(0, place.rows, ROWS_AT_ONCE):
        parts = repack(place.type, rows(begin, min(begin + ROWS_AT_ONCE, place.rows)))
        _put(memory, weights, parts[0])
        _put(memory, scales, parts[1])
        weights, scales = weights + parts[0].size, scales + parts[1].size


def pack_floats(memory: Bytes, place: Matrix, values: Floats) -> None:
    """Write a float32 matrix, at most [rows, columns], into its place and fill the rest with zeros."""
    whole = np.zeros((place.rows, place.columns), np.float32)
    whole[: len(values), : values.shape[1]] = values
    pack_matrix(memory, place, lambda begin, end: encode(whole[begin:end], place.type))


def _put(memory: Bytes, offset: int, values: NDArray[Any]) -> None:
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    memory[offset : offset + raw.size] = raw


def pad_heads(rows: NDArray[Any], head_dim: int, dim: int) -> NDArray[Any]:
    """Pad the rows of each head with zeros: [n * head_dim, ...] to [n * dim, ...]."""
    if dim == head_dim:
        return rows
    split = rows.reshape(-1, head_dim, *rows.shape[1:])
    whole = np.zeros((len(split), dim, *rows.shape[1:]), rows.dtype)
    whole[:, :head_dim] = split
    return whole.reshape(-1, *rows.shape[1:])


def _slices(rows: Bytes) -> GetRows:
    return lambda begin, end: rows[begin:end]


class Packer:
    """Packs the tensors of one model.

    Args:
        config: The network.
        types: The type of each weight in memory.
        get: Returns a tensor by our name of it.
        blocks: Returns a file's own quantised rows, which are used where their type is the weight's type.
        importance: The importance of columns by name of a weight, see `quantize`.
    """

    def __init__(
        self,
        config: ModelConfig,
        types: Types,
        get: Get,
        blocks: GetBlocks,
        importance: Mapping[str, Floats] | None = None,
    ) -> None:
        self.config, self._get, self._blocks = config, get, blocks
        self._importance = importance or {}
        self.places = layout(config, types)
        self.memory = allocate(self.places.size)
        self._shape = Shape.of(config)

    def _rows(self, name: str, columns: int, change: Callable[[Any], Any] = lambda rows: rows) -> GetRows:
        """Return the rows of a weight, with zeros for what lies beyond its shape.

        ``change`` is applied to the rows as a whole, floats or bytes.
        """
        type_name = self.places.types[name]
        stored = self._blocks(name)
        width = row_bytes(type_name, columns)
        if stored is not None and stored.type == type_name:
            own: NDArray[Any] = change(stored.data)
        else:
            own, stored = change(self._get(name)), None
        importance = self._importance.get(name)
        if importance is not None:
            # Where zeros stand between the columns of heads, all columns count alike.
            fits = stored is None and importance.size == own.shape[1]
            importance = np.pad(importance, (0, columns - importance.size)) if fits else None

        def rows(begin: int, end: int) -> Bytes:
            part = own[begin:end]
            if stored is None:
                whole = np.zeros((len(part), columns), np.float32)
                whole[:, : part.shape[1]] = part
                part = encode(whole, type_name, importance)
            result = np.zeros((end - begin, width), np.uint8)
            result[: len(part), : part.shape[1]] = part
            return result

        return rows

    def _matrix(self, name: str, weight: str, change: Callable[[Any], Any] = lambda rows: rows) -> None:
        [place] = self.places.matrices[name].matrices
        pack_matrix(self.memory, place, self._rows(weight, place.columns, change))

    def _bias(self, name: str, biases: Floats) -> None:
        """Write the biases of all rows of a stack."""
        begin = 0
        for place in self.places.matrices[name].matrices:
            part = np.zeros(place.rows, np.float32)
            own = biases[begin : begin + place.rows]
            part[: own.size] = own
            _put(self.memory, place.bias, part)
            begin += place.rows

    def _vector(self, name: str, values: Floats) -> None:
        offset, length = self.places.vectors[name]
        assert values.size <= length
        _put(self.memory, offset, np.ascontiguousarray(values, np.float32))

    def _norm(self, name: str, module: str) -> None:
        self._vector(name, self._get(f"{module}.weight") + np.float32(self.config.norm_offset))
        if self.config.norm == "layer":
            self._vector(f"{name}.bias", self._get(f"{module}.bias"))

    def _heads(self, rows: NDArray[Any]) -> NDArray[Any]:
        return pad_heads(rows, self.config.head_dim, self._shape.dim)

    def _qkv(self, name: str, module: str) -> None:
        """Pack queries, keys and values, one below the other."""
        config, shape = self.config, self._shape
        heights = [
            count * shape.dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ]
        sources = [self._rows(f"{module}.{part}_proj.weight", shape.hidden, self._heads) for part in "qkv"]
        ends = np.cumsum(heights)
        first = 0
        for place in self.places.matrices[name].matrices:
            last = first + place.rows
            data = [
                source(max(first, end - height) - (end - height), min(last, end) - (end - height))
                for source, height, end in zip(sources, heights, ends, strict=True)
                if first < end and end - height < last
            ]
            pack_matrix(self.memory, place, _slices(np.concatenate(data)))
            first = last
        if config.attention_bias:
            self._bias(
                name, np.concatenate([self._heads(self._get(f"{module}.{part}_proj.bias")) for part in "qkv"])
            )

    def _mlp(self, name: str, module: str) -> None:
        """Pack an MLP. Blocks of gate and up alternate, so that a thread, which needs both, reads in order."""
        config, inner = self.config, self._shape.inner
        names = gate_and_up(config)
        stack = self.places.matrices[f"{name}gate_up"]
        columns = stack.matrices[0].columns
        sources = [self._rows(f"{module}.{part}.weight", columns) for part in names]
        if stack.alternate:
            for place, source in zip(stack.matrices, sources, strict=True):
                pack_matrix(self.memory, place, source)
        else:

            def both(begin: int, end: int) -> Bytes:
                count = len(sources)
                parts = [source(begin // count, end // count) for source in sources]
                blocks = [part.reshape(-1, 16, part.shape[1]) for part in parts]
                return np.stack(blocks, axis=1).reshape(end - begin, -1)

            pack_matrix(self.memory, stack.matrices[0], both)
        self._matrix(f"{name}down", f"{module}.down_proj.weight")
        if config.mlp_bias:
            biases = np.zeros((len(names), inner), np.float32)
            for bias, part in zip(biases, names, strict=True):
                values = self._get(f"{module}.{part}.bias")
                bias[: values.size] = values
            ordered = biases if stack.alternate else biases.reshape(len(names), -1, 16).swapaxes(0, 1)
            self._bias(f"{name}gate_up", ordered.reshape(-1))
            self._bias(f"{name}down", self._get(f"{module}.down_proj.bias"))

    def _layer(self, layer: int) -> None:
        config, shape = self.config, self._shape
        name, module = f"{layer}.", f"model.layers.{layer}"
        for norm_name in norms(config):
            self._norm(name + norm_name, f"{module}.{norm_name}")
        attention = f"{module}.self_attn"
        self._qkv(name + "qkv", attention)
        if config.qk_norm != "none":
            for part in "qk":
                weight = self._get(f"{attention}.{part}_norm.weight") + np.float32(config.norm_offset)
                self._vector(f"{name}{part}_norm", self._heads(weight))
        columns = shape.dim != config.head_dim  # then the columns of heads are padded
        self._matrix(
            name + "o",
            f"{attention}.o_proj.weight",
            (lambda rows: self._heads(np.ascontiguousarray(rows.T)).T) if columns else (lambda rows: rows),
        )
        if config.output_bias:
            self._bias(name + "o", self._get(f"{attention}.o_proj.bias"))
        if config.is_mixture(layer):
            [router] = self.places.matrices[name + "router"].matrices
            pack_floats(self.memory, router, self._get(f"{module}.mlp.gate.weight"))
            for expert in range(config.num_experts):
                self._mlp(f"{name}{expert}.", f"{module}.mlp.experts.{expert}")
        else:
            self._mlp(name, f"{module}.mlp")

    def pack(self) -> None:
        """Pack everything."""
        config, shape = self.config, self._shape
        self._matrix("embedding", "model.embed_tokens.weight")
        if config.positions == "learned":
            table = np.zeros((config.max_positions, shape.hidden), np.float32)
            table[:, : config.hidden_size] = self._get("model.embed_positions.weight")
            self._vector("positions", table.reshape(-1))
        for layer in range(config.num_layers):
            self._layer(layer)
        self._norm("norm", "model.norm")
        if not config.tie_embeddings:
            self._matrix("head", "lm_head.weight")


def pack(
    config: ModelConfig,
    types: Types,
    get: Get,
    blocks: GetBlocks = lambda name: None,
    importance: Mapping[str, Floats] | None = None,
) -> tuple[Layout, Bytes]:
    """Pack a model's tensors; the arguments are those of `Packer`.

    Returns:
        Where each tensor is, and the packed memory.
    """
    packer = Packer(config, types, get, blocks, importance)
    packer.pack()
    return packer.places, packer.memory


def padded_vocabulary(config: ModelConfig) -> int:
    """Return the number of rows of the packed head."""
    return padded(config.vocab_size, 16)


def read_packed(path: Path, size: int, file_size: int) -> Bytes | None:
    """Read packed weights of ``size`` bytes from a file; None if it is missing or not of ``file_size`` bytes."""
    try:
        with path.open("rb") as stream:
            if path.stat().st_size != file_size:
                return None
            memory = allocate(size)
            view = memory.data
            done = 0
            while done < size:
                count = stream.readinto(view[done:])
                if not count:
                    return None
                done += count
            return memory
    except OSError:
        return None
