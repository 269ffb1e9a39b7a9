"""Inference on a CPU without torch: kernels that numba compiles from Python."""

from typing import Literal

Quantization = Literal["int8", "int4", "bf16", "none", "file"]
QUANTIZATIONS: tuple[Quantization, ...] = (
    "int8",
    "int4",
    "bf16",
    "none",
)  # what users choose from; "file": see `types`
