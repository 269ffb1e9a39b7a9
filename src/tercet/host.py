"""The machine this process runs on: its processor, cores and memory. Imports neither torch nor numba."""

from __future__ import annotations

import functools
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@functools.cache
def host_features() -> frozenset[str]:
    """Return the processor's features by LLVM's names."""
    import llvmlite.binding as llvm

    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def has_vnni() -> bool:
    """Return whether one instruction adds 64 products of bytes to 16 sums (AVX-512 VNNI)."""
    return {"avx512vnni", "avx512vl", "avx512bw"} <= host_features()


def has_bfloat_dot() -> bool:
    """Return whether one instruction adds 32 products of bfloat16 to 16 sums (AVX-512 BF16)."""
    return {"avx512bf16", "avx512vl", "avx512bw"} <= host_features()


def has_bfloat_tiles() -> bool:
    """Return whether one instruction multiplies whole tiles of bfloat16 (AMX), which is several times as fast."""
    return {"amx-bf16", "amx-tile"} <= host_features()


def emulates_bfloat() -> bool:
    """Return whether products of bfloat16 are emulated: an x86 processor without instructions for them."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")
    return x86 and not has_bfloat_dot() and not has_bfloat_tiles()


def has_half() -> bool:
    """Return whether the processor converts float16 in hardware."""
    machine = platform.machine().lower()
    return machine in ("arm64", "aarch64") or "f16c" in host_features()


def processor_name() -> str:
    """Return the processor's model name, as far as the operating system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def allowed_cores() -> set[int]:
    """Return the numbers of the hardware threads that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Count the hardware threads that this process may use; containers and taskset may allow only some."""
    return len(allowed_cores())


def peak_memory(device: torch.device | None = None) -> int:
    """Return the largest memory that this process has used so far, in bytes.

    Args:
        device: A CUDA device: the memory that PyTorch allocated on it. Otherwise the resident set, which
            includes mapped weights.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # On Linux, getrusage also counts the memory of the process that started this one, so read the
    # kernel's own account first.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bits(value: float) -> int:
    """Return a float32's bits as an integer, to pass it to a kernel; `simd.Vectors.number` is the inverse."""
    return int(np.float32(value).view(np.int32))
