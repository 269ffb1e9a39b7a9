"""How likely given continuations are: every shared token is computed once.

What several prompts begin with (a few-shot header) is computed for the first of them, and its pages
serve the others. What the continuations of one prompt share is fed once; then each goes on from there,
on a copy of the page that is partly filled. Where there is no room for copies the continuations take
turns on the prompt's own pages: each overwrites the slots of the one before.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tercet.engine.backend import Backend, Chunk, split_calls
from tercet.engine.cache import PagedSequence, PagePool
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer


@dataclass
class Continuation:
    """``tokens[begin:]`` given ``tokens[:begin]``, ``begin`` at least 1; the results come here."""

    group: int  # continuations of the same prompt have the same number
    tokens: list[int]
    begin: int
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True


def encode(
    tokenizer: Tokenizer, group: int, prompt: str, continuation: str, special: bool, end: bool
) -> Continuation:
    """``continuation`` after ``prompt``, encoded together; ``end``: with the tokenizer's EOS behind it.

    special: whether encoding adds special tokens.

    Raises:
        UserError: the continuation is empty, or a special token that is needed does not exist.
    """
    tokens, offsets = tokenizer.encode_with_offsets(prompt + continuation, special=special)
    begin = len(tokens)
    while begin > 1 and offsets[begin - 1] == (0, 0):
        begin -= 1  # a token that encoding adds at the end is no part of the continuation
    tokens = list(tokens[:begin])
    while begin and offsets[begin - 1][1] > len(prompt):
        begin -= 1
    if end:
        if tokenizer.eos_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token to count with every choice; use end=False"
            )
        tokens.append(tokenizer.eos_id)
    if begin == len(tokens) or not continuation:
        raise UserError(f"the continuation {continuation!r} is empty; there is nothing to score")
    if begin == 0:
        before = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if before is None:
            raise UserError(
                "the prompt is empty, and the tokenizer has neither a BOS nor an EOS token to condition on"
            )
        tokens, begin = [before, *tokens], 1
    return Continuation(group, tokens, begin)


@dataclass(frozen=True)
class _Group:
    members: list[Continuation]
    shared: list[int]  # the tokens all members are fed first
    pages: PagedSequence

    @property
    def rest(self) -> deque[Continuation]:
        """Members that are fed more than the shared tokens (the last token is never fed)."""
        return deque(one for one in self.members if len(one.tokens) - 1 > len(self.shared))

    @property
    def longest(self) -> int:
        """Positions that the longest member needs."""
        return max(len(one.tokens) for one in self.members) - 1

    @property
    def unscored(self) -> int:
        """Tokens up to the one before the first that is scored, and less than all."""
        return min(len(self.shared), *(one.begin for one in self.members)) - 1


def evaluate(
    backend: Backend,
    pool: PagePool,
    continuations: Sequence[Continuation],
    make_room: Callable[[], bool] = lambda: False,
    adapter: int = 0,
) -> None:
    """Fill in ``logprobs`` and ``is_greedy`` of every continuation.

    make_room: frees pages that others hold; False when there are none.
    adapter: as in `Chunk`.

    Raises:
        UserError: a continuation does not fit the cache.
    """
    longest = max((len(one.tokens) - 1 for one in continuations), default=0)
    if pool.pages_for(longest) > pool.num_pages:
        raise UserError(
            f"a prompt with its continuation has {longest + 1} tokens; the cache holds "
            f"{pool.num_pages * pool.page_size}; shorten it, or give the cache more memory"
        )
    waiting = deque(_groups(continuations, pool, adapter))
    while waiting:
        batch: list[_Group] = []
        try:
            for group in _admit(backend, pool, waiting, make_room):
                batch.append(group)
            _score_shared(backend, batch)
            _score_rest(backend, batch)
        finally:
            for group in batch:
                _close(backend, group.pages)


def _groups(continuations: Sequence[Continuation], pool: PagePool, adapter: int) -> list[_Group]:
    """Groups of at least one shared token, by length, so that calls are of similar lengths."""
    members: dict[tuple[int, int], list[Continuation]] = defaultdict(list)
    for one in continuations:
        members[one.group, one.tokens[0]].append(one)
    groups = []
    for group in members.values():
        shared = _common_prefix([one.tokens[:-1] for one in group])
        groups.append(_Group(group, group[0].tokens[:shared], pool.sequence(adapter)))
    return sorted(groups, key=lambda group: len(group.shared))


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all ``sequences`` begin with."""
    # The first and the last in lexicographic order differ the earliest.
    first, last = min(sequences), max(sequences)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


def _admit(
    backend: Backend, pool: PagePool, waiting: deque[_Group], make_room: Callable[[], bool]
) -> Iterator[_Group]:
    """Take groups out of ``waiting`` that are computed together: as many as fit one feed, one at least."""
    passed: list[_Group] = []  # they wait for what others are computing
    count = fed = 0
    while waiting and max(count, len(passed)) < backend.max_chunks:
        group = waiting[0]
        pages = group.pages
        pages.reuse(group.shared, group.unscored)
        # Only for what this batch computes: pages that a request has begun are not finished meanwhile.
        if count and pages.should_wait(group.shared, group.unscored):
            pages.close()
            passed.append(waiting.popleft())
            continue
        fed += len(group.shared) - pages.computed
        fits = not count or fed <= backend.max_tokens
        while fits and not pages.reserve(group.longest):
            fits = not count and make_room()
        if not fits:
            pages.close()
            if not count:
                raise RuntimeError("scoring can't begin: pages are held by nobody the engine knows")
            break
        pages.announce(group.shared)
        count += 1
        yield waiting.popleft()
    waiting.extendleft(reversed(passed))


def _score_shared(backend: Backend, batch: Sequence[_Group]) -> None:
    chunks: list[Chunk] = []
    scored: list[list[tuple[Continuation, int]]] = []
    for group in batch:
        pages, end = group.pages, len(group.shared)
        at: dict[int, list[tuple[Continuation, int]]] = defaultdict(list)
        for one in group.members:
            for place in range(one.begin - 1, min(len(one.tokens) - 1, end)):
                at[place].append((one, one.tokens[place + 1]))
        wanted = sorted(at)
        chunks.append(
            Chunk(
                pages.number,
                group.shared[pages.computed :],
                pages.computed,
                pages.pages,
                [place - pages.computed for place in wanted],
                pages.adapter,
            )
        )
        scored += [at[place] for place in wanted]
    _score(backend, chunks, scored)
    for group in batch:
        group.pages.computed = len(group.shared)
        group.pages.share(group.shared)


def _score_rest(backend: Backend, batch: Sequence[_Group]) -> None:
    going = [(group, rest) for group in batch if (rest := group.rest)]
    while going:
        copies: list[PagedSequence] = []
        try:
            _score_some(backend, going, copies)
        finally:
            for copy in copies:
                _close(backend, copy)
        going = [(group, rest) for group, rest in going if rest]


def _score_some(
    backend: Backend, going: Sequence[tuple[_Group, deque[Continuation]]], copies: list[PagedSequence]
) -> None:
    """Take members out of ``going`` as long as there is room, and feed what they don't share."""
    chunks: list[Chunk] = []
    scored: list[list[tuple[Continuation, int]]] = []
    pairs: list[tuple[int, int]] = []
    room = backend.max_tokens
    for group, rest in going:
        start, in_place = len(group.shared), True
        while rest and len(chunks) < backend.max_chunks:
            one = rest[0]
            tokens = one.tokens[start:-1]
            if chunks and len(tokens) > room:
                break
            pages = group.pages
            if not in_place:
                fork = pages.fork(start, start + len(tokens))
                if fork is None:
                    break  # it has its turn on the group's own pages
                pages = fork
                copies.append(pages)
                if start % pages.pool.page_size:
                    page = start // pages.pool.page_size
                    pairs.append((group.pages.pages[page], pages.pages[page]))
            first = max(one.begin - 1, start)
            wanted = range(first - start, len(tokens))
            chunks.append(Chunk(pages.number, tokens, start, pages.pages, wanted, pages.adapter))
            scored += [[(one, one.tokens[start + place + 1])] for place in wanted]
            room, in_place = max(0, room - len(tokens)), False
            rest.popleft()
    if pairs:
        backend.copy_pages(pairs)
    _score(backend, chunks, scored)


def _score(
    backend: Backend, chunks: Sequence[Chunk], scored: Sequence[list[tuple[Continuation, int]]]
) -> None:
    """Feed, and note the log-probability of the (continuation, token)s at each wanted place in order."""
    begin = 0
    for call in split_calls(backend, chunks):
        end = begin + sum(len(chunk.wanted) for chunk in call)
        here = scored[begin:end]
        logprobs, likeliest = backend.logprobs(call, [[token for _, token in place] for place in here])
        owners = (one for place in here for one, _ in place)
        for one, logprob, best in zip(owners, logprobs.tolist(), likeliest.tolist(), strict=True):
            one.logprobs.append(logprob)
            one.is_greedy = one.is_greedy and best
        begin = end


def _close(backend: Backend, pages: PagedSequence) -> None:
    backend.release(pages.number)
    pages.close()
