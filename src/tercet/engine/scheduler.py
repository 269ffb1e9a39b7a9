"""The scheduler: which requests run, and which tokens of each the next feed computes.

Requests wait in order of arrival and are admitted as long as there are pages for their prompts
(continuous batching: Yu et al. 2022, Orca). A feed computes the next token of every running request,
or several where they are forced or drafted, and parts of long prompts in the remaining room, so that a
long prompt does not delay the others (chunked prefill: Agrawal et al. 2023, arXiv:2308.16369). A
request that requires a page when none is left preempts the running request that came last: that one
waits again, and is computed anew when there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from tercet.engine.backend import Backend, Chunk
from tercet.engine.cache import PagePool
from tercet.engine.generation import Generation

MIXED_TOKENS = (
    256  # in a feed with prompts while other requests decode: bounds how long these wait for a token
)
SHORT = 16  # tokens that are fed in one piece, for example a turn of a conversation's template

Batch = list[tuple[Generation, Chunk]]


class Scheduler:
    """The queue of one engine and its running requests.

    Attributes:
        waiting: requests without pages; the first is admitted next.
        running: requests with pages.
    """

    def __init__(self, backend: Backend, pool: PagePool) -> None:
        self._backend, self._pool = backend, pool
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []

    @property
    def short(self) -> int:
        """The number of tokens that are fed in one piece; as many are reserved for parts of long prompts."""
        return min(SHORT, self._backend.max_tokens // 2)

    def add(self, generation: Generation) -> None:
        """Append a request to the queue."""
        self.waiting.append(generation)

    def admit(self, max_batch: int) -> Iterator[Generation]:
        """Let waiting requests run, in order, as long as there is room; yield each request that changes.

        At most ``max_batch`` requests run at the same time.

        A request that is ``ended`` when it is yielded has failed or finished without running: its
        constraint required the whole output. It stays in the queue until the caller removes it.
        """
        deferred: list[Generation] = []  # requests whose prefix a running request is computing
        limit = min(max_batch, self._backend.max_chunks)
        try:
            while self.waiting and max(len(self.running), len(deferred)) < limit:
                generation = self.waiting[0]
                try:
                    generation.prepare()
                except Exception as error:
                    generation.error = error
                if generation.ended:
                    yield generation
                    continue
                pages, tokens = generation.pages, generation.tokens
                pages.reuse(tokens, len(tokens) - 1)
                if pages.should_wait(tokens, len(tokens) - 1):
                    pages.close()
                    deferred.append(self.waiting.popleft())
                    continue
                # Running requests will need a page each before long; preempting one costs more than waiting.
                if not pages.reserve(len(tokens)) or self._pool.available < len(self.running):
                    pages.close()
                    break
                self.running.append(self.waiting.popleft())
                pages.announce(tokens)
                generation.start_clock()
                yield generation
        finally:
            self.waiting.extendleft(reversed(deferred))

    def schedule(self) -> Batch:
        """Choose the tokens of each running request that the next feed computes."""
        for generation in self.running:
            # If the last turn was interrupted after its feed, the last token's logits are lost: feed it again.
            generation.pages.computed = min(generation.pages.computed, len(generation.tokens) - 1)
        limit = self._backend.max_tokens
        whole, partial = self._by_length(limit)
        spared = self.short if partial else 0
        chunks: dict[Generation, Chunk] = {}
        room = self._add_whole(chunks, whole, limit, spared)
        if any(generation.generated for generation in whole):
            room = min(room, max(MIXED_TOKENS - (limit - room), spared))
        self._add_parts(chunks, partial, room)
        # Reserving pages for a request may have preempted one that has a chunk already.
        running = set(self.running)
        return [(generation, chunk) for generation, chunk in chunks.items() if generation in running]

    def _by_length(self, limit: int) -> tuple[list[Generation], list[Generation]]:
        """Divide the running requests into those fed in one piece and those fed in parts."""
        whole: list[Generation] = []
        partial: list[Generation] = []
        short = self.short
        for generation in self.running:
            count = generation.uncomputed
            fits = count <= short
            if fits and generation.lookahead_is_sampled:
                fits = count + len(generation.lookahead) + short <= limit
            (whole if fits or count == 1 else partial).append(generation)
        return whole, partial

    def _add_whole(
        self, chunks: dict[Generation, Chunk], whole: Sequence[Generation], room: int, spared: int
    ) -> int:
        """Add all uncomputed tokens of each request, except ``spared`` tokens of room; return the room left."""
        for generation in sorted(whole, key=lambda generation: generation.last_turn):  # longest wait first
            count, lookahead = generation.uncomputed, len(generation.lookahead)
            if lookahead and not generation.lookahead_is_sampled:
                lookahead = max(0, min(lookahead, room - spared - count))
            if count + lookahead + spared > room:
                continue
            if self._reserve(generation, len(generation.tokens) + lookahead):
                chunks[generation] = generation.chunk(count, lookahead)
                room -= count + lookahead
        return room

    def _add_parts(self, chunks: dict[Generation, Chunk], partial: Sequence[Generation], room: int) -> None:
        """Fill the room with parts of the uncomputed tokens of each request, in order of arrival."""
        for generation in sorted(partial, key=lambda generation: generation.handle):
            count = min(generation.uncomputed, room)
            lookahead = len(generation.lookahead) if count == generation.uncomputed else 0
            if lookahead > room - count:
                count, lookahead = count - 1, 0  # the last token is fed with the lookahead, in the next turn
            if count > 0 and self._reserve(generation, generation.pages.computed + count + lookahead):
                chunks[generation] = generation.chunk(count, lookahead)
                room -= count + lookahead

    def _reserve(self, generation: Generation, length: int) -> bool:
        """Reserve pages for ``length`` tokens, preempting requests that came later if necessary.

        Return False when the request itself was preempted.
        """
        if generation not in self.running:
            return False
        while not generation.pages.reserve(length):
            if self._preempt() is generation:
                return False
        return True

    def make_room(self) -> bool:
        """Preempt the running request that came last; return False when none runs."""
        if not self.running:
            return False
        self._preempt()
        return True

    def _preempt(self) -> Generation:
        """Return the running request that came last to the front of the queue, and free its pages."""
        generation = max(self.running, key=lambda generation: generation.handle)
        self.running.remove(generation)
        self._release(generation)
        self.waiting.appendleft(generation)
        return generation

    def remove(self, generation: Generation) -> None:
        """Remove a request for good. The pages of one that failed are not reused."""
        if generation in self.running:
            self.running.remove(generation)
            # Reject wrong values (not finite, say) before another request can reuse the pages.
            self._release(generation, forget=generation.error is not None)
        else:
            self.waiting.remove(generation)

    def _release(self, generation: Generation, forget: bool = False) -> None:
        """Free the pages of a request; with ``forget``, no other request may reuse their contents."""
        self._backend.release(generation.pages.number)
        generation.pages.close(forget)
