"""One engine and the thread that owns it; asyncio on the outside.

The thread takes commands (submit, cancel, run a function) between two turns of the engine, and hands
what each turn brought to the event loops of those who wait for it. So no lock is held while the network
computes, and an answer that nobody wants any more ends within one token.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from tercet.engine.engine import Engine, QueueFull
from tercet.engine.request import Completion, Delta, Request, Usage
from tercet.errors import UserError
from tercet.serve.errors import APIError

T = TypeVar("T")
log = logging.getLogger("tercet.serve")


@dataclass(frozen=True)
class Load:
    """Requests that run and requests that wait."""

    running: int
    waiting: int


class Meter(Protocol):
    """Told what a worker does. ``adapter`` is that of the request; `read` is for `Worker.run`'s callers."""

    def first_token(self, adapter: str | None, seconds: float) -> None: ...
    def finished(self, adapter: str | None, usage: Usage) -> None: ...
    def read(self, adapter: str | None, tokens: int) -> None: ...


class EngineStopped(APIError):
    """503: the worker was closed, or its engine failed."""

    def __init__(self) -> None:
        message = "this model's engine has stopped: the server is shutting down, or its log tells why"
        super().__init__(503, message, "server_error", code="engine_stopped")


@dataclass(eq=False)
class _Ticket:
    """Requests that belong together, and where their deltas go."""

    requests: Sequence[Request]
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    handles: list[int] = field(default_factory=list)  # the thread's own
    over: bool = False  # nobody reads the inbox any more


class Worker:
    """An engine for any number of coroutines.

    engine: its tokenizer, ``max_positions`` and ``stop_ids`` may be read from any thread; everything
        else only by functions given to `run`.
    """

    def __init__(self, engine: Engine, meter: Meter | None = None) -> None:
        self.engine, self.meter = engine, meter
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._functions: deque[Callable[[], None]] = deque()  # one is run between two turns
        self._owners: dict[int, tuple[_Ticket, int]] = {}  # by handle: whose, and which of its requests
        self._closed = False
        self._load = Load(0, 0)
        self._pending = 0  # functions of `run` that are not done
        self._swept, self._sweeping = threading.Event(), threading.Lock()  # once the thread ends
        self._thread = threading.Thread(target=self._work, name="tercet-engine", daemon=True)
        self._thread.start()

    # For coroutines

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[Delta, None]:
        """The requests' deltas as they come; ``index`` is a request's place in ``requests``.

        Deltas that came while nobody looked are one, so that a busy server sends fewer and longer pieces.

        The first `anext` checks and queues all of them, or none. Closing the iterator, or cancelling the
        task that waits for it, ends them in the engine within one token.

        Raises:
            QueueFull: there is no room for them now.
            UserError: one of them can never be answered.
        """
        ticket = _Ticket(requests, asyncio.get_running_loop())
        waiting = set(range(len(requests)))  # for their first token
        left, began = len(requests), time.perf_counter()
        self._put(lambda: self._submit(ticket))
        try:
            while left:
                for delta in _joined([await ticket.inbox.get(), *_there(ticket.inbox)]):
                    if isinstance(delta, Exception):
                        raise delta
                    if delta.error is not None:
                        raise delta.error
                    self._measure(requests[delta.index], delta, began if delta.index in waiting else None)
                    waiting.discard(delta.index)
                    left -= delta.completion is not None
                    yield delta
        finally:
            if left:
                ticket.over = True
                self._put(lambda: self._cancel(ticket))

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The requests to their end, in order. Raises as `stream`."""
        done: dict[int, Completion] = {}
        async with aclosing(self.stream(requests)) as deltas:
            async for delta in deltas:
                if delta.completion is not None:
                    done[delta.index] = delta.completion
        return [done[index] for index in range(len(requests))]

    async def run(self, function: Callable[[Engine], T]) -> T:
        """``function(engine)`` between two turns, on the engine's thread; what it returns or raises.

        Those who stream wait meanwhile, so a long work is better done in several parts. Cancelling the
        caller leaves it out if it has not begun.

        Raises:
            QueueFull: as many functions wait as requests may.
        """
        if self._pending >= self.engine.max_waiting:
            raise QueueFull(f"{self._pending} requests are waiting already; send this one again later")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        abandoned = threading.Event()

        def run() -> None:
            result: Any = None
            problem: BaseException | None = None
            if not abandoned.is_set():
                try:
                    if self._closed:
                        raise EngineStopped()
                    result = function(self.engine)
                except Exception as raised:
                    problem = raised
            _call_soon(loop, settle, result, problem)

        def settle(result: T, problem: BaseException | None) -> None:
            if future.done():
                return
            if problem is not None:
                future.set_exception(problem)
            else:
                future.set_result(result)

        self._pending += 1
        try:
            self._put(lambda: self._functions.append(run))
            return await future
        finally:
            self._pending -= 1
            abandoned.set()

    @property
    def load(self) -> Load:
        """As of the last turn."""
        return Load(self._load.running, self._load.waiting + self._pending)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread takes work."""
        return self._thread.is_alive() and not self._closed

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing is to be done, for so long at most; whether that was reached."""
        end = time.monotonic() + seconds
        while self._owners or self._pending or self._load != Load(0, 0):
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self) -> None:
        """End what runs with an error, and the thread."""
        self._closed = True
        self._put(lambda: None)
        self._thread.join(timeout=10)

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self._swept.is_set():
            self._sweep()  # nobody else would

    def _measure(self, request: Request, delta: Delta, began: float | None) -> None:
        if self.meter is None:
            return
        adapter = request.adapter
        if began is not None:
            self.meter.first_token(adapter, time.perf_counter() - began)
        if delta.completion is not None:
            self.meter.finished(adapter, delta.completion.usage)

    # On the engine's thread

    def _work(self) -> None:
        try:
            while not self._closed:
                self._take_commands()
                if self._functions:
                    self._functions.popleft()()
                if self.engine.has_work:
                    self._turn()
                else:
                    self._load = Load(0, 0)
        except Exception as problem:
            log.critical("the engine's thread ends", exc_info=problem)
        finally:
            self._sweep()

    def _turn(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception as problem:
            # The backend failed, out of memory say. Trying the same again would fail the same way.
            log.error("the engine failed; all its requests end", exc_info=problem)
            self._abort(problem)
            return
        self._deliver(deltas)

    def _counted(self) -> Load:
        running = self.engine.running
        return Load(running, len(self._owners) - running)

    def _take_commands(self) -> None:
        """All that are there; wait for one when there is nothing else to do."""
        try:
            block = not self.engine.has_work and not self._functions and not self._closed
            self._commands.get(block)()
            while True:
                self._commands.get(False)()
        except queue.Empty:
            pass

    def _submit(self, ticket: _Ticket) -> None:
        """All of a ticket's requests, or none of them."""
        if ticket.over:
            return
        try:
            if self._closed:
                raise EngineStopped()
            if len(ticket.requests) > self.engine.max_waiting:
                raise UserError(
                    f"{len(ticket.requests)} answers are asked for at once; the server takes "
                    f"{self.engine.max_waiting} at most, so send fewer prompts or a smaller n"
                )
            for place, request in enumerate(ticket.requests):
                handle = self.engine.submit(request)
                ticket.handles.append(handle)
                self._owners[handle] = ticket, place
        except Exception as problem:
            self._cancel(ticket)
            _call_soon(ticket.loop, ticket.inbox.put_nowait, problem)

    def _cancel(self, ticket: _Ticket) -> None:
        for handle in ticket.handles:
            if self._owners.pop(handle, None) is not None:
                self.engine.cancel(handle)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """One message to each event loop, however many it is for: waking a loop is what costs."""
        letters: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, Delta]]] = defaultdict(list)
        for delta in deltas:
            ticket, place = self._owners[delta.index]
            if delta.completion is not None or delta.error is not None:
                del self._owners[delta.index]
            letters[ticket.loop].append((ticket, replace(delta, index=place)))
        self._load = self._counted()
        for loop, pairs in letters.items():
            _call_soon(loop, _hand_out, pairs)

    def _abort(self, problem: Exception) -> None:
        """End all requests with ``problem``."""
        for ticket in {id(ticket): ticket for ticket, _ in self._owners.values()}.values():
            self._cancel(ticket)
            _call_soon(ticket.loop, ticket.inbox.put_nowait, problem)

    def _sweep(self) -> None:
        """The last thing: nobody must wait for ever. What is put after the mark is swept by who put it."""
        self._closed = True
        self._swept.set()
        with self._sweeping:
            self._abort(EngineStopped())
            while True:
                try:
                    self._commands.get(False)()
                except queue.Empty:
                    break
            while self._functions:
                self._functions.popleft()()


def _there(inbox: asyncio.Queue[Delta | Exception]) -> Iterator[Delta | Exception]:
    while not inbox.empty():
        yield inbox.get_nowait()


def _joined(found: Sequence[Delta | Exception]) -> list[Delta | Exception]:
    """One delta for each request, in the order in which they first came."""
    if len(found) == 1:
        return [*found]
    one_of: dict[int, Delta] = {}
    last: list[Delta | Exception] = []
    for delta in found:
        if isinstance(delta, Exception) or delta.error is not None:
            last.append(delta)
        elif (before := one_of.get(delta.index)) is None:
            one_of[delta.index] = delta
        else:
            logprobs = None if delta.logprobs is None else [*(before.logprobs or ()), *delta.logprobs]
            one_of[delta.index] = replace(
                delta, text=before.text + delta.text, tokens=before.tokens + delta.tokens, logprobs=logprobs
            )
    return [*one_of.values(), *last]


def _hand_out(pairs: Sequence[tuple[_Ticket, Delta]]) -> None:
    for ticket, delta in pairs:
        ticket.inbox.put_nowait(delta)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *given: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *given)
    except RuntimeError:  # the loop is closed: nobody waits
        log.debug("an answer came after its event loop had closed")
