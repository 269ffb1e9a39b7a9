"""The engine: many requests in, their tokens and texts out, in batches of changing members.

A request waits, runs and finishes. Each turn is one feed of the backend: the next token of every
running request, or several where they are certain or guessed, and parts of the prompts of those that
have just joined, so that a long prompt does not hold up the others. A request that needs a page when
none is left sends the one that came last back to wait; it is computed anew when there is room.

What a request gets does not depend on its neighbours: sequences never see each other, and each
request draws from a generator of its own.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tercet.engine.backend import Backend, Chunk
from tercet.engine.request import Completion, Delta, Request
from tercet.engine.running import Running
from tercet.engine.scorer import Scorer, prompt_name
from tercet.engine.speculative import Ask, Drafter, DraftModel, PromptLookup, check_same_vocabulary
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tercet.engine.constraint import Constraints

MAX_BATCH = 64  # requests that run at the same time, unless asked otherwise
MAX_WAITING = 1024  # requests that wait; more would wait longer than anybody does
MIXED_TOKENS = 256  # in a turn with prompts while others decode: bounds how long these wait for a token
SHORT = 16  # tokens that are fed whole, a turn of a conversation's template, say
GUESSED_TOKENS = 64  # in a turn with guesses: up to about this many, a feed takes little longer


class QueueFull(UserError):
    """As many requests wait as may; the one that was submitted is not among them."""


class Engine(Scorer):
    """Generates from and scores with one model. Not for several threads at once.

    stop_ids: tokens that end an output (end of text, end of turn).
    max_batch: requests that run at the same time at most; the backend may allow fewer.
    max_waiting: requests that `submit` lets wait at most.
    reuse_prefixes: whether prompts that begin with the same tokens share what is computed for these.
    speculation: "ngram" guesses tokens from prompt and output, an engine guesses with its smaller
        model; None: no guesses.

    Raises:
        UserError: the draft engine's tokenizer is another one.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        max_batch: int = MAX_BATCH,
        *,
        max_waiting: int = MAX_WAITING,
        reuse_prefixes: bool = True,
        speculation: Literal["ngram"] | Engine | Drafter | None = None,
    ) -> None:
        super().__init__(backend, tokenizer, stop_ids, reuse_prefixes)
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._drafter = _drafter(speculation, tokenizer)
        self._handles, self._turns = itertools.count(), itertools.count(1)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._open: dict[int, Running] = {}  # both of them by handle
        self._inboxes: dict[int, deque[Delta]] = {}  # where the deltas of a stream's requests go
        self._constraints: dict[frozenset[int], Constraints] = {}  # of adapters, by their stop tokens
        self._ready: list[Delta] = []  # those of requests that were submitted

    @cached_property
    def constraints(self) -> Constraints:
        """Compiles the grammars of requests; made when the first comes."""
        return self._make_constraints(self.stop_ids)

    def constraints_for(self, adapter: str | None) -> Constraints:
        """The same for requests with this adapter, whose stop tokens may be its own.

        Raises:
            UserError: the engine has no adapter of that name.
        """
        stops = self.stop_ids_of(adapter)
        if stops == self.stop_ids:
            return self.constraints
        if stops not in self._constraints:
            self._constraints[stops] = self._make_constraints(stops)
        return self._constraints[stops]

    def _make_constraints(self, stops: frozenset[int]) -> Constraints:
        from tercet.engine.constraint import Constraints

        return Constraints(self.tokenizer, self.backend.vocab_size, sorted(stops))

    # Whole calls

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All requests to their end; completions in the order of the requests.

        ``seconds`` of a completion count from when its request began to run.

        Raises:
            UserError: a prompt is empty, too long, or has tokens that the model doesn't know; a
                request does not fit the cache, or asks for an adapter that isn't there; a constraint
                is no grammar.
        """
        done = {delta.index: delta.completion for delta in self.stream(requests) if delta.completion}
        return [done[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """The same, piece by piece as text comes. Closing the iterator cancels what still runs."""
        for index, request in enumerate(requests):
            self._check(request, prompt_name(index, len(requests)))
        return self._stream(requests)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        inbox: deque[Delta] = deque()
        index_of: dict[int, int] = {}
        try:
            # Shortest first: prompts that join together are of similar length.
            for index in sorted(range(len(requests)), key=lambda index: len(requests[index].tokens)):
                one = self._enqueue(requests[index])
                index_of[one.handle], self._inboxes[one.handle] = index, inbox
            left = len(requests)
            while left:
                while not inbox:
                    self._turn()
                delta = inbox.popleft()
                if delta.error is not None:
                    raise delta.error
                left -= delta.completion is not None
                yield replace(delta, index=index_of[delta.index])
        finally:
            for handle in index_of:
                self.cancel(handle)

    # Request by request

    @property
    def running(self) -> int:
        """How many requests are being computed; the others wait."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to give."""
        return bool(self._waiting or self._running or self._ready)

    def submit(self, request: Request) -> int:
        """Let a request wait for its turn; its handle, the ``index`` of the deltas that `step` returns.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            UserError: as `generate`.
        """
        self._check(request, "the prompt")
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already; send this one again later")
        return self._enqueue(request).handle

    def cancel(self, handle: int) -> bool:
        """End a request at once and free its pages; no delta comes any more. False if it had ended."""
        self._inboxes.pop(handle, None)
        self._ready = [delta for delta in self._ready if delta.index != handle]
        one = self._open.get(handle)
        if one is not None:
            self._leave(one)
        return one is not None

    def step(self) -> list[Delta]:
        """One turn; the deltas of submitted requests since the last step.

        The last delta of a request has its completion, or the error that ended it: an error of one
        request never ends another. When the backend raises, so does this, and every request is as
        before the turn; the next step tries again.
        """
        if self._waiting or self._running:
            self._turn()
        ready, self._ready = self._ready, []
        return ready

    def _check(self, request: Request, what: str) -> None:
        self.number_of(request.adapter)
        self._check_tokens(request.tokens, what)
        limit, room = self._limit(request), self.pool.num_pages * self.pool.page_size
        if len(request.tokens) + limit - 1 > room:
            raise UserError(
                f"{what} has {len(request.tokens)} tokens and may get {limit} more; the cache holds {room} "
                "in all; lower max_tokens, shorten the prompt, or give the cache more memory"
            )
        if request.constraint is not None:
            self.constraints_for(request.adapter).matcher(request.constraint)

    def _limit(self, request: Request) -> int:
        # The last token need not be fed, so it may lie one beyond the model's positions.
        return min(request.sampling.max_tokens, self.max_positions - len(request.tokens) + 1)

    def _enqueue(self, request: Request) -> Running:
        matcher = None
        if request.constraint is not None:
            matcher = self.constraints_for(request.adapter).matcher(request.constraint)
        limit, stops = self._limit(request), self.stop_ids_of(request.adapter)
        pages = self.pool.sequence(self.number_of(request.adapter))
        one = Running(next(self._handles), request, limit, stops, self._bytes_of, pages, matcher)
        self._open[one.handle] = one
        self._waiting.append(one)
        return one

    # A turn

    def _turn(self) -> None:
        changed = self._admit()
        plan = self._plan()
        if not plan:
            if not changed:
                raise RuntimeError(
                    "requests wait and none can run: pages are held by nobody the engine knows"
                )
            return
        logits = self.backend.feed([chunk for _, chunk in plan])
        turn = next(self._turns)
        for one, chunk in plan:
            # What was fed ahead counts when it has come.
            one.turn, one.pages.computed = turn, min(chunk.start + len(chunk.tokens), len(one.tokens))
        at = 0
        for one, chunk in plan:
            rows, at = logits[at : at + len(chunk.outputs)], at + len(chunk.outputs)
            try:
                if len(rows):
                    one.pages.computed += one.take(rows)
            except Exception as problem:
                self._fail(one, problem)
                continue
            one.pages.share(one.tokens)
            self._deliver(one)

    def _admit(self) -> bool:
        """Let those who wait join, in order, as long as there is room; whether anything has changed."""
        passed: list[Running] = []  # they wait for what others are computing
        changed = False
        most = min(self.max_batch, self.backend.max_chunks)
        while self._waiting and max(len(self._running), len(passed)) < most:
            one = self._waiting[0]
            try:
                one.begin()
            except Exception as problem:
                self._fail(one, problem)
                changed = True
                continue
            if one.finish_reason:
                self._deliver(one)
                changed = True
                continue
            one.pages.reuse(one.tokens, len(one.tokens) - 1)
            if one.pages.should_wait(one.tokens, len(one.tokens) - 1):
                one.pages.close()
                passed.append(self._waiting.popleft())
                continue
            # Those who run will need a page each before long; sending one back costs more than waiting.
            if not one.pages.reserve(len(one.tokens)) or self.pool.available < len(self._running):
                one.pages.close()
                break
            self._running.append(self._waiting.popleft())
            one.pages.announce(one.tokens)
            one.join()
            changed = True
        self._waiting.extendleft(reversed(passed))
        return changed

    def _plan(self) -> list[tuple[Running, Chunk]]:
        """Who is fed what now."""
        for one in self._running:
            # If the last turn broke off after its feed, the last token's logits are lost: once more.
            one.pages.computed = min(one.pages.computed, len(one.tokens) - 1)
        self._draft()
        most, short = self.backend.max_tokens, self._short
        whole: list[Running] = []
        parts: list[Running] = []
        for one in self._running:
            fits = one.missing <= short and not (one.drawn and one.missing + len(one.ahead) + short > most)
            (whole if fits or one.missing == 1 else parts).append(one)
        spared = short if parts else 0
        plan: dict[Running, Chunk] = {}
        room = most
        for one in sorted(whole, key=lambda one: one.turn):  # who had to wait last time comes first
            ahead = len(one.ahead) if one.drawn else max(0, min(len(one.ahead), room - spared - one.missing))
            needed = one.missing + ahead
            if needed + spared <= room and self._reserve(one, len(one.tokens) + ahead):
                plan[one] = one.chunk(one.missing, ahead)
                room -= needed
        if any(one.generated for one in whole):
            room = min(room, max(MIXED_TOKENS - (most - room), spared))
        for one in sorted(parts, key=lambda one: one.handle):  # who came first ends first
            count = min(one.missing, room)
            ahead = len(one.ahead) if count == one.missing else 0
            if ahead > room - count:
                count, ahead = count - 1, 0  # the last token comes with those ahead, next time
            if count > 0 and self._reserve(one, one.pages.computed + count + ahead):
                plan[one] = one.chunk(count, ahead)
                room -= count + ahead
        # Making room for one may have sent back another.
        running = set(self._running)
        return [(one, chunk) for one, chunk in plan.items() if one in running]

    @property
    def _short(self) -> int:
        """Tokens that are fed whole, before any part of a longer prompt; as many are spared for such parts."""
        return min(SHORT, self.backend.max_tokens // 2)

    def _draft(self) -> None:
        """Guess the next tokens of those who have begun to generate."""
        if self._drafter is None:
            return
        rows = [one for one in self._running if one.generated]
        most = max(0, GUESSED_TOKENS - len(rows)) // max(1, len(rows))
        most_fed = self.backend.max_tokens - self._short - 1
        asking: list[tuple[Running, Ask]] = []
        for one in rows:
            if one.ahead or one.asked == len(one.tokens):
                continue
            one.asked = len(one.tokens)  # once, however many turns it takes: the pace counts tokens
            # The last token is never fed; and with the one before it a draft must fit into a turn.
            count = min(one.pace.next(), one.limit - one.generated - 1, most_fed)
            # Where guesses are drawn their number is the request's own affair: it changes what is drawn.
            if not self._drafter.draws(one.sampling):
                count = min(count, most)
            if count > 0:
                asking.append((one, one.ask(count)))
        drafts = self._drafter.propose([ask for _, ask in asking]) if asking else []
        for (one, _), draft in zip(asking, drafts, strict=True):
            one.guess(draft)

    def _reserve(self, one: Running, length: int) -> bool:
        """Pages for ``length`` tokens, if need be those of requests that came later; False: it had to go."""
        if one not in self._running:
            return False
        while not one.pages.reserve(length):
            last = max(self._running, key=lambda other: other.handle)
            self._send_back(last)
            if last is one:
                return False
        return True

    def _make_room(self) -> bool:
        """Send back the request that came last, if any runs."""
        if not self._running:
            return False
        self._send_back(max(self._running, key=lambda one: one.handle))
        return True

    def _send_back(self, one: Running) -> None:
        self._running.remove(one)
        self._release(one)
        self._waiting.appendleft(one)

    def _fail(self, one: Running, problem: Exception) -> None:
        # What is not finite, or else wrong, must not be found by others.
        self._leave(one, forget=True)
        self._put(Delta(one.handle, "", [], None, error=problem))

    def _deliver(self, one: Running) -> None:
        delta = one.delta()
        if one.finish_reason:
            self._leave(one)
        if delta is not None:
            self._put(delta)

    def _put(self, delta: Delta) -> None:
        inbox = self._inboxes.get(delta.index)
        if inbox is None:
            self._ready.append(delta)
        else:
            inbox.append(delta)

    def _leave(self, one: Running, forget: bool = False) -> None:
        """Out of the queue or the batch, for good."""
        del self._open[one.handle]
        if one in self._running:
            self._running.remove(one)
            self._release(one, forget)
        else:
            self._waiting.remove(one)
        if self._drafter is not None:
            self._drafter.forget(one.handle)

    def _release(self, one: Running, forget: bool = False) -> None:
        self.backend.release(one.pages.number)
        one.pages.close(forget)


def _drafter(speculation: Literal["ngram"] | Engine | Drafter | None, tokenizer: Tokenizer) -> Drafter | None:
    if speculation == "ngram":
        return PromptLookup()
    if isinstance(speculation, Engine):
        check_same_vocabulary(tokenizer, speculation.tokenizer)
        return DraftModel(speculation.backend, speculation.tokenizer)
    if isinstance(speculation, str):
        raise UserError(
            f"speculation {speculation!r} is unknown; use 'ngram' or an engine with a smaller model"
        )
    return speculation
