"""The log-probabilities of given continuations; tokens that several of them share are computed once.

A beginning that several prompts share (a few-shot header) is computed for the first of them, and its
pages serve the others. The tokens that the continuations of one prompt share are fed once; each
continuation is then fed its remaining tokens on a copy of the page that is partly filled. Where there
is no room for copies, the continuations use the prompt's own pages one after another: each overwrites
the slots of the one before.

Where only the best continuation of a prompt is wanted, most need not be computed: the log-probability of a
continuation's first tokens is an upper bound of its total. The first token of each is known from the prompt.
The most promising one is computed first, and those whose bound is below the best total are dropped. The result
is exact.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from tercet.data.continuation import continued
from tercet.engine.backend import Backend, Chunk, split_calls
from tercet.engine.cache import PagedSequence, PagePool
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

# Full feeds of prompts in a batch. The tokens after the prompts are few, and one feed takes those of many prompts.
FEEDS = 8


@dataclass(eq=False)
class Continuation:
    """``tokens[begin:]`` after ``tokens[:begin]``, and the results of `score_continuations`.

    Attributes:
        group: continuations of the same prompt have the same number.
        tokens: prompt and continuation.
        begin: the index of the continuation's first token, at least 1.
        logprobs: the natural log-probability of each token of the continuation.
        is_greedy: whether every token of the continuation is the likeliest one at its position.
        offset: what is added to the sum of the log-probabilities when continuations are compared.
        dropped: whether the continuation was not computed to its end, since another one is better.
    """

    group: int
    tokens: list[int]
    begin: int
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True
    offset: float = 0.0
    dropped: bool = False

    @property
    def bound(self) -> float:
        """The compared total, or an upper bound of it before all tokens are scored."""
        return sum(self.logprobs) + self.offset


def encode(
    tokenizer: Tokenizer, group: int, prompt: str, continuation: str, special: bool, end: bool
) -> Continuation:
    """Return the tokens of ``prompt``, then those of ``continuation``, as `tercet.data.continuation` describes.

    Args:
        tokenizer: the model's.
        group: becomes `Continuation.group`.
        prompt: the text before the continuation; may be empty.
        continuation: the text to score.
        special: whether encoding adds special tokens.
        end: whether the tokenizer's EOS token is appended to the continuation.

    Raises:
        UserError: the continuation is empty, or a required special token does not exist.
    """
    encoded = continued(tokenizer, prompt + continuation, len(prompt), special=special)
    tokens, begin = [*encoded.prompt, *encoded.continuation], len(encoded.prompt)
    if end:
        if tokenizer.eos_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token to count with every choice; use `end=False`"
            )
        tokens.append(tokenizer.eos_id)
    if begin == len(tokens) or not continuation:
        raise UserError(f"the continuation {continuation!r} is empty; there is nothing to score")
    if begin == 0:
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            raise UserError(
                "the prompt is empty, and the tokenizer has neither a BOS nor an EOS token to condition on"
            )
        tokens, begin = [first, *tokens], 1
    return Continuation(group, tokens, begin)


@dataclass(frozen=True)
class _Group:
    """Continuations of one prompt that begin with the same token."""

    members: list[Continuation]
    shared: list[int]  # the tokens that all members begin with
    pages: PagedSequence

    @property
    def rest(self) -> deque[Continuation]:
        """Members that are fed more than the shared tokens (the last token is never fed)."""
        return deque(member for member in self.members if len(member.tokens) - 1 > len(self.shared))

    @property
    def longest(self) -> int:
        """The number of positions that the longest member requires."""
        return max(len(member.tokens) for member in self.members) - 1

    @property
    def reusable(self) -> int:
        """The number of shared tokens after which no logits are required; below the number of all."""
        return min(len(self.shared), *(member.begin for member in self.members)) - 1


# A token to score, and the continuation it belongs to.
Target = tuple[Continuation, int]


def score_continuations(
    backend: Backend,
    pool: PagePool,
    continuations: Sequence[Continuation],
    make_room: Callable[[], bool] = lambda: False,
    adapter: int = 0,
    *,
    best_only: bool = False,
) -> None:
    """Fill in ``logprobs`` and ``is_greedy`` of every continuation.

    Args:
        backend: computes the network.
        pool: the backend's pages.
        continuations: of any number of prompts.
        make_room: frees pages that requests hold; returns False when no request holds any.
        adapter: as in `Chunk`.
        best_only: drop continuations that are not the best of their group; see `Continuation.dropped`.

    Raises:
        UserError: a continuation does not fit the cache.
    """
    longest = max((len(continuation.tokens) - 1 for continuation in continuations), default=0)
    if pool.pages_for(longest) > pool.num_pages:
        raise UserError(
            f"a prompt with its continuation has {longest + 1} tokens; the cache holds "
            f"{pool.num_pages * pool.page_size}; shorten it, or give the cache more memory"
        )
    waiting = deque(_groups(continuations, pool, adapter))
    while waiting:
        batch: list[_Group] = []
        try:
            for group in _admit(backend, waiting, make_room):
                batch.append(group)
            _score_shared(backend, batch)
            if best_only:
                _score_best(backend, batch)
            else:
                _score_rest(backend, [(group, group.rest) for group in batch])
        finally:
            for group in batch:
                _close(backend, group.pages)


def _groups(continuations: Sequence[Continuation], pool: PagePool, adapter: int) -> list[_Group]:
    """Groups with at least one shared token, sorted by length so that calls have similar lengths."""
    members: dict[tuple[int, int], list[Continuation]] = defaultdict(list)
    for continuation in continuations:
        members[continuation.group, continuation.tokens[0]].append(continuation)
    groups = []
    for group in members.values():
        shared = _common_prefix([member.tokens[:-1] for member in group])
        groups.append(_Group(group, group[0].tokens[:shared], pool.sequence(adapter)))
    return sorted(groups, key=lambda group: len(group.shared))


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """The number of tokens that all ``sequences`` begin with."""
    # The first and the last in lexicographic order differ at the earliest place.
    first, last = min(sequences), max(sequences)
    for place, (left, right) in enumerate(zip(first, last, strict=False)):
        if left != right:
            return place
    return min(len(first), len(last))


def _admit(backend: Backend, waiting: deque[_Group], make_room: Callable[[], bool]) -> Iterator[_Group]:
    """Take the groups of the next batch from ``waiting``: as many as fit one feed, at least one."""
    deferred: list[_Group] = []  # groups whose shared pages another group of this batch computes
    count = fed = 0
    while waiting and max(count, len(deferred)) < backend.max_chunks:
        group = waiting[0]
        pages = group.pages
        pages.reuse(group.shared, group.reusable)
        # Wait only for pages of this batch: those that a request has begun are not finished meanwhile.
        if count and pages.should_wait(group.shared, group.reusable):
            pages.close()
            deferred.append(waiting.popleft())
            continue
        fed += len(group.shared) - pages.computed
        fits = not count or fed <= FEEDS * backend.max_tokens
        while fits and not pages.reserve(group.longest):
            fits = not count and make_room()
        if not fits:
            pages.close()
            if not count:
                raise RuntimeError("scoring can't begin: pages are in use by no request of this engine")
            break
        pages.announce(group.shared)
        count += 1
        yield waiting.popleft()
    waiting.extendleft(reversed(deferred))


def _score_shared(backend: Backend, batch: Sequence[_Group]) -> None:
    """Feed the shared tokens of each group, and score the tokens that follow them."""
    chunks: list[Chunk] = []
    scored: list[list[Target]] = []
    for group in batch:
        pages, end = group.pages, len(group.shared)
        targets: dict[int, list[Target]] = defaultdict(list)  # by the position before them
        for member in group.members:
            for position in range(member.begin - 1, min(len(member.tokens) - 1, end)):
                targets[position].append((member, member.tokens[position + 1]))
        positions = sorted(targets)
        chunks.append(
            Chunk(
                pages.number,
                group.shared[pages.computed :],
                pages.computed,
                pages.pages,
                [position - pages.computed for position in positions],
                pages.adapter,
            )
        )
        scored += [targets[position] for position in positions]
    _score(backend, chunks, scored)
    for group in batch:
        group.pages.computed = len(group.shared)
        group.pages.share(group.shared)


def _score_rest(backend: Backend, batch: Sequence[tuple[_Group, deque[Continuation]]]) -> None:
    """Score the tokens of given members that their groups do not share."""
    unfinished = [(group, rest) for group, rest in batch if rest]
    while unfinished:
        copies: list[PagedSequence] = []
        try:
            _score_members(backend, unfinished, copies)
        finally:
            for copy in copies:
                _close(backend, copy)
        unfinished = [(group, rest) for group, rest in unfinished if rest]


def _score_best(backend: Backend, batch: Sequence[_Group]) -> None:
    """Score the rest of the most promising members of each group, until no other can be better.

    The first turn takes one member of each group and each later turn twice as many: where the model is sure of a
    continuation one turn is enough, and where it is not, few turns with many tokens are faster than many with few.
    """
    unfinished = [_Contest.of(group) for group in batch]
    count = 1
    while unfinished := [contest for contest in unfinished if contest.drop_beaten()]:
        turn = [
            (contest, [contest.rest.popleft() for _ in range(min(count, len(contest.rest)))])
            for contest in unfinished
        ]
        _score_rest(backend, [(contest.group, deque(members)) for contest, members in turn])
        for contest, members in turn:
            contest.best = max(contest.best, *(member.bound for member in members))
        count *= 2


@dataclass
class _Contest:
    """A group whose best member is sought: the members that are not scored yet, the most promising first."""

    group: _Group
    rest: deque[Continuation]
    best: float  # the largest total of a scored member

    @classmethod
    def of(cls, group: _Group) -> Self:
        rest = group.rest
        totals = [member.bound for member in group.members if member not in rest]
        return cls(
            group, deque(sorted(rest, key=lambda member: -member.bound)), max(totals, default=-math.inf)
        )

    def drop_beaten(self) -> bool:
        """Drop the members that cannot be the best; return whether any is left to score."""
        while self.rest and self.rest[-1].bound < self.best:
            self.rest.pop().dropped = True
        return bool(self.rest)


def _score_members(
    backend: Backend, unfinished: Sequence[tuple[_Group, deque[Continuation]]], copies: list[PagedSequence]
) -> None:
    """Take members from ``unfinished`` as long as there is room, and feed the tokens they don't share.

    Page sequences that are made for them are appended to ``copies``; the caller closes them.
    """
    chunks: list[Chunk] = []
    scored: list[list[Target]] = []
    page_copies: list[tuple[int, int]] = []
    room = backend.max_tokens
    for group, rest in unfinished:
        start, in_place = len(group.shared), True
        while rest and len(chunks) < backend.max_chunks:
            member = rest[0]
            tokens = member.tokens[start:-1]
            if chunks and len(tokens) > room:
                break
            pages = group.pages
            if not in_place:
                fork = pages.fork(start, start + len(tokens))
                if fork is None:
                    break  # the member is fed later, on the group's own pages
                pages = fork
                copies.append(pages)
                if start % pages.pool.page_size:
                    page = start // pages.pool.page_size
                    page_copies.append((group.pages.pages[page], pages.pages[page]))
            first = max(member.begin - 1, start)
            outputs = range(first - start, len(tokens))
            chunks.append(Chunk(pages.number, tokens, start, pages.pages, outputs, pages.adapter))
            scored += [[(member, member.tokens[start + index + 1])] for index in outputs]
            room, in_place = max(0, room - len(tokens)), False
            rest.popleft()
    if page_copies:
        backend.copy_pages(page_copies)
    _score(backend, chunks, scored)


def _score(backend: Backend, chunks: Sequence[Chunk], scored: Sequence[list[Target]]) -> None:
    """Feed the chunks; record the log-probabilities of ``scored[n]`` after the n-th output."""
    begin = 0
    for call in split_calls(backend, chunks):
        end = begin + sum(len(chunk.outputs) for chunk in call)
        targets = scored[begin:end]
        logprobs, likeliest = backend.logprobs(call, [[token for _, token in place] for place in targets])
        owners = (continuation for place in targets for continuation, _ in place)
        for continuation, logprob, best in zip(owners, logprobs.tolist(), likeliest.tolist(), strict=True):
            continuation.logprobs.append(logprob)
            continuation.is_greedy = continuation.is_greedy and best
        begin = end


def _close(backend: Backend, pages: PagedSequence) -> None:
    """Release a sequence in the backend and in the pool."""
    backend.release(pages.number)
    pages.close()
