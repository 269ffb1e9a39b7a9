"""How likely given continuations are: every shared token is computed once.

Three layers of sharing, each a feed of the backend: the prefix of all sequences in the call (a
few-shot header), the prefix of each group (a prompt), and what is left of each continuation. The
continuations of a group take turns on the same rows: each overwrites the slots of the one before,
so that nothing of the cache is copied when a batch is wide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tercet.engine.backend import Backend, State
from tercet.engine.prefix import SharedPrefix, common_prefix

FORWARD_TOKENS = 4096  # in one feed: enough to keep any matrix product busy; bounds activations
ROWS = 32  # with fewer prompts than this their rows are repeated, so that continuations share a feed


@dataclass
class Continuation:
    """``tokens[begin:]`` given ``tokens[:begin]``, ``begin`` at least 1; the results come here."""

    group: int  # continuations of the same prompt have the same number
    tokens: list[int]
    begin: int
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True


@dataclass(frozen=True)
class _Group:
    members: list[Continuation]
    shared: list[int]  # the tokens all members are fed first

    @property
    def rest(self) -> list[Continuation]:
        """Members that are fed more than the shared tokens (the last token is never fed)."""
        return [one for one in self.members if len(one.tokens) - 1 > len(self.shared)]

    @property
    def longest(self) -> int:
        return max(len(one.tokens) for one in self.members)


def evaluate(backend: Backend[State], continuations: Sequence[Continuation]) -> None:
    """Fill in ``logprobs`` and ``is_greedy`` of every continuation."""
    groups = _group(continuations)
    # Up to the token before the first that is scored, and less than all of any group.
    prefix = SharedPrefix(
        backend,
        [
            group.shared[: min(len(group.shared) - 1, *(one.begin - 1 for one in group.members))]
            for group in groups
        ],
    )
    for batch, capacity in _batches(backend, groups, prefix.length):
        state = prefix.rows(len(batch), capacity)
        scored = [
            (one, row, at)
            for row, group in enumerate(batch)
            for one in group.members
            for at in range(one.begin, min(len(one.tokens), len(group.shared) + 1))
        ]
        fed = [group.shared[prefix.length :] for group in batch]
        _score(backend, state, fed, [prefix.length] * len(batch), scored)
        _score_rest(backend, state, batch, capacity)


def _group(continuations: Sequence[Continuation]) -> list[_Group]:
    """Groups of at least one shared token, by length, so that batches are of similar lengths."""
    members: dict[tuple[int, int], list[Continuation]] = defaultdict(list)
    for one in continuations:
        members[one.group, one.tokens[0]].append(one)
    groups = []
    for group in members.values():
        shared = common_prefix([one.tokens[:-1] for one in group])
        groups.append(_Group(group, group[0].tokens[:shared]))
    return sorted(groups, key=lambda group: len(group.shared))


def _batches(
    backend: Backend[State], groups: list[_Group], prefix: int
) -> Iterator[tuple[list[_Group], int]]:
    """Groups that are fed together, and the longest sequence among them."""
    batch: list[_Group] = []
    capacity = 0
    for group in groups:
        larger = max(capacity, group.longest)
        fed = (len(batch) + 1) * (len(group.shared) - prefix)
        if batch and ((len(batch) + 1) * larger > backend.cache_tokens or fed > FORWARD_TOKENS):
            yield batch, capacity
            batch, larger = [], group.longest
        batch.append(group)
        capacity = larger
    if batch:
        yield batch, capacity


def _score_rest(backend: Backend[State], state: State, batch: list[_Group], capacity: int) -> None:
    rests = [group.rest for group in batch]
    turns = max(len(rest) for rest in rests)
    if not turns:
        return
    copies = min(turns, max(1, min(ROWS, backend.cache_tokens // capacity) // len(batch)))
    if copies > 1:
        rows = [row for row in range(len(batch)) for _ in range(copies)]
        state = backend.gather([(state, rows)], capacity)
    for turn in range(0, turns, copies):
        fed: list[list[int]] = []
        starts: list[int] = []
        scored: list[tuple[Continuation, int, int]] = []
        for group, rest in zip(batch, rests, strict=True):
            start = len(group.shared)
            for place in range(turn, turn + copies):
                if place < len(rest):
                    one = rest[place]
                    scored += [
                        (one, len(fed), at) for at in range(max(one.begin, start + 1), len(one.tokens))
                    ]
                    fed.append(one.tokens[start:-1])
                    starts.append(start)
                else:  # nothing left for this row: its last shared token once more, which changes nothing
                    fed.append(group.shared[-1:])
                    starts.append(start - 1)
        _score(backend, state, fed, starts, scored)


def _score(
    backend: Backend[State],
    state: State,
    fed: list[list[int]],
    starts: list[int],
    scored: list[tuple[Continuation, int, int]],
) -> None:
    """Feed, and note for each (continuation, row, at) the log-probability of its token ``at``."""
    places = [(row, at - 1 - starts[row]) for _, row, at in scored]
    targets = [one.tokens[at] for one, _, at in scored]
    logprobs, likeliest = backend.logprobs(state, fed, starts, places, targets)
    for (one, _, _), logprob, best in zip(scored, logprobs.tolist(), likeliest.tolist(), strict=True):
        one.logprobs.append(logprob)
        one.is_greedy = one.is_greedy and best
