"""Guesses of the next tokens, which the model then checks in one feed instead of one feed each.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). What a request gets
has the same distribution as without: at temperature 0 a guess is kept when it is the likeliest token;
a guess that was drawn from a distribution is kept or replaced by `take_draft`; any other guess is kept
when it is the token that is drawn anyway, so that not even the draws differ.
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
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

LONGEST_NGRAM = 3
FIRST_LENGTH, LONGEST_DRAFT = 4, 8  # a feed of nine tokens takes little longer than one of one token
LONGEST_PAUSE = 64  # tokens without drafts where drafts are always wrong: at most one in 64 costs more


@dataclass(frozen=True)
class Ask:
    """A wish for ``count`` tokens that may follow ``tokens``.

    sequence: whose they are; its tokens are only ever appended to.
    rng: the request's own, to draw with.
    """

    sequence: int
    tokens: Sequence[int]
    count: int
    sampling: Sampling
    rng: np.random.Generator


class Draft(NamedTuple):
    """Tokens that may come next, and what each was drawn from; None: they were not drawn."""

    tokens: list[int]
    distributions: list[Distribution] | None = None


NO_DRAFT = Draft([])


class Drafter(Protocol):
    """Guesses next tokens."""

    def draws(self, sampling: Sampling) -> bool:
        """Whether drafts for such requests are drawn, so that their length changes what comes out."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """A draft for each, of at most ``count`` tokens."""
        ...

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        ...


class Pace:
    """How long the drafts of one request should be, by how the last ones went.

    Nothing but the request's own drafts counts, so that its tokens don't depend on its neighbours.
    """

    def __init__(self) -> None:
        self.length, self._pause, self._failures = FIRST_LENGTH, 0, 0

    def next(self) -> int:
        """The length of the next draft; 0: none now."""
        if self._pause:
            self._pause -= 1
            return 0
        return self.length

    def note(self, drafted: int, accepted: int) -> None:
        """How the last draft went."""
        if accepted == drafted:
            self.length, self._failures = min(2 * self.length, LONGEST_DRAFT), 0
        elif accepted:
            self.length, self._failures = accepted + 1, 0
        else:
            self._failures += 1
            self.length = max(1, self.length // 2)
            self._pause = min(2**self._failures, LONGEST_PAUSE)


class PromptLookup:
    """What followed the last time that the text's last tokens occurred in prompt or output.

    The longest n-gram counts, of 3 tokens at most, and the latest place (Saxena 2023, prompt lookup
    decoding). Costs no arithmetic, and helps where outputs repeat: summaries, edits, extraction, code.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Ngrams] = {}

    def draws(self, sampling: Sampling) -> bool:
        return False

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [
            Draft(self._known.setdefault(ask.sequence, _Ngrams()).follow(ask.tokens, ask.count))
            for ask in asks
        ]

    def forget(self, sequence: int) -> None:
        self._known.pop(sequence, None)


@dataclass
class _Ngrams:
    """For each n-gram of a sequence the place after its latest occurrence."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0

    def follow(self, tokens: Sequence[int], count: int) -> list[int]:
        for end in range(self.seen + 1, len(tokens)):  # the last token has nothing after it yet
            for size in range(1, min(LONGEST_NGRAM, end) + 1):
                self.places[tuple(tokens[end - size : end])] = end
        self.seen = max(self.seen, len(tokens) - 1)
        for size in range(min(LONGEST_NGRAM, len(tokens)), 0, -1):
            place = self.places.get(tuple(tokens[-size:]))
            if place is not None:
                # Behind the end the guess goes on with itself: what repeats, repeats.
                period = len(tokens) - place
                return [tokens[place + n % period] for n in range(count)]
        return []


class DraftModel:
    """A smaller model with the same vocabulary, decoded ahead of the large one.

    At temperature 0 it proposes its likeliest tokens, otherwise it draws them with the request's own
    settings. It keeps keys and values in pages of its own; where these run out, those of the request
    that drafted longest ago are computed anew when it comes again.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self._pool = PagePool(backend.num_pages, backend.page_size)
        self._known: OrderedDict[int, _Followed] = OrderedDict()  # the one that drafted longest ago first
        # Rows of the logits beyond the vocabulary are padding.
        self._vocab = min(backend.vocab_size, tokenizer.vocab_size)

    def draws(self, sampling: Sampling) -> bool:
        return sampling.temperature > 0

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        drafts = [Draft([], [] if self.draws(ask.sampling) else None) for ask in asks]
        waiting = deque((ask, self._fitting(ask), draft) for ask, draft in zip(asks, drafts, strict=True))
        while waiting:
            group: list[tuple[Ask, int, Draft, PagedSequence]] = []
            while waiting and len(group) < self.backend.max_chunks:
                ask, count, draft = waiting[0]
                if count > 0:
                    pages = self._follow(ask, count, {other.sequence for other, *_ in group})
                    if pages is None:
                        break
                    group.append((ask, count, draft, pages))
                waiting.popleft()
            self._decode(group)
        return drafts

    def forget(self, sequence: int) -> None:
        known = self._known.pop(sequence, None)
        if known is not None:
            self._drop(known)

    def _fitting(self, ask: Ask) -> int:
        """How many tokens to draft: the last one is never fed."""
        room = min(self.backend.max_positions, self._pool.num_pages * self._pool.page_size)
        return min(ask.count, room - len(ask.tokens) + 1)

    def _follow(self, ask: Ask, count: int, busy: set[int]) -> PagedSequence | None:
        """The pages of a sequence, brought to the tokens it has now, with room for the draft."""
        known = self._known.get(ask.sequence)
        if known is None:
            known = self._known[ask.sequence] = _Followed(self._pool.sequence())
            known.pages.reuse(ask.tokens, len(ask.tokens) - 1)
        else:
            same = known.length
            for token in known.drafted:
                if same >= len(ask.tokens) or ask.tokens[same] != token:
                    break
                same += 1
            known.pages.computed = min(known.pages.computed, same, len(ask.tokens) - 1)
        self._known.move_to_end(ask.sequence)
        known.length, known.drafted = len(ask.tokens), []
        known.pages.share(ask.tokens)
        while not known.pages.reserve(len(ask.tokens) + count - 1):
            other = next((one for one in self._known if one not in busy and one != ask.sequence), None)
            if other is None:
                return None  # after the others
            self._drop(self._known.pop(other))
        return known.pages

    def _drop(self, known: _Followed) -> None:
        self.backend.release(known.pages.number)
        known.pages.close()

    def _decode(self, group: Sequence[tuple[Ask, int, Draft, PagedSequence]]) -> None:
        """Fill in the drafts, one token of all a feed."""
        going = list(group)
        new = [list(ask.tokens[pages.computed :]) for ask, _, _, pages in group]
        while going:
            logits = self._feed([pages for *_, pages in going], new)
            stay: list[tuple[Ask, int, Draft, PagedSequence]] = []
            new = []
            for one, row in zip(going, logits, strict=True):
                ask, count, draft, _ = one
                if not np.isfinite(row.max()):
                    continue  # a broken draft model must not break the request
                if draft.distributions is None:
                    token = int(row.argmax())
                else:
                    drawn = distribution(row, ask.sampling)
                    if drawn.tokens is None:  # said in full: the large model's logits may be wider
                        drawn = Distribution(np.arange(len(row)), drawn.weights)
                    token = drawn.draw(ask.rng)
                    draft.distributions.append(drawn)
                draft.tokens.append(token)
                if len(draft.tokens) < count:
                    self._known[ask.sequence].drafted.append(token)
                    stay.append(one)
                    new.append([token])
            going = stay

    def _feed(self, sequences: Sequence[PagedSequence], new: Sequence[list[int]]) -> NDArray[np.float32]:
        """Logits [sequences, V] after the last of their new tokens."""
        chunks = [
            Chunk(one.number, tokens, one.computed, one.pages, [len(tokens) - 1])
            for one, tokens in zip(sequences, new, strict=True)
        ]
        rows = [self.backend.feed(call) for call in split_calls(self.backend, chunks)]
        for one, tokens in zip(sequences, new, strict=True):
            one.computed += len(tokens)
        logits: NDArray[np.float32] = np.concatenate(rows)[:, : self._vocab]
        return logits


@dataclass
class _Followed:
    """A sequence as the draft model knows it."""

    pages: PagedSequence
    length: int = 0  # tokens it had at its last draft
    drafted: list[int] = field(default_factory=list)  # fed after them


def check_same_vocabulary(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """UserError unless both tokenizers have the same tokens under the same ids."""
    mine, other = (one.backend.get_vocab(with_added_tokens=True) for one in (tokenizer, draft))
    if mine != other:
        token = min(set(mine.items()) ^ set(other.items()), key=lambda item: item[1])[0]
        raise UserError(
            f"the draft model has another vocabulary ({len(other)} tokens; the model has {len(mine)}; "
            f"they differ at {token!r}); take a draft model with the same tokenizer"
        )
