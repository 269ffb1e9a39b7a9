"""One engine and the thread that owns it, with an interface for coroutines.

The thread takes commands (submit, cancel, run a function) between two turns of the engine, and passes the
output of each turn to the event loops of the callers. So no lock is held while the network computes, and a
cancelled answer ends within one token.
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
    """Numbers of running and of waiting requests."""

    running: int
    waiting: int


class Meter(Protocol):
    """Records what a worker does. ``adapter`` is that of the request."""

    def first_token(self, adapter: str | None, seconds: float) -> None:
        """Record the time to an answer's first token."""

    def finished(self, adapter: str | None, usage: Usage) -> None:
        """Record the tokens of a complete answer."""

    def read(self, adapter: str | None, tokens: int) -> None:
        """Record tokens that a function given to `Worker.run` read; its caller reports them."""


class EngineStopped(APIError):
    """503: the worker was closed, or its engine failed."""

    def __init__(self) -> None:
        message = "this model's engine has stopped: the server is shutting down, or its log says why"
        super().__init__(503, message, "server_error", code="engine_stopped")


@dataclass(eq=False)
class Reading:
    """How far the engine has read the prompts of one call. The engine's thread writes it, and others read it.

    total: tokens of all prompts.
    read: tokens that are computed, those of the prefix cache included.
    """

    total: int = 0
    read: int = 0

    def __str__(self) -> str:
        if not self.total:
            return "waiting for the model"
        if self.read >= self.total:
            return "the model writes"
        return f"{self.read} of {self.total} tokens of the prompt are read"


@dataclass(eq=False)
class _Ticket:
    """Requests of one call, and the queue for their deltas."""

    requests: Sequence[Request]
    loop: asyncio.AbstractEventLoop
    reading: Reading | None = None
    inbox: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    handles: list[int] = field(default_factory=list)  # used by the engine's thread only
    over: bool = False  # the caller reads the inbox no longer


class Worker:
    """An engine that any number of coroutines can use.

    engine: its tokenizer, ``context_length`` and ``stop_ids`` may be read from any thread; everything
        else only by functions given to `run`.
    """

    def __init__(self, engine: Engine, meter: Meter | None = None) -> None:
        self.engine, self.meter = engine, meter
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._functions: deque[Callable[[], None]] = deque()  # one of them runs between two turns
        self._owners: dict[
            int, tuple[_Ticket, int]
        ] = {}  # by handle: the ticket, and the place in its requests
        self._reading: set[_Ticket] = set()  # whose prompts are not read yet; for the engine's thread only
        self._closed = False
        self._load = Load(0, 0)
        self._pending = 0  # functions given to `run` that are not done
        self._swept, self._sweeping = threading.Event(), threading.Lock()  # for when the thread ends
        self._thread = threading.Thread(target=self._work, name="tercet-engine", daemon=True)
        self._thread.start()

    # For coroutines

    async def stream(
        self, requests: Sequence[Request], reading: Reading | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yield the requests' deltas as they come; ``index`` is a request's place in ``requests``.

        With ``reading``, which is kept up to date, the first delta is empty and comes as soon as the requests
        are queued, before the engine reads their prompts.

        Deltas of one request that came between two reads are joined, so that a busy server sends fewer
        and longer pieces.

        The first `anext` checks and queues all requests, or none. Closing the iterator, or cancelling the
        task that waits for it, ends them in the engine within one token.

        Raises:
            QueueFull: the queue has no room for them now.
            UserError: one of them can never be answered.
        """
        ticket = _Ticket(requests, asyncio.get_running_loop(), reading=reading)
        waiting = set(range(len(requests)))  # for their first token
        left, began = len(requests), time.perf_counter()
        self._put(lambda: self._submit(ticket))
        try:
            while left:
                for delta in _joined([await ticket.inbox.get(), *_queued(ticket.inbox)]):
                    if isinstance(delta, Exception):
                        raise delta
                    if delta.error is not None:
                        raise delta.error
                    if delta.tokens or delta.completion is not None:
                        self._measure(requests[delta.index], delta, began if delta.index in waiting else None)
                        waiting.discard(delta.index)
                    left -= delta.completion is not None
                    yield delta
        finally:
            if left:
                ticket.over = True
                self._put(lambda: self._cancel(ticket))

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests, in order. Raises as `stream`."""
        done: dict[int, Completion] = {}
        async with aclosing(self.stream(requests)) as deltas:
            async for delta in deltas:
                if delta.completion is not None:
                    done[delta.index] = delta.completion
        return [done[index] for index in range(len(requests))]

    async def run(self, function: Callable[[Engine], T]) -> T:
        """Run ``function(engine)`` between two turns, on the engine's thread; return its result.

        All streams wait meanwhile, so long work is better done in several parts. A function whose caller
        is cancelled before it has begun does not run.

        Raises:
            QueueFull: ``max_waiting`` functions wait already. Also whatever the function raises.
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
        """The load as of the last turn."""
        return Load(self._load.running, self._load.waiting + self._pending)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread accepts work."""
        return self._thread.is_alive() and not self._closed

    async def drain(self, seconds: float) -> bool:
        """Wait until there is no work left, at most ``seconds``; return whether there is none."""
        end = time.monotonic() + seconds
        while self._owners or self._pending or self._load != Load(0, 0):
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self) -> None:
        """Stop the thread; running requests end with an error."""
        self._closed = True
        self._put(lambda: None)
        self._thread.join(timeout=10)

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self._swept.is_set():
            self._sweep()  # the thread has ended and runs no commands

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
            # The backend failed, for example out of memory. The same requests would fail again.
            log.error("the engine failed; all its requests end", exc_info=problem)
            self._abort(problem)
            return
        self._deliver(deltas)
        for ticket in [*self._reading]:
            self._follow(ticket)

    def _follow(self, ticket: _Ticket) -> None:
        """Count the tokens of a ticket's prompts that have been read."""
        assert ticket.reading is not None
        counts = [self.engine.read_tokens(handle) for handle in ticket.handles]
        ticket.reading.read = sum(
            len(request.tokens) if count is None else count
            for request, count in zip(ticket.requests, counts, strict=True)
        )
        if ticket.over or ticket.reading.read >= ticket.reading.total:
            self._reading.discard(ticket)

    def _counted(self) -> Load:
        running = self.engine.running
        return Load(running, len(self._owners) - running)

    def _take_commands(self) -> None:
        """Run all queued commands; wait for one when there is no other work."""
        try:
            block = not self.engine.has_work and not self._functions and not self._closed
            self._commands.get(block)()
            while True:
                self._commands.get(False)()
        except queue.Empty:
            pass

    def _submit(self, ticket: _Ticket) -> None:
        """Submit all of a ticket's requests, or none of them."""
        if ticket.over:
            return
        try:
            if self._closed:
                raise EngineStopped()
            if len(ticket.requests) > self.engine.max_waiting:
                raise UserError(
                    f"the request is for {len(ticket.requests)} answers; the server accepts "
                    f"{self.engine.max_waiting} at most, so send fewer prompts or a smaller n"
                )
            for place, request in enumerate(ticket.requests):
                handle = self.engine.submit(request)
                ticket.handles.append(handle)
                self._owners[handle] = ticket, place
        except Exception as problem:
            self._cancel(ticket)
            _call_soon(ticket.loop, ticket.inbox.put_nowait, problem)
            return
        if ticket.reading is not None:
            ticket.reading.total = sum(len(request.tokens) for request in ticket.requests)
            self._reading.add(ticket)
            _call_soon(ticket.loop, ticket.inbox.put_nowait, Delta(0, "", [], None))

    def _cancel(self, ticket: _Ticket) -> None:
        self._reading.discard(ticket)
        for handle in ticket.handles:
            if self._owners.pop(handle, None) is not None:
                self.engine.cancel(handle)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """Send one message to each event loop for all its tickets: waking a loop is the expensive part."""
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
        """End everything that waits, so that no caller waits for ever. `_put` sweeps commands put later."""
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


def _queued(inbox: asyncio.Queue[Delta | Exception]) -> Iterator[Delta | Exception]:
    while not inbox.empty():
        yield inbox.get_nowait()


def _joined(deltas: Sequence[Delta | Exception]) -> list[Delta | Exception]:
    """Join the deltas of each request, in the order in which the requests first came; errors come last."""
    if len(deltas) == 1:
        return [*deltas]
    by_request: dict[int, Delta] = {}
    errors: list[Delta | Exception] = []
    for delta in deltas:
        if isinstance(delta, Exception) or delta.error is not None:
            errors.append(delta)
        elif (before := by_request.get(delta.index)) is None:
            by_request[delta.index] = delta
        else:
            logprobs = None if delta.logprobs is None else [*(before.logprobs or ()), *delta.logprobs]
            by_request[delta.index] = replace(
                delta, text=before.text + delta.text, tokens=before.tokens + delta.tokens, logprobs=logprobs
            )
    return [*by_request.values(), *errors]


def _hand_out(pairs: Sequence[tuple[_Ticket, Delta]]) -> None:
    for ticket, delta in pairs:
        ticket.inbox.put_nowait(delta)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop is closed, so there is no caller
        log.debug("an answer came after its event loop had closed")
