"""The threads of the CPU kernels: several callers, late threads, forks, and idle threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cpu_backends import at_once, in_pieces, load

from tercet.engine.cpu.pool import Crew, Pool, pool
from tiny_checkpoints import Make

HERE = Path(__file__).parent
HAS_FORK = hasattr(os, "fork")


def ids(count: int, seed: int = 0) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(0, 61, count).tolist()
    return result


def script(text: str, directory: Path, seconds: float) -> str:
    """Run a script in a process of its own and return its output; "hangs" if it takes longer than ``seconds``."""
    begin = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
    begin += f"directory = __import__('pathlib').Path({str(directory)!r})\nprint('started', flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", begin + text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            out, problems = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return "hangs"
    assert process.returncode == 0, problems
    return out.strip()


@pytest.fixture
def both_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes all threads, however busy the machine is."""
    monkeypatch.setattr(Crew, "note", lambda *_: None)


@pytest.mark.usefixtures("both_threads")
def test_steps_come_from_several_python_threads_and_models(make: Make) -> None:
    """All backends with the same number of threads share one pool; each is fed by one thread, as by its engine."""
    directories = [make("llama")[1], make("mixtral")[1], make("qwen3")[1]]
    backends = [load(directory, threads=2) for directory in directories]
    expected = [at_once(load(directory), ids(30)) for directory in directories]
    problems: list[str] = []

    def work(number: int) -> None:
        for seed in range(10):
            [result] = in_pieces(backends[number], [ids(30)], np.random.default_rng(seed), (1, 2, 5, 11))
            if not np.array_equal(result, expected[number]):
                problems.append(f"model {number}, seed {seed}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(backends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert pool(2) is pool(2)


def test_a_pool_counts_as_many_threads_as_it_has() -> None:
    before = threading.active_count()
    made = Pool(3)
    assert threading.active_count() == before + 2  # the caller is the third
    assert made.threads == made.crew.limit == 3


def test_threads_sleep_and_wake_again(make: Make) -> None:
    """Pause shorter than a thread spins, as long, and longer: no step may be missed as a thread goes to sleep."""
    _, directory = make("llama")
    result = script(
        "import time, numpy as np\n"
        "from cpu_backends import *\n"
        "backend = load(directory, threads=2)\n"
        "expected = backend.feed([chunk([5, 6, 7])])\n"
        "for pause in np.tile(np.linspace(0.0002, 0.004, 60), 3):\n"
        "    time.sleep(pause)\n"
        "    assert np.array_equal(backend.feed([chunk([5, 6, 7])]), expected)\n"
        "time.sleep(0.1); begin = time.process_time(); time.sleep(0.3)\n"
        "assert time.process_time() - begin < 0.05\n"
        "assert np.array_equal(backend.feed([chunk([5, 6, 7])]), expected)\n"
        "print('awake')\n",
        directory,
        30,
    )
    assert result == "awake"


CREWS = """
import itertools, os, time
from cpu_backends import *
from tercet.engine.cpu.pool import Crew

limit, sizes = {crew}
if hasattr(os, "sched_setaffinity"):  # one core for all: a waiting thread is suspended in the middle of waiting
    os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
tokens = np.random.default_rng(0).integers(0, 61, 40).tolist()
expected = at_once(load(directory), tokens)
sizes = itertools.cycle(sizes)
Crew.choose, Crew.note = lambda self, now: next(sizes), lambda *_: None
backend = load(directory, threads=limit)
begin = time.monotonic()
while time.monotonic() - begin < 1:
    for place, token in enumerate(tokens):
        assert np.array_equal(backend.feed([chunk([token], place)])[0], expected[place])
print("the same")
os._exit(0)  # without waiting for threads that still spin
"""


@pytest.mark.parametrize(
    "crew",
    [
        (2, [2] + [1] * 99),
        (3, [3, 2]),
        (4, [2, 4, 3, 4]),
    ],
)  # fmt: skip
def test_late_threads_neither_hang_nor_disturb_a_step(crew: tuple[int, list[int]], make: Make) -> None:
    """The number of threads changes while they share a core; each step must be the work of its own threads."""
    _, directory = make("llama", num_hidden_layers=1)
    at_once(load(directory), ids(3))  # compile the kernels first
    assert script(CREWS.format(crew=crew), directory, 10) == "the same"


# Forks


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
@pytest.mark.parametrize(
    "whose",
    [
        "load(directory, threads=2)",
        "backend",
    ],
)  # fmt: skip
def test_a_forked_child_has_threads_of_its_own(whose: str, make: Make) -> None:
    """This holds for a backend of its own and for its parent's."""
    _, directory = make("llama")
    result = script(
        "import os, time\n"
        "from cpu_backends import *\n"
        "from tercet.engine.cpu.pool import Crew\n"
        "Crew.note = lambda *_: None\n"  # both threads in every step
        "tokens = list(range(3, 40))\n"
        "backend = load(directory, threads=2)\n"
        "expected = at_once(backend, tokens)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        f"    os._exit(0 if np.array_equal(at_once({whose}, tokens), expected) else 1)\n"
        "deadline = time.monotonic() + 3\n"
        "ended, status = 0, 0\n"
        "while ended == 0 and time.monotonic() < deadline:\n"
        "    ended, status = os.waitpid(child, os.WNOHANG)\n"
        "    time.sleep(0.01)\n"
        "if ended == 0:\n"
        "    os.kill(child, 9)\n"
        "    os.waitpid(child, 0)\n"
        "same = np.array_equal(at_once(backend, tokens), expected)\n"
        "print('hangs' if ended == 0 else status, same)\n",
        directory,
        30,
    )
    assert result == "0 True"
