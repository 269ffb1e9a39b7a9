"""The compiled program and the threads that run it.

After a step, threads other than the caller's spin inside compiled code for about a millisecond, so that the
next step of a generation starts at once. Then they sleep until they are woken, so that a server without
requests uses no processor time.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.engine.cpu import table as at
from tercet.engine.cpu.native import function
from tercet.host import allowed_cores

PATIENCE = 30_000  # turns of waiting before a thread sleeps: one to two milliseconds
UNEVEN_FRACTION = 0.25  # with many threads, uneven work alone makes them wait this fraction of the time
DECAY = 0.9  # the weight of a step falls by a tenth with each later step
MIN_STEPS, MIN_SECONDS = 6, 0.05  # a decision needs that many steps, or seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds until a removed thread is added again


def physical_cores() -> int:
    """Count the cores that this process may use; two hardware threads of one core count once."""
    siblings = set()
    for cpu in allowed_cores():
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return min(len(siblings), _quota() or len(siblings))


def _quota() -> int | None:
    """Return a container's limit (cgroup v2) in whole processors, at least one; None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None


class Crew:
    """Chooses the number of threads while other processes use the cores too.

    If the thread that waits longest waits a fraction f of the time, n threads do the work of n (1 - f), which
    is less than n - 1 threads would do when f is above 1 / n. Then one thread is removed. It is added again
    after a pause, which doubles each time that this was too early.
    """

    def __init__(self, limit: int) -> None:
        self.limit = self.threads = limit
        self._waited = self._elapsed = 0.0  # seconds, with the highest weight on recent steps
        self._steps = 0
        self._pause, self._again = FIRST_PAUSE, 0.0

    def choose(self, now: float) -> int:
        """Return the number of threads for the step that begins at time ``now`` (seconds)."""
        if self.threads < self.limit and now >= self._again:
            self.threads += 1
            self._waited, self._elapsed, self._steps = 0.0, 0.0, 0
        return self.threads

    def note(self, waited: float, elapsed: float, now: float) -> None:
        """Record a step of ``elapsed`` seconds, of which the thread that waited longest waited ``waited``."""
        if self.threads == 1:
            return
        self._waited = DECAY * self._waited + waited
        self._elapsed = DECAY * self._elapsed + elapsed
        self._steps += 1
        fraction = self._waited / self._elapsed
        reliable = self._steps >= MIN_STEPS or self._elapsed > MIN_SECONDS
        if reliable and fraction > max(1 / self.threads, UNEVEN_FRACTION):
            self.threads -= 1
            self._again = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._waited, self._elapsed, self._steps = 0.0, 0.0, 0
        elif self._steps >= 4 * MIN_STEPS and fraction < 0.5 / self.threads:
            self._pause = FIRST_PAUSE


class Pool:
    """A few threads that run steps together; the calling thread is the first of them.

    Steps of one pool run one after another, whichever Python thread they come from.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._program = function("run", 4)
        self._table = at.STEP_TABLE // 8
        self._waited = np.array([(at.WAITING + 64 * thread) // 8 for thread in range(threads)])
        self._parked = [(at.PARKED + 64 * thread) // 8 for thread in range(threads)]
        # Arrivals at barriers are counted here, not in a model's memory, which may be freed before a slow
        # thread reads the count for the last time. The count never restarts, as that may be many steps later.
        raw = np.zeros(8 + 8 * threads + 16, dtype=np.int64)
        self._control = raw[-(raw.ctypes.data // 8) % 8 :]
        self._arrived = 8 + 8 * threads
        self._address = self._control.ctypes.data
        self._lock = threading.Lock()
        self.crew = Crew(threads)
        begin = time.perf_counter()
        self._program(self._address, -2, 0, 10_000)
        self._turn = (time.perf_counter() - begin) / 10_000  # seconds
        self._wake = [threading.Event() for _ in range(threads)]
        for thread in range(1, threads):
            threading.Thread(target=self._serve, args=(thread,), name=f"tercet-{thread}", daemon=True).start()

    def _serve(self, thread: int) -> None:
        seen = 0
        while True:
            seen = self._program(self._address, thread, seen, PATIENCE)
            self._wake[thread].wait()
            self._wake[thread].clear()
            self._control[self._parked[thread]] = 0

    def run(self, table: NDArray[np.int64]) -> None:
        """Run the step that ``table`` describes, with up to ``threads`` threads."""
        with self._lock:
            control = self._control
            begin = time.perf_counter()
            threads = self.crew.choose(begin)
            before = self._seconds_waited(threads)
            table[at.ARRIVED], table[at.THREADS] = self._address + 8 * self._arrived, threads
            table[at.BEFORE] = control[self._arrived]
            table[at.WAITED] = self._address + 8 * self._waited[0]
            control[self._table] = table.ctypes.data
            if threads > 1:
                last = int(control[at.GENERATION // 8])
                self._program(self._address, -1, (last // at.CREW + 1) * at.CREW + threads - last, 0)
                for thread in range(1, threads):
                    if control[self._parked[thread]]:
                        self._wake[thread].set()
            self._program(self._address, 0, 0, 0)
            if threads > 1:
                end = time.perf_counter()
                waited = float((self._seconds_waited(threads) - before).max())
                self.crew.note(waited, end - begin, end)

    def _seconds_waited(self, threads: int) -> NDArray[np.float64]:
        """Return how long each thread has waited at barriers since the pool was made."""
        places = self._waited[:threads]
        seconds: NDArray[np.float64] = self._control[places] * self._turn + self._control[places + 1] * 1e-9
        return seconds


_pools: dict[tuple[int, int], Pool] = {}


def pool(threads: int) -> Pool:
    """Return the process's pool of that many threads; a forked child gets its own."""
    key = (os.getpid(), threads)
    if key not in _pools:
        _pools[key] = Pool(threads)
    return _pools[key]
