"""The network on a CPU, without torch: packed weights, paged keys and values, compiled steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Chunk
from tercet.engine.cpu import Quantization
from tercet.engine.cpu import table as at
from tercet.engine.cpu.adapters import Adapter, pack_adapter, runs
from tercet.engine.cpu.formats import FORMATS, kind_of, sizes
from tercet.engine.cpu.instructions import INSTRUCTIONS, Instructions, available
from tercet.engine.cpu.layout import Layout, Matrix, Shape, Stack, norms
from tercet.engine.cpu.native import address
from tercet.engine.cpu.pack import Bytes, allocate, padded_vocabulary
from tercet.engine.cpu.pool import physical_cores, pool
from tercet.engine.cpu.table import PAGE, state_bytes
from tercet.host import bits, has_half
from tercet.model.config import ModelConfig
from tercet.model.rope import rope_frequencies
from tercet.model.weights import read_adapter

CACHE_BYTES = 1 << 30  # of keys and values; the system gives the memory as pages are first written
MAX_CHUNKS = 64
LOGIT_ROWS = 64  # rows of logits in memory at a time
NO_WINDOW = 1 << 30
FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in `programs`


class CPUBackend:
    """A `Backend` (see `tercet.engine.backend`) over packed weights.

    Args:
        config: The network.
        places: Where each weight is in ``memory``.
        memory: The packed weights.
        quantization: How the weights were packed; with "none" keys and values are float32, otherwise float16.
        parameters: Number of the model's parameters, for reports.
        threads: Number of threads; None: one for each physical core.
        cache_bytes: Memory for keys and values.
        portable: Do not use instructions that only some processors have.
    """

    page_size = PAGE

    def __init__(
        self,
        config: ModelConfig,
        places: Layout,
        memory: Bytes,
        *,
        quantization: Quantization = "int8",
        parameters: int = 0,
        threads: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        portable: bool = False,
    ) -> None:
        self.config, self._memory = config, memory
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.threads = threads or physical_cores()
        self.max_tokens = 512 if config.hidden_size <= 1024 else 256
        self.max_chunks = MAX_CHUNKS
        # `tercet bench` reports these.
        self.quantization, self.parameters = quantization, parameters
        self.weight_bytes, self.weight_bytes_per_token = places.size, places.read_bytes(config)
        self._shape = Shape.of(config)
        self._half = has_half() and quantization != "none"
        plane = PAGE * self._shape.dim * (2 if self._half else 4)
        self._page_bytes = config.num_layers * config.num_kv_heads * 2 * plane
        self.cache_bytes_per_token = self._page_bytes // PAGE
        self.num_pages = max(2, min(cache_bytes // self._page_bytes, 1 << 16))
        self._pages = allocate(self.num_pages * self._page_bytes)
        self._table = np.zeros(at.SIZE, np.int64)
        self._arrays: list[NDArray[np.generic]] = []  # the arrays that the table points to
        fastest = next(way for way in INSTRUCTIONS if available(way))
        self._instructions: Instructions = "portable" if portable else fastest
        self._adapters: list[Adapter] = []
        self._fill_model(places, plane)
        self._fill_scratch()

    # The table's description of the model

    def _hold(self, array: NDArray[np.generic]) -> int:
        """Keep an array alive and return its address."""
        self._arrays.append(array)
        return int(array.ctypes.data)

    def _descriptor(self, stacks: Sequence[Stack], wide: bool = False) -> int:
        """Return the address of the descriptors of some stacks, one after the other.

        ``wide``: quantised weights are multiplied by activations of 16 bits.
        """
        rows = np.zeros((len(stacks), at.MATRIX_WIDTH), np.int64)
        for row, stack in zip(rows, stacks, strict=True):
            self._describe_matrix(row, stack.matrices[0], wide)
            rest = stack.matrices[1:]
            if rest:
                row[at.NEXT] = self._descriptor([Stack(rest)], wide)
            row[at.ALTERNATE] = stack.alternate
            row[at.BLOCKS] = sum(matrix.rows for matrix in stack.matrices) // 16
            if any(matrix.type in FORMATS for matrix in stack.matrices):
                row[at.QUANTIZE] = address("quantize_wide" if wide else "quantize")
        return self._hold(rows)

    def _describe_matrix(self, row: NDArray[np.int64], matrix: Matrix, wide: bool) -> None:
        """Write what the kernels need to know of one matrix into its descriptor."""
        base, kind = self._memory.ctypes.data, kind_of(matrix.type)
        name = FLOAT_NAMES.get(matrix.type, matrix.type)
        way = f"_{self._instructions}{'_wide' if wide else ''}" if matrix.type in FORMATS else ""
        row[at.PRODUCT] = address(f"product_{name}{way}")
        row[at.QUANTIZED_BYTES] = (2 if wide else 1) * matrix.columns
        row[at.ROW] = address(f"row_{name}")
        row[at.BLOCK_BYTES], row[at.SCALE_BYTES] = sizes(kind, 16, matrix.columns)
        row[at.OWN_BLOCKS], row[at.COLUMNS] = matrix.rows // 16, matrix.columns
        row[at.WEIGHTS], row[at.WEIGHT_SCALES] = base + matrix.weights, base + matrix.scales
        row[at.BIAS] = base + matrix.bias if matrix.bias >= 0 else 0

    def _fill_model(self, places: Layout, plane: int) -> None:
        """Describe the model in the table; ``plane``: bytes of a head's keys (or values) in a page."""
        config, shape, t = self.config, self._shape, self._table
        base = self._memory.ctypes.data

        def vector(name: str) -> int:
            return base + places.vectors[name][0] if name in places.vectors else 0

        def matrix(*names: str, wide: bool = False) -> int:
            return self._descriptor([places.matrices[name] for name in names], wide)

        t[at.LAYERS], t[at.HIDDEN], t[at.HIDDEN_SIZE] = config.num_layers, shape.hidden, config.hidden_size
        t[at.HEADS], t[at.KV_HEADS] = config.num_heads, config.num_kv_heads
        t[at.DIM], t[at.DIM_SIZE] = shape.dim, config.head_dim
        t[at.INNER], t[at.ATTENTION_WIDTH] = shape.inner, shape.attention
        half = "_half" if self._half else ""
        t[at.ATTEND_ONE], t[at.ATTEND_FOUR] = address(f"attend_one{half}"), address(f"attend_four{half}")
        t[at.STORE] = address("store_half" if self._half else "store_float")
        t[at.GATE] = address(f"{'gated' if config.gated_mlp else 'ungated'}_{config.activation}")
        t[at.ATTENTION_CAP] = bits(config.attention_softcap) if config.attention_softcap else 0
        t[at.LOGIT_CAP] = bits(config.logit_softcap) if config.logit_softcap else 0
        t[at.GATED] = config.gated_mlp
        t[at.LAYER_NORM], t[at.EPS] = config.norm == "layer", bits(config.norm_eps)
        t[at.PRE_NORM], t[at.POST_NORM] = config.pre_norm, config.post_norm
        t[at.PARALLEL] = config.parallel_residual
        t[at.QK_NORM] = ("none", "head", "projection").index(config.qk_norm)
        t[at.EXPERTS], t[at.EXPERTS_PER_TOKEN] = config.num_experts, config.experts_per_token
        t[at.NORMALIZE] = config.normalize_expert_weights
        scale = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
        t[at.FLOATS] = self._hold(np.array([scale, config.embedding_scale or 1, config.norm_eps], np.float32))
        t[at.EMBEDDING] = matrix("embedding")
        t[at.HEAD] = matrix("embedding" if config.tie_embeddings else "head", wide=True)
        t[at.LEARNED_POSITIONS] = vector("positions")
        t[at.FINAL_NORM], t[at.FINAL_NORM_BIAS] = vector("norm"), vector("norm.bias")
        t[at.KEYS_VALUES], t[at.PAGE_BYTES] = self._pages.ctypes.data, self._page_bytes
        t[at.PLANE_BYTES] = plane
        self._fill_rope()
        layers = np.zeros((config.num_layers, at.LAYER_WIDTH), np.int64)
        for number, row in enumerate(layers):
            name = f"{number}."
            columns = [at.INPUT_NORM, at.MLP_NORM] if config.pre_norm else []
            columns += [at.ATTENTION_OUTPUT_NORM, at.MLP_OUTPUT_NORM] if config.post_norm else []
            for column, norm in zip(columns, norms(config), strict=True):
                row[column] = vector(name + norm)
            row[at.INPUT_NORM_BIAS] = vector(name + "input_layernorm.bias")
            row[at.MLP_NORM_BIAS] = vector(name + "post_attention_layernorm.bias")
            row[at.QKV_MATRIX], row[at.O_MATRIX] = matrix(name + "qkv", wide=True), matrix(name + "o")
            row[at.Q_NORM], row[at.K_NORM] = vector(name + "q_norm"), vector(name + "k_norm")
            mlps = [name]
            if config.is_mixture(number):
                row[at.ROUTER] = matrix(name + "router")
                mlps = [f"{name}{expert}." for expert in range(config.num_experts)]
            row[at.GATE_UP] = matrix(*(f"{mlp}gate_up" for mlp in mlps))
            row[at.DOWN] = matrix(*(f"{mlp}down" for mlp in mlps))
            window = config.window(number)
            row[at.WINDOW] = NO_WINDOW if window is None else window
            if config.has_rope(number):
                local = config.has_local_rope(number)
                row[at.COSINES], row[at.SINES] = (table.ctypes.data for table in self._rope[local])
        t[at.LAYER_TABLE] = self._hold(layers)

    def _fill_rope(self) -> None:
        """Make the tables of cosines and sines [max_positions, pairs] for local and for global layers."""
        config = self.config
        self._rope: dict[bool, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._frequencies: dict[bool, NDArray[np.float32]] = {}  # of the tables' present contents
        self._rope_length = 0
        scaling = config.rope_scaling
        self._by_length = config.positions == "rope" and scaling is not None and scaling.by_length
        if config.positions != "rope":
            return
        self._table[at.ROTARY_HALF] = config.rotary // 2
        for local in {config.has_local_rope(layer) for layer in range(config.num_layers)}:
            empty = (config.max_positions, config.rotary // 2)
            self._rope[local] = (np.zeros(empty, np.float32), np.zeros(empty, np.float32))
        self._reach(min(1024, config.max_positions))

    def _reach(self, length: int) -> None:
        """Fill the rotary tables for sequences of up to ``length`` tokens."""
        if length <= self._rope_length and not self._by_length:
            return
        size = self._rope_length
        if length > size:
            size = min(self.config.max_positions, max(length, 2 * size))
        for local, (cosines, sines) in self._rope.items():
            frequencies, factor = rope_frequencies(self.config, length, local)
            if size == self._rope_length and np.array_equal(frequencies, self._frequencies.get(local, ())):
                continue
            self._frequencies[local] = frequencies
            angles = np.outer(np.arange(size, dtype=np.float32), frequencies)
            np.multiply(np.cos(angles), np.float32(factor), out=cosines[:size])
            np.multiply(np.sin(angles), np.float32(factor), out=sines[:size])
        self._rope_length = size

    def _fill_scratch(self) -> None:
        """Allocate the memory of a step, and describe it in the table."""
        config, shape, t = self.config, self._shape, self._table
        rows = max(self.max_tokens, at.SMALL * self.threads)
        experts = max(1, config.experts_per_token)
        widest = max(shape.hidden, shape.inner, shape.attention)

        def floats(count: int) -> int:
            return self._hold(allocate(4 * count + 64))

        heads = config.num_heads + 2 * config.num_kv_heads
        self._normed = allocate(4 * rows * shape.hidden).view(np.float32).reshape(rows, shape.hidden)
        t[at.X], t[at.NORMED] = floats(rows * shape.hidden), self._normed.ctypes.data
        t[at.OUTPUT] = floats(rows * shape.hidden)
        t[at.QUANTIZED] = floats(rows * experts * widest // 2)
        t[at.SCALES] = floats(rows * experts * widest // 32)
        t[at.SUMS] = floats(rows * experts * widest // 16)
        t[at.QKV], t[at.ATTENDED] = floats(rows * heads * shape.dim), floats(rows * shape.attention)
        t[at.INNER_ROWS] = floats(rows * experts * shape.inner)
        t[at.ROUTES], t[at.ROUTE_WEIGHTS] = floats(2 * rows * experts), floats(rows * experts)
        private = max(4 * 16 * (3 * rows + 1), state_bytes(4, shape.dim), 4 * (2 * config.num_experts + 16))
        private += -private % 64 + 64
        t[at.PRIVATE], t[at.PRIVATE_BYTES] = floats(private * self.threads // 4), private
        self._logits = np.zeros((LOGIT_ROWS, padded_vocabulary(config)), np.float32)
        t[at.LOGITS] = self._logits.ctypes.data
        pages = -(-self.max_positions // PAGE) + 1
        self._ids, self._positions, self._chunk_of, self._selected = (
            np.zeros(rows, np.int64) for _ in range(4)
        )
        self._chunks = np.zeros((MAX_CHUNKS, 3), np.int64)
        self._chunk_pages = np.zeros((MAX_CHUNKS, pages), np.int64)
        self._chunks[:, 2] = self._chunk_pages.ctypes.data + 8 * pages * np.arange(MAX_CHUNKS)
        self._tiles = np.zeros((rows, 3), np.int64)
        self._runs = np.zeros((MAX_CHUNKS, at.RUN_WIDTH), np.int64)
        self._counters = np.zeros(at.PHASES * (config.num_layers + 1), np.int64)
        for column, array in (
            (at.IDS, self._ids),
            (at.POSITIONS, self._positions),
            (at.CHUNK_OF, self._chunk_of),
            (at.SELECTED_ROWS, self._selected),
            (at.CHUNKS, self._chunks),
            (at.TILE_TABLE, self._tiles),
            (at.RUN_TABLE, self._runs),
            (at.COUNTERS, self._counters),
        ):
            t[column] = self._hold(array)

    def add_adapter(self, directory: str | Path) -> int:
        """Load a LoRA adapter beside the weights and return its number, from 1 on (see `Backend`)."""
        adapter = pack_adapter(self.config, read_adapter(directory, self.config)[1])
        table = self._table
        table[at.LOW_PRODUCT] = address("product_float32")
        if adapter.width > table[at.LOW_WIDTH]:
            self._low_rows = allocate(4 * len(self._ids) * adapter.width)
            table[at.LOW_ROWS], table[at.LOW_WIDTH] = self._low_rows.ctypes.data, adapter.width
        self._adapters.append(adapter)
        return len(self._adapters)

    # Steps

    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks and return their outputs' logits [outputs, V] (see `Backend`)."""
        parts = [part.copy() for part in self._logit_parts(chunks)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Compute the chunks and return the log-probabilities of target tokens (see `Backend`)."""
        values: list[NDArray[np.float32]] = []
        likeliest: list[NDArray[np.bool_]] = []
        done = 0
        for logits in self._logit_parts(chunks):
            row_targets = targets[done : done + len(logits)]
            done += len(logits)
            best = logits.argmax(-1)
            shift = logits[np.arange(len(logits)), best]
            total = np.exp(logits - shift[:, None]).sum(-1, dtype=np.float64)
            norm = (shift + np.log(total)).astype(np.float32)
            rows = np.repeat(np.arange(len(row_targets)), [len(tokens) for tokens in row_targets])
            flat = np.array([token for tokens in row_targets for token in tokens], dtype=np.int64)
            values.append(logits[rows, flat] - norm[rows])
            likeliest.append(best[rows] == flat)
        return np.concatenate(values), np.concatenate(likeliest)

    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks and return the final norm's rows [outputs, H] (see `Backend`)."""
        table, size = self._table, self.config.hidden_size
        parts: list[NDArray[np.float32]] = []
        for step in self._steps(chunks):
            selected = self._describe(step)
            table[at.HEAD_ONLY], table[at.STATES_ONLY], table[at.SELECTED] = 0, 1, len(selected)
            self._selected[: len(selected)] = selected
            self._run()
            parts.append(self._normed[: len(selected), :size].copy())
        return np.concatenate(parts)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the contents of pages, each pair (source, target)."""
        size = self._page_bytes
        for source, target in pairs:
            self._pages[target * size : (target + 1) * size] = self._pages[
                source * size : (source + 1) * size
            ]

    def release(self, sequence: int) -> None:
        """Do nothing: a sequence has no memory beyond its pages."""

    def _logit_parts(self, chunks: Sequence[Chunk]) -> Iterator[NDArray[np.float32]]:
        """Run the step; yield the selected rows' logits in parts [up to LOGIT_ROWS, V], each valid until the next."""
        table = self._table
        for step in self._steps(chunks):
            selected = self._describe(step)
            for begin in range(0, max(1, len(selected)), LOGIT_ROWS):
                part = selected[begin : begin + LOGIT_ROWS]
                table[at.HEAD_ONLY], table[at.STATES_ONLY], table[at.SELECTED] = begin > 0, 0, len(part)
                self._selected[: len(part)] = part
                self._run()
                yield self._logits[: len(part), : self.vocab_size]

    def _steps(self, chunks: Sequence[Chunk]) -> list[Sequence[Chunk]]:
        """Divide the chunks into steps: all in one, unless a sequence's length determines its rotary tables."""
        return [[chunk] for chunk in chunks] if self._by_length else [chunks]

    def _describe(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write the chunks into the table's arrays and return the indices of the rows that the head reads."""
        row = tile = longest = 0
        selected: list[int] = []
        for number, chunk in enumerate(chunks):
            count, start = len(chunk.tokens), chunk.start
            end = row + count
            self._ids[row:end] = chunk.tokens
            if count == 1:
                self._positions[row] = start
            else:
                self._positions[row:end] = np.arange(start, start + count)
            self._chunk_of[row:end] = number
            self._chunks[number, 0], self._chunks[number, 1] = row, start
            pages = -(-(start + count) // PAGE)
            self._chunk_pages[number, :pages] = chunk.pages[:pages]
            fours = count // 4
            for first in range(0, 4 * fours, 4):
                self._tiles[tile] = (number, first, 4)
                tile += 1
            for first in range(4 * fours, count):
                self._tiles[tile] = (number, first, 1)
                tile += 1
            selected += [row + index for index in chunk.outputs]
            row, longest = end, max(longest, start + count)
        self._table[at.TOKENS], self._table[at.TILES] = row, tile
        if self._adapters:
            chosen = [(chunk.adapter, len(chunk.tokens)) for chunk in chunks]
            self._table[at.RUNS] = runs(self._adapters, chosen, self._runs)
        self._reach(longest)
        return selected

    def _run(self) -> None:
        self._counters[:] = 0
        pool(self.threads).run(self._table)  # looked up each time: a forked child needs a pool of its own
