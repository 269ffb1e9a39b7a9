"""Map a function over pieces of work, in a few processes or on Ray; results are in order."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Protocol, TypeVar, get_args

from tercet.curation.settings import Engine
from tercet.errors import UserError

Work = TypeVar("Work")
Result = TypeVar("Result")

ENGINES: tuple[str, ...] = get_args(Engine)


class Workers(Protocol):
    """The processes that work on the pieces.

    Attributes:
        remote: Whether they may be on other machines, so that each must read its own files.
    """

    remote: bool

    def map(self, function: Callable[[Work], Result], pieces: Iterable[Work]) -> Iterator[Result]:
        """Yield ``function(piece)`` for each piece, in order."""
        ...


@contextlib.contextmanager
def open_workers(engine: str, processes: int) -> Iterator[Workers]:
    """Open the workers of an engine of ``ENGINES``.

    Raises:
        UserError: The engine is unknown or is not installed.
    """
    if engine == "ray":
        with _ray(processes) as workers:
            yield workers
    elif engine != "local":
        raise UserError(f"there is no engine {engine!r}; the engines are {', '.join(ENGINES)}")
    elif processes == 1:
        yield ThisProcess()
    else:
        # Spawned, not forked: a fork inherits locks that other threads hold.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
        try:
            yield Processes(pool, ahead=processes + 1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class ThisProcess:
    """This process alone."""

    remote = False

    def map(self, function: Callable[[Work], Result], pieces: Iterable[Work]) -> Iterator[Result]:
        """Yield ``function(piece)`` for each piece, in order."""
        return map(function, pieces)


class Processes:
    """A few processes on this machine."""

    remote = False

    def __init__(self, pool: ProcessPoolExecutor, ahead: int) -> None:
        """Use the processes of ``pool``, with at most ``ahead`` pieces submitted before a result is awaited."""
        self._pool, self._ahead = pool, ahead

    def map(self, function: Callable[[Work], Result], pieces: Iterable[Work]) -> Iterator[Result]:
        """Yield ``function(piece)`` for each piece, in order.

        Raises:
            UserError: A worker process ended unexpectedly.
        """
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(function, piece))
                while len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as problem:
            raise UserError(
                "a worker process ended unexpectedly, perhaps for lack of memory; the same command resumes from "
                "here (`processes=1` needs the least). In a script, call curate below `if __name__ == '__main__':`"
            ) from problem
        finally:
            for future in waiting:
                future.cancel()


def _start_worker() -> None:
    """Set up a worker process: it ends with its parent, leaves Ctrl-C to it, and uses one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # a killed parent cannot stop its workers

    threading.Thread(target=end_with_parent, daemon=True).start()
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


@contextlib.contextmanager
def _ray(processes: int) -> Iterator[Workers]:
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise UserError('Ray Data is not installed; pip install "tercet[ray]"') from problem
    started = not ray.is_initialized()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if started and "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    elif started:
        ray.init(address="local", num_cpus=processes, include_dashboard=False, **quiet)
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, log.level
    context.enable_progress_bars = context.print_on_execution_start = False
    log.setLevel(logging.ERROR)
    try:
        yield RayCluster()
    finally:
        context.enable_progress_bars, context.print_on_execution_start, level = before
        log.setLevel(level)
        if started:
            ray.shutdown()


class RayCluster:
    """The cluster that Ray is connected to; the data and the output must have the same paths on all machines."""

    remote = True

    def map(self, function: Callable[[Work], Result], pieces: Iterable[Work]) -> Iterator[Result]:
        """Yield ``function(piece)`` for each piece, in order.

        Raises:
            UserError: As ``function`` raises it.
        """
        import ray.data

        # Pickled here, because Ray would turn numpy arrays and dataclasses in a row into table columns.
        rows = [{"number": number, "piece": pickle.dumps(piece)} for number, piece in enumerate(pieces)]
        if not rows:
            return
        work = ray.data.from_items(rows, override_num_blocks=len(rows))
        done: dict[int, Any] = {}
        next_number = 0
        for row in work.map(partial(_on_ray, pickle.dumps(function))).iter_rows():
            if row["problem"]:
                raise UserError(row["problem"])
            done[row["number"]] = pickle.loads(row["result"])
            while next_number in done:
                yield done.pop(next_number)
                next_number += 1


def _on_ray(function: bytes, row: dict[str, Any]) -> dict[str, Any]:
    os.environ["RAYON_NUM_THREADS"] = "1"
    result, problem = b"", ""
    try:
        result = pickle.dumps(pickle.loads(function)(pickle.loads(row["piece"])))
    except UserError as error:
        problem = str(error)
    return {"number": row["number"], "result": result, "problem": problem}
