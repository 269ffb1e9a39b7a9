"""What the processor can do, and numbers as bits: what both sides of a kernel need, without numba."""

from __future__ import annotations

import functools
import platform

import llvmlite.binding as llvm
import numpy as np


@functools.cache
def host_features() -> frozenset[str]:
    """What the processor can do, in LLVM's names."""
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def has_vnni() -> bool:
    """Whether one instruction adds 64 byte products to 16 sums (AVX-512 VNNI)."""
    return {"avx512vnni", "avx512vl", "avx512bw"} <= host_features()


def has_bfloat_dot() -> bool:
    """Whether one instruction adds 32 products of bfloat16 to 16 sums (AVX-512 BF16)."""
    return {"avx512bf16", "avx512vl", "avx512bw"} <= host_features()


def has_bfloat_tiles() -> bool:
    """Whether it multiplies whole tiles of bfloat16 (AMX), several times as fast."""
    return {"amx-bf16", "amx-tile"} <= host_features()


def has_half() -> bool:
    """Whether float16 converts in hardware."""
    machine = platform.machine().lower()
    return machine in ("arm64", "aarch64") or "f16c" in host_features()


def bits(value: float) -> int:
    """A float32's bits, to hand a number to a kernel; `simd.Vectors.number` gives it back."""
    return int(np.float32(value).view(np.int32))
