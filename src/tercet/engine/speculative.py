"""Speculative decoding: drafts of the next tokens, which the model checks in one feed instead of one feed each.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). The output has the
same distribution as without drafts. At temperature 0 a drafted token is accepted when it is the
likeliest token. A token that was sampled from a distribution is accepted or replaced by `take_draft`.
Any other drafted token is accepted when it is the token that is sampled anyway, so not even the random
numbers differ.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Backend, Chunk, split_calls
from tercet.engine.cache import PagedSequence, PagePool
from tercet.engine.request import Sampling
from tercet.engine.sampling import Distribution, distribution
from tercet.engine.text import differing_token
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

LONGEST_NGRAM = 3
FIRST_LENGTH, LONGEST_DRAFT = 4, 8  # a feed of nine tokens takes little longer than one of one token
LONGEST_PAUSE = 64  # tokens without drafts where drafts are always wrong: at most one in 64 costs more


@dataclass(frozen=True)
class DraftRequest:
    """A request for up to ``count`` tokens that may follow ``tokens``.

    Attributes:
        sequence: identifies the sequence of ``tokens``; tokens are only ever appended to a sequence.
        tokens: prompt and output so far.
        count: the largest length of the draft.
        sampling: the settings of the request that is generated.
        rng: the generator of the same request, to sample with.
    """

    sequence: int
    tokens: Sequence[int]
    count: int
    sampling: Sampling
    rng: np.random.Generator


class Draft(NamedTuple):
    """Tokens that may come next, and the distribution each was sampled from; None: they were not sampled."""

    tokens: list[int]
    distributions: list[Distribution] | None = None


NO_DRAFT = Draft([])


class Drafter(Protocol):
    """Drafts the next tokens of sequences."""

    def samples(self, sampling: Sampling) -> bool:
        """Return whether drafts for such requests are sampled, so that their length changes the output."""
        ...

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return a draft for each request, of at most ``count`` tokens."""
        ...

    def forget(self, sequence: int) -> None:
        """Forget a sequence that has ended."""
        ...


class Pace:
    """The length of the next draft of one request, from how many tokens of its last drafts were accepted.

    Only the request's own drafts count, so that its tokens do not depend on other requests.
    """

    def __init__(self) -> None:
        self.length, self._pause, self._failures = FIRST_LENGTH, 0, 0

    def next(self) -> int:
        """Return the length of the next draft; 0 for none."""
        if self._pause:
            self._pause -= 1
            return 0
        return self.length

    def note(self, drafted: int, accepted: int) -> None:
        """Adapt to a draft of ``drafted`` tokens of which ``accepted`` were accepted."""
        if accepted == drafted:
            self.length, self._failures = min(2 * self.length, LONGEST_DRAFT), 0
        elif accepted:
            self.length, self._failures = accepted + 1, 0
        else:
            self._failures += 1
            self.length = max(1, self.length // 2)
            self._pause = min(2**self._failures, LONGEST_PAUSE)


class PromptLookup:
    """Drafts the tokens that followed the last occurrence of the sequence's last tokens.

    The longest n-gram counts, of at most 3 tokens, and its latest place (Saxena 2023, prompt lookup
    decoding). Lookups cost no arithmetic, and help where outputs repeat: summaries, edits, extraction,
    code.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Ngrams] = {}

    def samples(self, sampling: Sampling) -> bool:
        """Return False: drafts are looked up, never sampled."""
        return False

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return a draft for each request; empty where its last token did not occur before."""
        return [
            Draft(self._known.setdefault(request.sequence, _Ngrams()).follow(request.tokens, request.count))
            for request in requests
        ]

    def forget(self, sequence: int) -> None:
        """Forget the n-grams of a sequence."""
        self._known.pop(sequence, None)


@dataclass
class _Ngrams:
    """The n-grams of a sequence, each with the place after its latest occurrence."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0  # tokens whose n-grams are in ``places``

    def follow(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return ``count`` tokens that followed the last n-gram of ``tokens`` before; none where it is new."""
        for end in range(self.indexed + 1, len(tokens)):  # the last token has nothing after it yet
            for size in range(1, min(LONGEST_NGRAM, end) + 1):
                self.places[tuple(tokens[end - size : end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)
        for size in range(min(LONGEST_NGRAM, len(tokens)), 0, -1):
            place = self.places.get(tuple(tokens[-size:]))
            if place is not None:
                # Beyond the last token the draft repeats itself: text that repeats tends to go on repeating.
                period = len(tokens) - place
                return [tokens[place + n % period] for n in range(count)]
        return []


@dataclass
class _Followed:
    """A sequence in the draft model's cache."""

    pages: PagedSequence
    length: int = 0  # its tokens at its last draft
    drafted: list[int] = field(default_factory=list)  # drafted tokens that were fed after these


class _Job(NamedTuple):
    """A draft that is being made."""

    request: DraftRequest
    length: int  # tokens to draft
    draft: Draft
    pages: PagedSequence


class DraftModel:
    """A smaller model with the same vocabulary, decoded ahead of the large one.

    At temperature 0 it drafts its likeliest tokens, otherwise it samples them with the settings of the
    request. It has its own pages of keys and values. When these run out, the pages of the request that
    drafted longest ago are freed, and computed anew for its next draft.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self._pool = PagePool(backend.num_pages, backend.page_size)
        # By sequence; the one that drafted longest ago comes first.
        self._known: OrderedDict[int, _Followed] = OrderedDict()
        # Rows of the logits beyond the vocabulary are padding.
        self._vocab = min(backend.vocab_size, tokenizer.vocab_size)

    def samples(self, sampling: Sampling) -> bool:
        """Return whether drafts are sampled: at any temperature above 0."""
        return sampling.temperature > 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return a draft for each request; shorter than ``count`` where the model's positions end."""
        drafts = [Draft([], [] if self.samples(request.sampling) else None) for request in requests]
        waiting = deque(
            (request, self._count(request), draft) for request, draft in zip(requests, drafts, strict=True)
        )
        while waiting:
            group: list[_Job] = []
            while waiting and len(group) < self.backend.max_chunks:
                request, count, draft = waiting[0]
                if count > 0:
                    pages = self._follow(request, count, {job.request.sequence for job in group})
                    if pages is None:
                        break
                    group.append(_Job(request, count, draft, pages))
                waiting.popleft()
            self._decode(group)
        return drafts

    def forget(self, sequence: int) -> None:
        """Free the pages of a sequence."""
        followed = self._known.pop(sequence, None)
        if followed is not None:
            self._release(followed)

    def _count(self, request: DraftRequest) -> int:
        """Return the number of tokens to draft; the last token is never fed."""
        room = min(self.backend.max_positions, self._pool.num_pages * self._pool.page_size)
        return min(request.count, room - len(request.tokens) + 1)

    def _follow(self, request: DraftRequest, count: int, busy: set[int]) -> PagedSequence | None:
        """Return the pages of a request's sequence with room for the draft, rewound to its present tokens.

        Return None when pages are free only after the sequences in ``busy`` have drafted.
        """
        followed = self._known.get(request.sequence)
        if followed is None:
            followed = self._known[request.sequence] = _Followed(self._pool.sequence())
            followed.pages.reuse(request.tokens, len(request.tokens) - 1)
        else:
            same = followed.length
            for token in followed.drafted:
                if same >= len(request.tokens) or request.tokens[same] != token:
                    break
                same += 1
            followed.pages.computed = min(followed.pages.computed, same, len(request.tokens) - 1)
        self._known.move_to_end(request.sequence)
        followed.length, followed.drafted = len(request.tokens), []
        followed.pages.share(request.tokens)
        while not followed.pages.reserve(len(request.tokens) + count - 1):
            in_use = {*busy, request.sequence}
            oldest = next((sequence for sequence in self._known if sequence not in in_use), None)
            if oldest is None:
                return None
            self._release(self._known.pop(oldest))
        return followed.pages

    def _release(self, followed: _Followed) -> None:
        """Free the pages of a sequence."""
        self.backend.release(followed.pages.number)
        followed.pages.close()

    def _decode(self, group: Sequence[_Job]) -> None:
        """Fill in the drafts; each feed computes one token of every draft that is not complete."""
        unfinished = list(group)
        new = [list(job.request.tokens[job.pages.computed :]) for job in group]
        while unfinished:
            logits = self._feed([job.pages for job in unfinished], new)
            remaining: list[_Job] = []
            new = []
            for job, row in zip(unfinished, logits, strict=True):
                if not np.isfinite(row.max()):
                    continue  # a broken draft model must not break the request
                token = _choose(row, job)
                job.draft.tokens.append(token)
                if len(job.draft.tokens) < job.length:
                    self._known[job.request.sequence].drafted.append(token)
                    remaining.append(job)
                    new.append([token])
            unfinished = remaining

    def _feed(self, sequences: Sequence[PagedSequence], new: Sequence[list[int]]) -> NDArray[np.float32]:
        """Feed the new tokens of each sequence; return the logits [sequences, V] after the last of them."""
        chunks = [
            Chunk(pages.number, tokens, pages.computed, pages.pages, [len(tokens) - 1])
            for pages, tokens in zip(sequences, new, strict=True)
        ]
        rows = [self.backend.feed(call) for call in split_calls(self.backend, chunks)]
        for pages, tokens in zip(sequences, new, strict=True):
            pages.computed += len(tokens)
        logits: NDArray[np.float32] = np.concatenate(rows)[:, : self._vocab]
        return logits


def _choose(logits: NDArray[np.float32], job: _Job) -> int:
    """Return the next drafted token from ``logits`` [V]; record the distribution that it was sampled from."""
    if job.draft.distributions is None:
        return int(logits.argmax())
    source = distribution(logits, job.request.sampling)
    if source.tokens is None:  # with explicit tokens: the large model's logits may be wider
        source = Distribution(np.arange(len(logits)), source.weights)
    job.draft.distributions.append(source)
    return source.draw(job.request.rng)


def check_same_vocabulary(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Raise UserError unless both tokenizers have the same tokens under the same ids."""
    token = differing_token(tokenizer, draft)
    if token is not None:
        sizes = [len(side.backend.get_vocab(with_added_tokens=True)) for side in (draft, tokenizer)]
        raise UserError(
            f"the draft model has another vocabulary ({sizes[0]} tokens; the model has {sizes[1]}; "
            f"they differ at {token!r}); take a draft model with the same tokenizer"
        )
