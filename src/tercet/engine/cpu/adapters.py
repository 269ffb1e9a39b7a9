"""LoRA adapters packed beside the weights, in the form that `lowrank` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.engine.cpu import table as at
from tercet.engine.cpu.layout import Layout, Shape, padded
from tercet.engine.cpu.pack import Bytes, Floats, allocate, pack_floats, pad_heads
from tercet.model.config import ModelConfig
from tercet.model.weights import Update


@dataclass(frozen=True)
class Adapter:
    """A packed adapter.

    Attributes:
        table: [layers, CHANGES, CHANGE_WIDTH], which points into ``memory`` and ``blocks``.
        width: The largest number of values of A x that a row has in any matrix.
        memory: The packed factors A and B.
        blocks: For each changed matrix the places of its blocks of B, [blocks, HIGH_WIDTH].
    """

    table: NDArray[np.int64]
    width: int
    memory: Bytes
    blocks: list[NDArray[np.int64]]

    @property
    def address(self) -> int:
        """Address of the table."""
        return int(self.table.ctypes.data)


@dataclass(frozen=True)
class _Part:
    """One module's part of a packed matrix: its blocks there, and whether its rows or columns are heads."""

    module: str
    blocks: range
    rows_are_heads: bool = False
    columns_are_heads: bool = False


@dataclass(frozen=True)
class _Matrix:
    """One of a layer's packed matrices: its number among CHANGES, its shape and the modules joined in it."""

    kind: int
    columns: int
    blocks: int
    parts: list[_Part]


def _matrices(config: ModelConfig, shape: Shape, layer: int) -> list[_Matrix]:
    """Return the matrices of a layer that an adapter may change."""
    module = f"model.layers.{layer}"
    query, key = config.num_heads * shape.dim // 16, config.num_kv_heads * shape.dim // 16
    ends = [0, query, query + key, query + 2 * key]
    qkv = [
        _Part(f"{module}.self_attn.{name}_proj", range(ends[n], ends[n + 1]), rows_are_heads=True)
        for n, name in enumerate("qkv")
    ]
    out = _Part(f"{module}.self_attn.o_proj", range(shape.hidden // 16), columns_are_heads=True)
    matrices = [
        _Matrix(at.QKV_PRODUCT, shape.hidden, ends[-1], qkv),
        _Matrix(at.O_PRODUCT, shape.attention, shape.hidden // 16, [out]),
    ]
    if not config.is_mixture(layer):
        names = ["gate", "up"] if config.gated_mlp else ["up"]
        blocks = len(names) * shape.inner // 16
        up = [
            _Part(f"{module}.mlp.{name}_proj", range(n, blocks, len(names))) for n, name in enumerate(names)
        ]
        down = _Part(f"{module}.mlp.down_proj", range(shape.hidden // 16))
        matrices.append(_Matrix(at.GATE_UP_PRODUCT, shape.hidden, blocks, up))
        matrices.append(_Matrix(at.DOWN_PRODUCT, shape.inner, shape.hidden // 16, [down]))
    return matrices


@dataclass
class _Change:
    """The change that an adapter makes to one matrix of a layer.

    low: A [ranks, columns] of all parts; the ranks of each part are padded to 16.
    high: For each part, scaling * B and the index at which the part's values of A x begin.
    """

    layer: int
    matrix: _Matrix
    low: Floats
    high: list[tuple[_Part, Floats, int]]


def _change(
    layer: int, matrix: _Matrix, updates: Mapping[str, Update], head_dim: int, dim: int
) -> _Change | None:
    """Return an adapter's change of a matrix; None where it leaves the matrix as it is."""
    lows: list[Floats] = []
    high: list[tuple[_Part, Floats, int]] = []
    begins: dict[int, int] = {}  # by identity of A, which parts of one joined checkpoint module share
    ranks = 0
    for part in matrix.parts:
        update = updates.get(part.module)
        if update is None:
            continue
        if id(update.a) not in begins:
            a = update.a
            if part.columns_are_heads:
                a = pad_heads(np.ascontiguousarray(a.T), head_dim, dim).T
            low = np.zeros((padded(len(a), 16), a.shape[1]), np.float32)
            low[: len(a)] = a
            begins[id(update.a)] = ranks
            ranks += len(low)
            lows.append(low)
        b = np.float32(update.scaling) * update.b
        b = pad_heads(b, head_dim, dim) if part.rows_are_heads else b
        high.append((part, b, begins[id(update.a)]))
    return _Change(layer, matrix, np.concatenate(lows), high) if lows else None


def pack_adapter(config: ModelConfig, updates: Mapping[str, Update]) -> Adapter:
    """Pack an adapter's low-rank updates, given by our module names."""
    shape = Shape.of(config)
    candidates = [
        _change(layer, matrix, updates, config.head_dim, shape.dim)
        for layer in range(config.num_layers)
        for matrix in _matrices(config, shape, layer)
    ]
    changes = [change for change in candidates if change is not None]
    # Offsets first, then addresses: memory is allocated when its size is known.
    places = Layout()
    for n, change in enumerate(changes):
        places.matrix(f"{n}", "F32", len(change.low), change.matrix.columns)
        for part, b, _ in change.high:
            # The product takes two columns at a time.
            places.matrix(part.module, "F32", padded(len(b), 16), padded(b.shape[1], 2))
    memory = allocate(places.size)
    base = memory.ctypes.data
    table = np.zeros((config.num_layers, at.CHANGES, at.CHANGE_WIDTH), np.int64)
    blocks: list[NDArray[np.int64]] = []
    for n, change in enumerate(changes):
        [low] = places.matrices[f"{n}"].matrices
        pack_floats(memory, low, change.low)
        high_table = np.zeros((change.matrix.blocks, at.HIGH_WIDTH), np.int64)
        for part, b, begin in change.high:
            [high] = places.matrices[part.module].matrices
            pack_floats(memory, high, b)
            # The packed matrix may have padding blocks beyond the module's own rows; they get no update.
            for number, block in enumerate(part.blocks[: high.rows // 16]):
                high_table[block] = base + high.weights + 4 * 16 * high.columns * number, begin, high.columns
        blocks.append(high_table)
        table[change.layer, change.matrix.kind] = (
            low.rows // 16,
            low.columns,
            base + low.weights,
            high_table.ctypes.data,
        )
    return Adapter(table, max(len(change.low) for change in changes), memory, blocks)


def runs(adapters: Sequence[Adapter], chosen: Sequence[tuple[int, int]], table: NDArray[np.int64]) -> int:
    """Describe the runs of rows with one adapter.

    Args:
        adapters: The loaded adapters; number 1 is the first.
        chosen: For each chunk, in order, the number of its adapter (0: none) and its number of rows.
        table: [.., RUN_WIDTH], where the runs are written.

    Returns:
        The number of runs.
    """
    count = row = last = 0
    for number, rows in chosen:
        if number and number == last:
            table[count - 1, at.RUN_ROWS] += rows
        elif number:
            table[count] = adapters[number - 1].address, row, rows
            count += 1
        row, last = row + rows, number
    return count
