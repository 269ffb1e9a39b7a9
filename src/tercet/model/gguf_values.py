"""Values of GGUF tensors: a tensor's bytes as rows of quantised blocks, or as float32.

The ``gguf`` package dequantises as llama.cpp does, bit for bit. Types without blocks are converted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.model.gguf_file import BLOCKS, TensorInfo

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FLOAT_TYPES = ("F32", "F16", "BF16")
# Types that the package dequantises; the tests compare the list with it.
QUANTISED_TYPES = frozenset(
    {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S",
     "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"}
)  # fmt: skip
_CHUNK = 1 << 20  # values dequantised at once: the package makes several arrays of that size


@dataclass(frozen=True)
class Blocks:
    """The quantised rows of a matrix: ``data`` is uint8 [rows, bytes of a row], ``type`` GGUF's name."""

    type: str
    data: Bytes


def row_bytes(type_name: str, columns: int) -> int:
    """Return the bytes of a row of a tensor."""
    elements, nbytes = BLOCKS[type_name]
    return columns // elements * nbytes


def rows_of(info: TensorInfo, data: Bytes) -> Bytes:
    """Return a tensor's bytes as rows [..., bytes of a row]; ``data`` holds the bytes of the whole file."""
    raw = data[info.offset : info.offset + info.nbytes]
    return raw.reshape(*info.shape[:-1], row_bytes(info.type, info.shape[-1]))


def check_readable(info: TensorInfo) -> None:
    """Raise UserError unless `to_float32` can convert a tensor's type."""
    if info.type not in (*FLOAT_TYPES, "F64", *QUANTISED_TYPES):
        raise UserError(
            f"{info.file}: tensor {info.name} has type {info.type}, which can't be read as weights; "
            "use a file of another quantisation"
        )


def to_float32(type_name: str, rows: Bytes, columns: int) -> Floats:
    """Return rows of blocks [..., bytes of a row] as float32 [..., columns], dequantised a few rows at a time."""
    shape = (*rows.shape[:-1], columns)
    if type_name in FLOAT_TYPES or type_name == "F64":
        return _plain(type_name, rows).reshape(shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    flat, kind = rows.reshape(-1, rows.shape[-1]), GGMLQuantizationType[type_name]
    values = np.empty((len(flat), columns), np.float32)
    step = max(1, _CHUNK // columns)
    for start in range(0, len(flat), step):
        with np.errstate(all="ignore"):  # a damaged file's scales may be infinite; the values then are, too
            values[start : start + step] = dequantize(flat[start : start + step], kind)
    return values.reshape(shape)


def _plain(type_name: str, rows: Bytes) -> Floats:
    kind: Any = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}[type_name]
    flat = np.ascontiguousarray(rows).reshape(-1)
    if flat.ctypes.data % np.dtype(kind).itemsize:  # where a file's alignment is smaller than a value
        flat = flat.copy()
    values = flat.view(kind)
    if type_name == "BF16":  # the upper half of a float32
        wide: Floats = (values.astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.asarray(values, np.float32)
