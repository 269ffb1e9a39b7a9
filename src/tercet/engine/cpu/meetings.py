"""How the threads of a step wait for each other and divide its work."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from numba import njit, types

from tercet.engine.cpu import table as at
from tercet.engine.cpu.matrices import integers
from tercet.simd import atomic_add, atomic_load, pause

# Windows has neither; there a thread spins on, and its turns alone tell how long it waited.
POSIX = os.name == "posix"
sched_yield = types.ExternalFunction("sched_yield", types.int32()) if POSIX else pause
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
MONOTONIC = 6 if sys.platform == "darwin" else 1
SPIN = 4000  # turns, about a tenth of a millisecond


@njit
def now(scratch: int) -> int:
    """Nanoseconds; ``scratch``: 16 bytes."""
    if not POSIX:
        return 0
    clock_gettime(np.int32(MONOTONIC), scratch)
    parts = integers(scratch, 2)
    return int(parts[0] * 1_000_000_000 + parts[1])


@njit
def meet(t: Any, meetings: int, thread: int) -> int:
    """Wait until every thread has come here; the number of meetings so far.

    How long is counted: turns up to SPIN, and nanoseconds beyond, while others may have the core.
    """
    meetings += 1
    # The table may already describe the next step when a slow thread leaves this loop.
    arrived, goal = t[at.ARRIVED], t[at.BEFORE] + meetings * t[at.THREADS]
    waited = t[at.WAITED] + 64 * thread
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
            sched_yield()  # somebody else's process may have the core that the missing thread needs
        atomic_add(waited + 8, now(waited + 16) - begin)
    return meetings


@njit
def share(items: int, thread: int, threads: int) -> tuple[int, int]:
    """The part of 0..items-1 that is a thread's."""
    return items * thread // threads, items * (thread + 1) // threads


@njit
def draw(t: Any, phase: int, items: int, thread: int, last: int) -> int:
    """The next item for a thread after ``last`` (-1 at first); ``items`` when there are none.

    Three quarters are dealt beforehand; the rest goes to whoever comes, so that a thread that was
    held up does not hold up the others.
    """
    threads = t[at.THREADS]
    dealt = items * 3 // 4 if threads > 1 else items
    low, high = share(dealt, thread, threads)
    if last < high:
        following = low if last < 0 else last + 1
        if following < high:
            return following
    if threads == 1:
        return items
    return int(min(items, dealt + atomic_add(t[at.COUNTERS] + 8 * phase, 1)))
