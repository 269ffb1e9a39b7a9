"""How the threads of a step divide its work and wait for each other at barriers."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from tercet.engine.cpu import table as at
from tercet.engine.cpu.matrices import integers
from tercet.simd import atomic_add, atomic_load, pause

# Windows has neither function: there a thread keeps spinning, and only its turns measure how long it waited.
POSIX = os.name == "posix"
sched_yield = types.ExternalFunction("sched_yield", types.int32()) if POSIX else pause
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
MONOTONIC = 6 if sys.platform == "darwin" else 1
SPIN = 4000  # turns, about a tenth of a millisecond


@njit
def now(scratch: int) -> int:
    """Return a monotonic time in nanoseconds, 0 on Windows; ``scratch`` is the address of 16 bytes."""
    if not POSIX:
        return 0
    clock_gettime(np.int32(MONOTONIC), scratch)
    parts = integers(scratch, 2)
    return int(parts[0] * 1_000_000_000 + parts[1])


@njit
def barrier(table: Any, passed: int, thread: int) -> int:
    """Wait until every thread of the step has arrived, and return the number of barriers passed so far.

    The waiting time is recorded: turns up to SPIN, and nanoseconds after that, while other processes may
    have the core.
    """
    passed += 1
    # The table may already describe the next step when a slow thread leaves this loop.
    arrived, goal = table[at.ARRIVED], table[at.BEFORE] + passed * table[at.THREADS]
    waited = table[at.WAITED] + 64 * thread
    atomic_add(arrived, 1)
    turns = 0
    while atomic_load(arrived) < goal and turns < SPIN:
        pause()
        turns += 1
    if turns:
        atomic_add(waited, turns)
    if turns == SPIN:
        begin = now(waited + 16)
        while atomic_load(arrived) < goal:
            sched_yield()  # another process may have the core that the missing thread needs
        atomic_add(waited + 8, now(waited + 16) - begin)
    return passed


@njit
def share(items: int, thread: int, threads: int) -> tuple[int, int]:
    """Return the range (begin, end) of 0..items-1 that belongs to one of ``threads`` threads."""
    return items * thread // threads, items * (thread + 1) // threads


@njit
def draw(table: Any, phase: int, items: int, thread: int, last: int) -> int:
    """Return the next item of a phase for a thread, after ``last`` (-1 at first); ``items`` when none is left.

    Three quarters of the items are dealt in advance. The rest goes to whichever thread comes first, so that
    a thread that was held up does not hold up the others.
    """
    threads = table[at.THREADS]
    dealt = items * 3 // 4 if threads > 1 else items
    low, high = share(dealt, thread, threads)
    if last < high:
        following = low if last < 0 else last + 1
        if following < high:
            return following
    if threads == 1:
        return items
    return int(min(items, dealt + atomic_add(table[at.COUNTERS] + 8 * phase, 1)))


class Part(NamedTuple):
    """One thread's part of the work on ``rows`` rows of activations, and its memory.

    table: Describes the model and the step (see `table`).
    low, high: The rows that only this thread works on where rows are divided among threads.
    small: With few rows every thread prepares all of them for a product in a buffer of its own, which is
        faster than waiting for the others.
    first, last: The rows that this thread prepares for a product: all of a small step, otherwise its own.
    normed, quantized, scales, sums: Addresses of the buffers for prepared rows, row 0 first.
    private: Address of this thread's scratch.
    """

    table: Any
    thread: int
    rows: int
    low: int
    high: int
    small: bool
    first: int
    last: int
    normed: int
    quantized: int
    scales: int
    sums: int
    private: int


@njit
def part_of(table: Any, thread: int, rows: int) -> Any:
    """Return the `Part` of a thread."""
    low, high = share(rows, thread, table[at.THREADS])
    small = rows <= at.SMALL
    first, last = (0, rows) if small else (low, high)
    own = at.SMALL * thread if small else 0  # the row of the shared buffers at which this thread's begin
    experts = table[at.EXPERTS_PER_TOKEN] if table[at.EXPERTS] else 1
    widest = max(table[at.HIDDEN], table[at.INNER], table[at.ATTENTION_WIDTH])
    return Part(
        table,
        thread,
        rows,
        low,
        high,
        small,
        first,
        last,
        table[at.NORMED] + 4 * own * table[at.HIDDEN],
        table[at.QUANTIZED] + 2 * own * experts * widest,
        table[at.SCALES] + own * experts * (widest // 8),
        table[at.SUMS] + own * experts * (widest // 4),
        table[at.PRIVATE] + thread * table[at.PRIVATE_BYTES],
    )
