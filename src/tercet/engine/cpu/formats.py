"""The forms in which the engine keeps matrices: three float types, and the block formats of GGUF.

A block format stores weights as small integers ``q`` with a scale for each group of 32 (16 for Q6_K):

Q8_0            w = d q, q signed
Q4_0, Q5_0      w = d (q - zero)
Q4_1, Q5_1      w = d q + m
Q4_K, Q5_K      w = d s q - e n; d and e are float16 for 256 weights, s and n whole numbers for 32
Q6_K            w = d s (q - 32); d is float16 for 256 weights, s a signed whole number for 16

The kernels want the same numbers in another order: blocks of 16 rows, so that each lane of a vector belongs
to one row. `repack` reorders them; no value changes. For each block of 16 rows the packed weights are

8 bits      [K / 4, 16, 4]
4 bits      [K / 32, 4, 16, 4]: a byte holds two weights, four columns apart, the lower nibble first
5 bits      [K / 32] of the 4-bit form of the lower bits, then [16, 4]: bit c of a byte is that of column 4 c + byte
6 bits      [K / 32] of the 4-bit form, then [2, 16, 4]: bits 2 c and 2 c + 1 are those of column 4 c + byte of a half

and the packed scales

float16 d               [K / 32, 16]
float16 d, m            [K / 32, 2, 16]
Q4_K, Q5_K              [K / 256] of float16 d [16], e [16], then bytes [8, 2, 16] of s and n
Q6_K                    [K / 256] of float16 d [16], then signed bytes s [16, 16]

The sizes are those of the GGUF file, but for scales of 6 bits, which take a byte. Source of the blocks: ggml-common.h of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.engine.cpu import table as at
from tercet.engine.cpu.table import GROUP

Bytes = NDArray[np.uint8]
ROWS = 16  # in a packed block
SUPER = 256  # weights of a K format's block


@dataclass(frozen=True)
class Format:
    """A block format.

    Attributes:
        name: GGUF's name of the type.
        kind: The number by which the compiled code knows it (see `table`).
        bits: Bits of ``q``.
        block: Weights of a block in a file.
        block_bytes: Bytes of such a block.
        zero: What is subtracted from ``q``; ``q`` is signed where this is 0 and the format has no minimum.
        minimum: Whether a group has a minimum of its own.
        group: Weights that share a scale.
    """

    name: str
    kind: int
    bits: int
    block: int
    block_bytes: int
    zero: int = 0
    minimum: bool = False
    group: int = GROUP

    @property
    def signed(self) -> bool:
        """Whether ``q`` is signed."""
        return self.bits == 8

    @property
    def limit(self) -> int:
        """The largest absolute value of ``q``."""
        return 128 if self.signed else (1 << self.bits) - 1

    @property
    def nested(self) -> bool:
        """Whether the scales of groups are multiples of one scale for `SUPER` weights."""
        return self.block == SUPER

    def weight_bytes(self, columns: int) -> int:
        """Bytes of the packed weights of 16 rows."""
        return ROWS * columns * self.bits // 8

    def scale_bytes(self, columns: int) -> int:
        """Bytes of the packed scales of 16 rows."""
        beside_weights = self.block_bytes - self.block * self.bits // 8
        if self.nested and self.minimum:
            beside_weights += 4  # a byte for each of 16 numbers that the file keeps in 12 bytes
        return ROWS * (columns // self.block) * beside_weights


FORMATS = {
    form.name: form
    for form in (
        Format("Q8_0", at.Q8_0, 8, 32, 34),
        Format("Q4_0", at.Q4_0, 4, 32, 18, zero=8),
        Format("Q4_1", at.Q4_1, 4, 32, 20, minimum=True),
        Format("Q5_0", at.Q5_0, 5, 32, 22, zero=16),
        Format("Q5_1", at.Q5_1, 5, 32, 24, minimum=True),
        Format("Q4_K", at.Q4_K, 4, SUPER, 144, minimum=True),
        Format("Q5_K", at.Q5_K, 5, SUPER, 176, minimum=True),
        Format("Q6_K", at.Q6_K, 6, SUPER, 210, zero=32, group=16),
    )
}
FLOATS = {"F32": at.FLOAT32, "BF16": at.BFLOAT16, "F16": at.FLOAT16}
FLOAT_BYTES = {at.FLOAT32: 4, at.BFLOAT16: 2, at.FLOAT16: 2}
BY_KIND = {form.kind: form for form in FORMATS.values()}


def kind_of(type_name: str) -> int:
    """Return the kind of a GGUF type that the engine can keep."""
    return FLOATS[type_name] if type_name in FLOATS else FORMATS[type_name].kind


def sizes(kind: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the packed bytes of a matrix [rows, columns]: of its weights and of its scales."""
    if kind in FLOAT_BYTES:
        return FLOAT_BYTES[kind] * rows * columns, 0
    form = BY_KIND[kind]
    return rows // ROWS * form.weight_bytes(columns), rows // ROWS * form.scale_bytes(columns)


def row_bytes(type_name: str, columns: int) -> int:
    """Return the bytes of a row in a file."""
    if type_name in FLOATS:
        return FLOAT_BYTES[FLOATS[type_name]] * columns
    form = FORMATS[type_name]
    return columns // form.block * form.block_bytes


def repack(type_name: str, data: Bytes) -> tuple[Bytes, Bytes]:
    """Reorder rows of a file for the kernels.

    Args:
        type_name: GGUF's name of their type.
        data: The rows' bytes [rows, bytes]; rows is a multiple of 16.

    Returns:
        The packed weights and scales, flat.
    """
    if type_name in FLOATS:
        size = FLOAT_BYTES[FLOATS[type_name]]
        values = data.reshape(len(data) // ROWS, ROWS, -1, size)
        return np.ascontiguousarray(values.transpose(0, 2, 1, 3)).reshape(-1), np.empty(0, np.uint8)
    form = FORMATS[type_name]
    blocks = data.reshape(len(data), -1, form.block_bytes)
    q, scales = _K_FORMATS[type_name](blocks) if form.nested else _plain(form, blocks)
    return _pack_weights(form, q.reshape(len(data) // ROWS, ROWS, -1)), scales.reshape(-1)


def _by_lane(values: NDArray[np.generic]) -> Bytes:
    """Turn a value for each row and group, [rows, groups], into bytes [rows / 16, groups, 16 * size]."""
    rows, groups = values.shape
    lanes = np.ascontiguousarray(values.reshape(rows // ROWS, ROWS, groups).transpose(0, 2, 1))
    return lanes.view(np.uint8).reshape(rows // ROWS, groups, -1)


def _nibbles(data: Bytes) -> Bytes:
    """Return the lower halves of the bytes [..., n], then their upper halves, as [..., 2 n]."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _plain(form: Format, blocks: Bytes) -> tuple[Bytes, Bytes]:
    """Return q [rows, blocks, 32] and the packed scales of a format with float16 scales."""
    factors = np.ascontiguousarray(blocks[..., : 4 if form.minimum else 2]).view(np.uint16)
    q = blocks[..., factors.shape[-1] * 2 :]
    if form.bits == 5:
        high = np.unpackbits(q[..., :4], axis=-1, bitorder="little")
        q = _nibbles(q[..., 4:]) | (high << np.uint8(4))
    elif form.bits == 4:
        q = _nibbles(q)
    return q, np.concatenate([_by_lane(factors[..., i]) for i in range(factors.shape[-1])], axis=-1)


def _k_scales(blocks: Bytes) -> Bytes:
    """Return the packed scales of Q4_K or Q5_K: six bits for each scale and minimum, in twelve bytes."""
    rows, count, _ = blocks.shape
    tops = np.ascontiguousarray(blocks[..., :4]).view(np.uint16)
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    both = np.stack([scales, minima], axis=-1).reshape(rows // ROWS, ROWS, count, 16)
    lanes = both.transpose(0, 2, 3, 1).reshape(rows // ROWS, count, -1)
    return np.concatenate([_by_lane(tops[..., 0]), _by_lane(tops[..., 1]), lanes], axis=-1)


def _q4_k(blocks: Bytes) -> tuple[Bytes, Bytes]:
    rows, count, _ = blocks.shape
    return _nibbles(blocks[..., 16:].reshape(rows, count, 4, 32)), _k_scales(blocks)


def _q5_k(blocks: Bytes) -> tuple[Bytes, Bytes]:
    rows, count, _ = blocks.shape
    low = _nibbles(blocks[..., 48:].reshape(rows, count, 4, 32)).reshape(rows, count, 8, 32)
    # Bit i of high byte l belongs to weight l of group i.
    high: Bytes = (blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return low | (high << np.uint8(4)), _k_scales(blocks)


def _q6_k(blocks: Bytes) -> tuple[Bytes, Bytes]:
    rows, count, _ = blocks.shape
    low = _nibbles(blocks[..., :128].reshape(rows, count, 2, 64)).reshape(rows, count, 2, 4, 32)
    high = blocks[..., 128:192].reshape(rows, count, 2, 1, 32)
    high = (high >> (2 * np.arange(4, dtype=np.uint8)[:, None])) & np.uint8(3)
    tops = np.ascontiguousarray(blocks[..., 208:]).view(np.uint16)[..., 0]
    scales = blocks[..., 192:208].reshape(rows // ROWS, ROWS, count, 16)
    lanes = scales.transpose(0, 2, 3, 1).reshape(rows // ROWS, count, -1)
    return low | (high << np.uint8(4)), np.concatenate([_by_lane(tops), lanes], axis=-1)


_K_FORMATS = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


def _pack_weights(form: Format, q: Bytes) -> Bytes:
    """Pack q [blocks, 16, K]; the result is flat."""
    blocks, _, k = q.shape
    if form.bits == 8:
        return np.ascontiguousarray(q.reshape(blocks, ROWS, k // 4, 4).transpose(0, 2, 1, 3)).reshape(-1)
    groups = k // GROUP
    quads = q.reshape(blocks, ROWS, groups, 8, 4).transpose(0, 2, 3, 1, 4)  # [blocks, groups, quad, row, 4]
    low = (quads[:, :, 0::2] & 15) | (quads[:, :, 1::2] << 4)
    parts = [low.reshape(blocks, groups, -1)]
    if form.bits > 4:
        high, extra = quads >> 4, form.bits - 4
        sets = high.reshape(blocks, groups, extra, 8 // extra, ROWS, 4)
        merged = sets[:, :, :, 0].copy()
        for column in range(1, 8 // extra):
            merged |= sets[:, :, :, column] << (extra * column)
        parts.append(merged.reshape(blocks, groups, -1))
    return np.ascontiguousarray(np.concatenate(parts, axis=-1)).reshape(-1)
