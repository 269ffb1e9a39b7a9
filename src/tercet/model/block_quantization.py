"""Quantise matrices into GGUF's block formats, with scales searched for the least error.

The layouts are those of GGUF's types, so that `gguf.quants.dequantize` reads them. A value that a block can
hold exactly is kept: quantising what was dequantised from the same type changes nothing but the last digits
of scales.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.host import allowed_cores

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

VALUES_AT_ONCE = 1 << 18  # a thread's share of a matrix, which bounds the temporary memory
LARGEST = 65504.0  # float16's, the type of scales


@dataclass(frozen=True)
class BlockType:
    """A type of blocks: the weights in a block, its bytes, and how rows are quantised."""

    columns: int
    bytes: int
    quantize: Callable[[Floats, Floats], Bytes]


def type_bytes(type: str, columns: int) -> int:
    """Return the bytes of a row of ``columns`` weights.

    Raises:
        ValueError: the type is unknown, or its blocks do not divide the row.
    """
    blocks = _type(type)
    if columns % blocks.columns:
        raise ValueError(
            f"a row of {columns} weights can't be stored as {type}, whose blocks have {blocks.columns}"
        )
    return columns // blocks.columns * blocks.bytes


def quantize(values: Floats, type: str, importance: Floats | None = None) -> Bytes:
    """Quantise a matrix to blocks of GGUF's ``type``.

    Args:
        values: float32 [rows, columns].
        type: One of `TYPES`.
        importance: float32 [columns], the weight of a column's squared error, such as the mean of its squared
            activations; None: all columns alike. Not negative.

    Returns:
        uint8 [rows, bytes of a row], see `type_bytes`. The same values give the same bytes on the same kind of
        processor, whatever its number of cores; another kind may add up errors in another order and choose a scale
        that is as good.

    Raises:
        ValueError: the type is unknown, its blocks do not divide the rows, ``importance`` has another length
            or is negative or not finite, or a value is not finite or beyond float16's range.
    """
    rows, columns = values.shape
    size = type_bytes(type, columns)
    weights = _weights(importance, columns)
    result = np.empty((rows, size), np.uint8)
    at_once = max(1, VALUES_AT_ONCE // max(columns, 1))

    def fill(begin: int) -> None:
        part = np.array(values[begin : begin + at_once], np.float32, order="C")  # writable: one compiled form
        # NaN fails the comparison too.
        if part.size and not np.abs(part).max() <= LARGEST:
            raise ValueError("values to quantise must be finite and within float16's range (65504)")
        result[begin : begin + at_once] = _type(type).quantize(part, weights)

    starts = range(0, rows, at_once)
    with ThreadPoolExecutor(max(1, min(len(starts), len(allowed_cores())))) as pool:
        for _ in pool.map(fill, starts):
            pass
    return result


def _type(name: str) -> BlockType:
    blocks = TYPES.get(name)
    if blocks is None:
        raise ValueError(f"unknown type {name!r} of blocks; the types are {', '.join(TYPES)}")
    return blocks


def _weights(importance: Floats | None, columns: int) -> Floats:
    """Return the weight of each column's error, of mean 1 and nowhere 0, so that every group has a scale."""
    if importance is None:
        return np.ones(columns, np.float32)
    weights = np.asarray(importance, np.float64)
    if weights.shape != (columns,):
        raise ValueError(f"importance has shape {list(weights.shape)}; the matrix has {columns} columns")
    mean = weights.mean() if columns else 0.0
    if not np.isfinite(mean) or (weights < 0).any():
        raise ValueError("importance must be finite and not negative")
    if mean == 0:
        return np.ones(columns, np.float32)
    return np.maximum(weights / mean, 1e-6).astype(np.float32)


def _scaled(values: Floats, weights: Floats, low: int, high: int, steps: int, step: float) -> Any:
    from tercet.model.block_fits import scaled_rows

    scales = np.empty((len(values), values.shape[1] // 32), np.float32)
    q = np.empty(values.shape, np.int8)
    scaled_rows(values, weights, 32, np.float32(low), np.float32(high), steps, np.float32(step), scales, q)
    return scales.astype(np.float16), q


def _affine(values: Floats, weights: Floats, high: int, steps: int, step: float) -> Any:
    from tercet.model.block_fits import affine_rows

    scales = np.empty((len(values), values.shape[1] // 32), np.float32)
    minima, q = np.empty_like(scales), np.empty(values.shape, np.int8)
    affine_rows(values, weights, 32, np.float32(high), steps, np.float32(step), scales, minima, q)
    return scales.astype(np.float16), minima.astype(np.float16), q.view(np.uint8)


def _raw(numbers: NDArray[Any], blocks: int) -> Bytes:
    """Return numbers as bytes [blocks, bytes], little-endian."""
    little = np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<"))
    raw: Bytes = little.reshape(blocks, -1).view(np.uint8)
    return raw


def _rows(parts: list[Bytes], rows: int) -> Bytes:
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _nibbles(q: NDArray[np.uint8], half: int) -> Bytes:
    """Join the low 4 bits of each run of ``half`` codes with those of the next run."""
    pairs = q.reshape(-1, 2, half)
    joined: Bytes = np.bitwise_or(pairs[:, 0] & np.uint8(15), pairs[:, 1] << np.uint8(4))
    return joined


def _fifth_bits(q: NDArray[np.uint8]) -> Bytes:
    return np.packbits(q.reshape(-1, 32) >> 4, axis=1, bitorder="little")


def _q8_0(values: Floats, weights: Floats) -> Bytes:
    scales, q = _scaled(values, weights, -127, 127, 8, 0.6)
    return _rows([_raw(scales, scales.size), _raw(q, scales.size)], len(values))


def _q4_0(values: Floats, weights: Floats) -> Bytes:
    scales, q = _scaled(values, weights, -8, 7, 8, 0.2)
    codes = (q + np.int8(8)).view(np.uint8)
    return _rows([_raw(scales, scales.size), _nibbles(codes, 16)], len(values))


def _q5_0(values: Floats, weights: Floats) -> Bytes:
    scales, q = _scaled(values, weights, -16, 15, 8, 0.3)
    codes = (q + np.int8(16)).view(np.uint8)
    return _rows([_raw(scales, scales.size), _fifth_bits(codes), _nibbles(codes, 16)], len(values))


def _q4_1(values: Floats, weights: Floats) -> Bytes:
    scales, minima, q = _affine(values, weights, 15, 2, 0.7)
    blocks = scales.size
    return _rows([_raw(scales, blocks), _raw(minima, blocks), _nibbles(q, 16)], len(values))


def _q5_1(values: Floats, weights: Floats) -> Bytes:
    scales, minima, q = _affine(values, weights, 31, 2, 0.7)
    blocks = scales.size
    return _rows([_raw(scales, blocks), _raw(minima, blocks), _fifth_bits(q), _nibbles(q, 16)], len(values))


def _k_affine(values: Floats, weights: Floats, high: int) -> Any:
    """Return the start of each block of Q4_K and Q5_K (two scales, 8 pairs of 6-bit numbers) and the codes."""
    from tercet.model.block_fits import nested_affine_rows

    rows, columns = values.shape
    scales, minima = np.empty((2, rows, columns // 256), np.float32)
    parts, starts = np.empty((2, rows, columns // 32), np.uint8)
    q = np.empty(values.shape, np.int8)
    nested_affine_rows(
        values, weights, np.float32(high), 3, np.float32(0.7), scales, minima, parts, starts, q
    )
    a, b = parts.reshape(-1, 8), starts.reshape(-1, 8)
    packed = np.empty((len(a), 12), np.uint8)
    packed[:, :4] = a[:, :4] | (a[:, 4:] >> 4 << 6)
    packed[:, 4:8] = b[:, :4] | (b[:, 4:] >> 4 << 6)
    packed[:, 8:] = (a[:, 4:] & 15) | (b[:, 4:] << 4)
    blocks = scales.size
    head = [_raw(scales.astype(np.float16), blocks), _raw(minima.astype(np.float16), blocks), packed]
    return head, q.view(np.uint8)


def _q4_k(values: Floats, weights: Floats) -> Bytes:
    head, q = _k_affine(values, weights, 15)
    return _rows([*head, _nibbles(q, 32).reshape(len(head[0]), -1)], len(values))


def _q5_k(values: Floats, weights: Floats) -> Bytes:
    head, q = _k_affine(values, weights, 31)
    blocks = len(head[0])
    # Byte i holds the fifth bits of element i of each of the eight groups, lowest first.
    bits = np.packbits((q >> 4).reshape(blocks, 8, 32), axis=1, bitorder="little").reshape(blocks, 32)
    return _rows([*head, bits, _nibbles(q, 32).reshape(blocks, -1)], len(values))


def _q6_k(values: Floats, weights: Floats) -> Bytes:
    from tercet.model.block_fits import nested_scaled_rows

    rows, columns = values.shape
    scales = np.empty((rows, columns // 256), np.float32)
    parts, q = np.empty((rows, columns // 16), np.int8), np.empty(values.shape, np.int8)
    nested_scaled_rows(values, weights, 8, np.float32(0.5), scales, parts, q)
    blocks = scales.size
    codes = (q + np.int8(32)).view(np.uint8).reshape(blocks, 2, 4, 32)  # halves of four runs of 32
    low = np.bitwise_or(codes[:, :, :2] & np.uint8(15), codes[:, :, 2:] << np.uint8(4), dtype=np.uint8)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    high = np.bitwise_or.reduce(codes >> np.uint8(4) << shifts, axis=2)
    outer = _raw(scales.astype(np.float16), blocks)
    return _rows([low.reshape(blocks, -1), high.reshape(blocks, -1), _raw(parts, blocks), outer], rows)


TYPES: dict[str, BlockType] = {
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}
