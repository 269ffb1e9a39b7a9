"""Tokens out on a CPU: kernels compiled from Python by numba, without torch."""

from typing import Literal

Quantization = Literal["int8", "int4", "bf16", "none"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "int4", "bf16", "none")
