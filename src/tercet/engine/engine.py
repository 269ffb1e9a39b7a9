"""The engine: requests in, their tokens and texts out, computed in batches whose members change.

A request waits, runs and finishes. `Engine.submit` checks it and appends it to the scheduler's queue as
a `Generation`. Each turn is one feed of the backend in three steps: *schedule* admits waiting requests,
drafts tokens and chooses what is fed; *run* computes it; *process* extends each output by its logits,
delivers new text, and removes the requests that have finished.

The output of a request does not depend on the other requests: sequences do not attend to each other,
and each request draws random numbers from its own generator.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Backend
from tercet.engine.generation import Generation
from tercet.engine.request import Completion, Delta, Request
from tercet.engine.scheduler import Batch, Scheduler
from tercet.engine.scorer import Scorer, prompt_name
from tercet.engine.speculative import Drafter, DraftModel, PromptLookup, check_same_vocabulary
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tercet.engine.constraint import Constraints, Matcher

MAX_BATCH = 64  # the default number of requests that run at the same time
MAX_WAITING = 1024  # the default length of the queue; longer queues wait longer than clients do
DRAFTED_TOKENS = 64  # in a feed with drafts: up to about this many, a feed takes little longer


class QueueFull(UserError):
    """The queue has its largest length; the submitted request was not added."""


class Engine(Scorer):
    """Generates from and scores with one model. Not thread-safe.

    Args:
        backend: computes the network.
        tokenizer: the model's.
        stop_ids: tokens that end an output (end of text, end of turn).
        max_batch: the largest number of requests that run at the same time; the backend may allow fewer.
        max_waiting: the largest number of requests that `submit` lets wait.
        reuse_prefixes: whether prompts that begin with the same tokens share their keys and values.
        speculation: "ngram" drafts tokens from prompt and output, an engine drafts with its smaller
            model; None for no drafts.

    Raises:
        UserError: the draft engine's tokenizer differs.
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
        self._scheduler = Scheduler(backend, self.pool)
        self._drafter = _drafter(speculation, tokenizer)
        self._handles, self._turns = itertools.count(), itertools.count(1)
        self._generations: dict[int, Generation] = {}  # by handle: those that wait or run
        self._inboxes: dict[int, deque[Delta]] = {}  # by handle: the deltas of a stream's requests
        self._deltas: list[Delta] = []  # of submitted requests, since the last step
        self._constraints: dict[frozenset[int], Constraints] = {}  # of adapters, by their stop tokens

    # Constraints

    @cached_property
    def constraints(self) -> Constraints:
        """Compiles the grammars of requests; made for the first of them."""
        return self._make_constraints(self.stop_ids)

    def constraints_for(self, adapter: str | None) -> Constraints:
        """Return the constraints for requests with this adapter, whose stop tokens may be its own.

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
        """Return constraints whose outputs end with ``stops``."""
        from tercet.engine.constraint import Constraints

        return Constraints(self.tokenizer, self.backend.vocab_size, sorted(stops))

    # Whole calls

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete all requests; return the completions in the order of the requests.

        ``seconds`` of a completion count from the time when its request began to run.

        Raises:
            UserError: a prompt is empty, too long, or has tokens that the model does not know; a request
                does not fit the cache, or names an adapter that does not exist; a constraint is no
                valid grammar.
        """
        completions = {delta.index: delta.completion for delta in self.stream(requests) if delta.completion}
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """Complete all requests; yield each piece of text as it comes.

        Closing the iterator cancels the requests that have not finished.

        Raises:
            UserError: as `generate`.
        """
        for index, request in enumerate(requests):
            self._check(request, prompt_name(index, len(requests)))
        return self._stream(requests)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """Complete requests that have been checked."""
        inbox: deque[Delta] = deque()
        index_of: dict[int, int] = {}
        try:
            # Shortest first: prompts that are admitted together have similar lengths.
            for index in sorted(range(len(requests)), key=lambda index: len(requests[index].tokens)):
                handle = self._enqueue(requests[index])
                index_of[handle], self._inboxes[handle] = index, inbox
            unfinished = len(requests)
            while unfinished:
                while not inbox:
                    self._turn()
                delta = inbox.popleft()
                if delta.error is not None:
                    raise delta.error
                unfinished -= delta.completion is not None
                yield replace(delta, index=index_of[delta.index])
        finally:
            for handle in index_of:
                self.cancel(handle)

    # Single requests

    @property
    def running(self) -> int:
        """The number of requests that are being computed; the others wait."""
        return len(self._scheduler.running)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._generations or self._deltas)

    def submit(self, request: Request) -> int:
        """Append a request to the queue; return its handle, the ``index`` of its deltas from `step`.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            UserError: as `generate`.
        """
        self._check(request, "the prompt")
        waiting = len(self._scheduler.waiting)
        if waiting >= self.max_waiting:
            raise QueueFull(f"{waiting} requests are waiting already; send this one again later")
        return self._enqueue(request)

    def cancel(self, handle: int) -> bool:
        """End a request at once and free its pages; no delta of it follows. Return False if it had ended."""
        self._inboxes.pop(handle, None)
        self._deltas = [delta for delta in self._deltas if delta.index != handle]
        generation = self._generations.get(handle)
        if generation is not None:
            self._remove(generation)
        return generation is not None

    def read_tokens(self, handle: int) -> int | None:
        """Return how many tokens of a request's prompt have been computed; None for one that has ended."""
        generation = self._generations.get(handle)
        if generation is None:
            return None
        return min(generation.pages.computed, generation.prompt_length)

    def step(self) -> list[Delta]:
        """Compute one turn; return the deltas of submitted requests since the last step.

        The last delta of a request has its completion, or the error that ended it: an error of one
        request never ends another. When the backend raises, this method raises the same, and every
        request is in its state before the turn; the next step tries again.
        """
        if self._generations:
            self._turn()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _check(self, request: Request, name: str) -> None:
        """Raise UserError for a request that can never run; ``name`` names its prompt in the message."""
        self.number_of(request.adapter)
        self._check_tokens(request.tokens, name)
        limit, room = self._limit(request), self.pool.num_pages * self.pool.page_size
        if len(request.tokens) + limit - 1 > room:
            raise UserError(
                f"{name} has {len(request.tokens)} tokens and may get {limit} more; the cache holds {room} "
                "in all; lower `max_tokens`, shorten the prompt, or give the cache more memory"
            )
        self._matcher(request)

    def _limit(self, request: Request) -> int:
        """Return the largest number of tokens that a request may generate."""
        # The last token is never fed, so it may lie one beyond the model's positions.
        return min(request.sampling.max_tokens, self.max_positions - len(request.tokens) + 1)

    def _matcher(self, request: Request) -> Matcher | None:
        """Return the matcher of a request's constraint, if it has one."""
        if request.constraint is None:
            return None
        return self.constraints_for(request.adapter).matcher(request.constraint)

    def _enqueue(self, request: Request) -> int:
        """Append a request that has been checked to the queue; return its handle."""
        matcher, stops = self._matcher(request), self.stop_ids_of(request.adapter)
        pages = self.pool.sequence(self.number_of(request.adapter))
        handle = next(self._handles)
        generation = Generation(handle, request, self._limit(request), stops, self._bytes_of, pages, matcher)
        self._generations[handle] = generation
        self._scheduler.add(generation)
        return handle

    # A turn

    def _turn(self) -> None:
        """Feed the backend once: schedule, run, process."""
        batch = self._schedule()
        if batch:
            self._process(batch, self._run(batch))

    def _schedule(self) -> Batch:
        """Admit waiting requests and choose the tokens of the next feed; none when no request runs.

        Requests that end without running are delivered here.
        """
        changed = False
        for generation in self._scheduler.admit(self.max_batch):
            changed = True
            if generation.ended:
                self._deliver(generation)
        self._draft()
        batch = self._scheduler.schedule()
        if not batch and not changed:
            raise RuntimeError(
                "requests wait and none can run: pages are in use by no request of this engine"
            )
        return batch

    def _draft(self) -> None:
        """Draft the next tokens of the requests that have begun to generate."""
        if self._drafter is None:
            return
        decoding = [generation for generation in self._scheduler.running if generation.generated]
        share = max(0, DRAFTED_TOKENS - len(decoding)) // max(1, len(decoding))
        longest = self.backend.max_tokens - self._scheduler.short - 1
        drafting: list[Generation] = []
        draft_requests = []
        for generation in decoding:
            if generation.lookahead or generation.drafted_at == len(generation.tokens):
                continue
            # Once for a token, however many turns its feed waits: the pace counts tokens.
            generation.drafted_at = len(generation.tokens)
            # The last token is never fed; and a draft must fit into a feed with the token before it.
            count = min(generation.pace.next(), generation.limit - generation.generated - 1, longest)
            # The length of a sampled draft changes the output, so it must not depend on other requests.
            if not self._drafter.samples(generation.sampling):
                count = min(count, share)
            if count > 0:
                drafting.append(generation)
                draft_requests.append(generation.draft_request(count))
        drafts = self._drafter.propose(draft_requests) if draft_requests else []
        for generation, draft in zip(drafting, drafts, strict=True):
            generation.set_draft(draft)

    def _run(self, batch: Batch) -> NDArray[np.float32]:
        """Feed the chunks of the batch; return the logits [outputs, V] of all its chunks in order."""
        logits = self.backend.feed([chunk for _, chunk in batch])
        turn = next(self._turns)
        for generation, chunk in batch:
            generation.last_turn = turn
            # Tokens of the lookahead count as computed when they are part of the output.
            end = chunk.start + len(chunk.tokens)
            generation.pages.computed = min(end, len(generation.tokens))
        return logits

    def _process(self, batch: Batch, logits: NDArray[np.float32]) -> None:
        """Extend each output of the batch by its rows of the logits, and deliver new text."""
        begin = 0
        for generation, chunk in batch:
            end = begin + len(chunk.outputs)
            rows, begin = logits[begin:end], end
            try:
                if len(rows):
                    generation.pages.computed += generation.advance(rows)
            except Exception as error:
                generation.error = error
            else:
                generation.pages.share(generation.tokens)
            self._deliver(generation)

    def _deliver(self, generation: Generation) -> None:
        """Deliver the new text of a request, and remove the request if it has ended."""
        delta = generation.delta()
        if generation.ended:
            self._remove(generation)
        if delta is not None:
            self._inboxes.get(delta.index, self._deltas).append(delta)

    def _remove(self, generation: Generation) -> None:
        """Remove a request from the queue or the batch, for good."""
        del self._generations[generation.handle]
        self._scheduler.remove(generation)
        if self._drafter is not None:
            self._drafter.forget(generation.handle)

    def _make_room(self) -> bool:
        """Preempt the running request that came last; return False when none runs."""
        return self._scheduler.make_room()


def _drafter(speculation: Literal["ngram"] | Engine | Drafter | None, tokenizer: Tokenizer) -> Drafter | None:
    """Return the drafter for the setting ``speculation`` of an engine."""
    if speculation == "ngram":
        return PromptLookup()
    if isinstance(speculation, Engine):
        check_same_vocabulary(tokenizer, speculation.tokenizer)
        return DraftModel(speculation.backend, speculation.tokenizer)
    if isinstance(speculation, str):
        raise UserError(f"`speculation` is {speculation!r}; use 'ngram' or an engine with a smaller model")
    return speculation
