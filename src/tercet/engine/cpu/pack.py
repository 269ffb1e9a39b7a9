"""Pack a checkpoint's tensors as quantised weights in one block of memory.

Everything is numpy on memory-mapped tensors, one matrix at a time. `load` caches the result.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.engine.cpu import Quantization
from tercet.engine.cpu import table as at
from tercet.engine.cpu.layout import Layout, Matrix, Shape, layout, norms, padded
from tercet.engine.cpu.table import GROUP4, GROUP8
from tercet.model.config import ModelConfig

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Get = Callable[[str], Floats]  # returns a tensor as float32, by our module names

ROWS_AT_ONCE = 4096  # a multiple of 16
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


def from_bfloat16(raw: NDArray[np.uint16]) -> Floats:
    """Widen bfloat16 bits to float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def quantize_int8(w: Floats) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Quantise a matrix symmetrically, w = q * scale: return q + 128 [rows, K] and scales [rows, K / GROUP8].

    The scales are bits of bfloat16.
    """
    groups = w.reshape(len(w), -1, GROUP8)
    # A scale that is rounded down clips the largest weight by at most 0.4%, less than rounding to 8 bits does.
    scales = to_bfloat16(np.abs(groups).max(-1) / np.float32(127))
    steps = from_bfloat16(scales)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
    q = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int16)
    return (q + 128).astype(np.uint8).reshape(w.shape), scales


def quantize_int4(w: Floats) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    """Quantise a matrix asymmetrically, w = q * scale + offset, q in 0..15.

    Of several ranges, from a group's full range to 0.8 of it, the one with the least squared error is
    chosen: clipping an extreme value often makes the rest of its group more exact.

    Returns:
        q [rows, K], and the scales and offsets [rows, K / GROUP4] as bits of bfloat16.
    """
    groups = w.reshape(len(w), -1, GROUP4)
    low, high = groups.min(-1), groups.max(-1)
    best = np.full(low.shape, np.inf, np.float32)
    chosen = np.zeros(groups.shape, np.uint8)
    scales, offsets = np.zeros(low.shape, np.uint16), np.zeros(low.shape, np.uint16)
    middle, half = (low + high) / 2, (high - low) / 2
    for keep in (1.0, 0.95, 0.9, 0.85, 0.8):
        offset = to_bfloat16(middle - half * np.float32(keep))
        scale = to_bfloat16(half * np.float32(keep * 2 / 15))
        start, step = from_bfloat16(offset), from_bfloat16(scale)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
        q = np.clip(np.rint((groups - start[..., None]) * inverse[..., None]), 0, 15)
        error = np.square(q * step[..., None] + start[..., None] - groups).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better[..., None], q.astype(np.uint8), chosen)
        scales, offsets = np.where(better, scale, scales), np.where(better, offset, offsets)
    return chosen.reshape(w.shape), scales, offsets


def pack_matrix(memory: Bytes, place: Matrix, w: Floats, bias: Floats | None = None) -> None:
    """Write a matrix, at most [rows, columns], into its place and fill the rest with zeros.

    It is quantised a few thousand rows at a time, so that the temporary memory stays small.
    """
    for begin in range(0, place.rows, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, place.rows - begin)
        part = np.zeros((rows, place.columns), np.float32)
        source = w[begin : begin + rows]
        part[: len(source), : w.shape[1]] = source
        _pack_rows(memory, place, begin, part)
    if bias is not None:
        whole = np.zeros(place.rows, np.float32)
        whole[: bias.size] = bias
        _put(memory, place.bias, whole)


def _put(memory: Bytes, offset: int, values: NDArray[Any]) -> None:
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    memory[offset : offset + raw.size] = raw


def _pack_rows(memory: Bytes, place: Matrix, begin: int, w: Floats) -> None:
    """Write rows of a matrix from ``begin`` on. Blocks of 16 rows are stored in order, so they are contiguous."""
    blocks, k = len(w) // 16, place.columns
    # Two bytes for the scale of a group, with int4 two more for its offset.
    scales_at = place.scales + begin * (2 * k // GROUP8 if place.kind == at.INT8 else 4 * k // GROUP4)
    if place.kind == at.INT8:
        q, scales = quantize_int8(w)
        _put(memory, place.weights + begin * k, q.reshape(blocks, 16, k // 4, 4).transpose(0, 2, 1, 3))
        _put(memory, scales_at, scales.reshape(blocks, 16, -1).transpose(0, 2, 1))
    elif place.kind == at.INT4:
        q, scales, offsets = quantize_int4(w)
        eights = q.reshape(blocks, 16, k // 8, 2, 4).transpose(0, 2, 1, 3, 4)
        _put(memory, place.weights + begin * k // 2, eights[..., 0, :] | (eights[..., 1, :] << 4))
        both = np.stack([scales, offsets], axis=1).reshape(blocks, 16, 2, -1)
        _put(memory, scales_at, both.transpose(0, 3, 2, 1))
    else:
        columns = np.ascontiguousarray(w.reshape(blocks, 16, k).transpose(0, 2, 1))
        if place.kind == at.BFLOAT16:
            _put(memory, place.weights + 2 * begin * k, to_bfloat16(columns))
        else:
            _put(memory, place.weights + 4 * begin * k, columns)


def pad_heads(w: Floats, head_dim: int, dim: int) -> Floats:
    """Pad the rows of each head with zeros: [n * head_dim, ...] to [n * dim, ...]."""
    split = w.reshape(-1, head_dim, *w.shape[1:])
    whole = np.zeros((len(split), dim, *w.shape[1:]), np.float32)
    whole[:, :head_dim] = split
    return whole.reshape(-1, *w.shape[1:])


def pack(config: ModelConfig, quantization: Quantization, stored: str, get: Get) -> tuple[Layout, Bytes]:
    """Pack a model's tensors.

    Args:
        config: The network.
        quantization: How matrices are stored.
        stored: The type of the checkpoint's weights (see `layout.layout`).
        get: Returns a tensor by our module name.

    Returns:
        Where each tensor is, and the packed memory.
    """
    places = layout(config, quantization, stored)
    memory = allocate(places.size)
    shape = Shape.of(config)
    dim, head_dim = shape.dim, config.head_dim

    def vector(name: str, values: Floats) -> None:
        offset, length = places.vectors[name]
        memory[offset : offset + 4 * values.size] = np.ascontiguousarray(values, np.float32).view(np.uint8)
        assert values.size <= length

    def matrix(name: str, w: Floats, bias: Floats | None = None) -> None:
        pack_matrix(memory, places.matrices[name], w, bias)

    def heads(w: Floats) -> Floats:
        return pad_heads(w, head_dim, dim)

    def norm(name: str, module: str) -> None:
        vector(name, get(f"{module}.weight") + np.float32(config.norm_offset))
        if config.norm == "layer":
            vector(f"{name}.bias", get(f"{module}.bias"))

    def mlp(name: str, module: str) -> None:
        parts = ["gate_proj", "up_proj"] if config.gated_mlp else ["up_proj"]
        # Blocks of gate and up alternate, so that a thread, which needs both, reads memory in order.
        both = np.zeros((shape.inner // 16, len(parts), 16, config.hidden_size), np.float32)
        biases = np.zeros((shape.inner // 16, len(parts), 16), np.float32)
        for number, part in enumerate(parts):
            w = get(f"{module}.{part}.weight")
            whole = np.zeros((shape.inner, config.hidden_size), np.float32)
            whole[: len(w)] = w
            both[:, number] = whole.reshape(-1, 16, config.hidden_size)
            if config.mlp_bias:
                bias = np.zeros(shape.inner, np.float32)
                bias[: len(w)] = get(f"{module}.{part}.bias")
                biases[:, number] = bias.reshape(-1, 16)
        matrix(
            f"{name}gate_up",
            both.reshape(-1, config.hidden_size),
            biases.reshape(-1) if config.mlp_bias else None,
        )
        down_bias = get(f"{module}.down_proj.bias") if config.mlp_bias else None
        matrix(f"{name}down", get(f"{module}.down_proj.weight"), down_bias)

    matrix("embedding", get("model.embed_tokens.weight"))
    if config.positions == "learned":
        table = np.zeros((config.max_positions, shape.hidden), np.float32)
        table[:, : config.hidden_size] = get("model.embed_positions.weight")
        vector("positions", table.reshape(-1))
    for layer in range(config.num_layers):
        name, module = f"{layer}.", f"model.layers.{layer}"
        for norm_name in norms(config):
            norm(name + norm_name, f"{module}.{norm_name}")
        attention = f"{module}.self_attn"
        qkv = np.concatenate([heads(get(f"{attention}.{part}_proj.weight")) for part in "qkv"])
        bias = None
        if config.attention_bias:
            bias = np.concatenate([heads(get(f"{attention}.{part}_proj.bias")) for part in "qkv"])
        matrix(name + "qkv", qkv, bias)
        if config.qk_norm != "none":
            for part in "qk":
                weight = get(f"{attention}.{part}_norm.weight") + np.float32(config.norm_offset)
                vector(f"{name}{part}_norm", heads(weight))
        out = heads(np.ascontiguousarray(get(f"{attention}.o_proj.weight").T)).T
        matrix(name + "o", out, get(f"{attention}.o_proj.bias") if config.output_bias else None)
        if config.is_mixture(layer):
            matrix(name + "router", get(f"{module}.mlp.gate.weight"))
            for expert in range(config.num_experts):
                mlp(f"{name}{expert}.", f"{module}.mlp.experts.{expert}")
        else:
            mlp(name, f"{module}.mlp")
    norm("norm", "model.norm")
    if not config.tie_embeddings:
        matrix("head", get("lm_head.weight"))
    return places, memory


def padded_vocabulary(config: ModelConfig) -> int:
    """Return the number of rows of the packed head."""
    return padded(config.vocab_size, 16)


def read_packed(path: Path, size: int) -> Bytes | None:
    """Read packed weights of ``size`` bytes from a file; None if it is missing or has another size."""
    try:
        with path.open("rb") as stream:
            if path.stat().st_size != size:
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
