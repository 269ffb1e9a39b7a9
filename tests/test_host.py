"""The machine: cores that this process may use, and the memory that it has used."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from tercet.host import allowed_cores, available_cores, peak_memory, processor_name


def test_peak_memory_counts_freed_memory_and_nothing_of_the_parent() -> None:
    size = 1 << 28
    before = peak_memory()
    np.ones(size, np.uint8).sum()
    assert max(before, size) <= peak_memory() <= before + size + (1 << 25)
    program = "from tercet.host import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert 1 << 23 < int(child.stdout) < size


def test_the_processor_has_a_name_and_cores() -> None:
    assert processor_name()
    assert available_cores() == len(allowed_cores()) >= 1
