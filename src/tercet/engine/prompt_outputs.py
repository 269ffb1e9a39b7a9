"""The network's outputs at every token of given prompts: log-probabilities and mean hidden states.

Pages are taken as for scoring. Pages that other sequences computed cannot be reused here, because a
page stores a token's keys and values but not its outputs; the pages computed here serve later requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Backend, Chunk, split_calls
from tercet.engine.cache import PagedSequence, PagePool
from tercet.engine.request import TokenLogprob
from tercet.engine.sampling import entropy, largest, log_softmax
from tercet.engine.text import TokenBytes
from tercet.errors import UserError

LOGIT_VALUES = 1 << 24  # logits in memory at a time: 64 MiB in float32

MakeRoom = Callable[[], bool]  # frees pages that requests hold; returns False when no request holds any


@dataclass(frozen=True)
class _Text:
    """One prompt and the pages it is computed in; ``number`` is its index among the prompts."""

    number: int
    tokens: Sequence[int]
    pages: PagedSequence


def token_logprobs(
    backend: Backend,
    pool: PagePool,
    prompts: Sequence[Sequence[int]],
    top: int,
    bytes_of: TokenBytes,
    make_room: MakeRoom,
    adapter: int,
) -> list[list[TokenLogprob | None]]:
    """Return for each prompt None, for its first token, and a `TokenLogprob` for every other token.

    Raises:
        UserError: a prompt does not fit the cache, or the logits are not finite.
    """
    results: list[list[TokenLogprob | None]] = [[None] for _ in prompts]
    first = [not bytes_of(prompt[0]) for prompt in prompts]  # whether no token so far is visible
    # The last token of each prompt is scored, not fed.
    texts = [prompt[:-1] for prompt in prompts]
    limit = max(1, LOGIT_VALUES // backend.vocab_size)
    for call in _calls(backend, pool, texts, limit, make_room, adapter):
        rows = iter(backend.feed([chunk for _, chunk in call]))
        for number, chunk in call:
            for position, row in enumerate(islice(rows, len(chunk.tokens)), chunk.start + 1):
                token = prompts[number][position]
                results[number].append(_logprob(row, token, top, bytes_of, first[number]))
                first[number] = first[number] and not bytes_of(token)
    return results


def _logprob(
    logits: NDArray[np.float32], token: int, top: int, bytes_of: TokenBytes, first: bool
) -> TokenLogprob:
    """Return the record of ``token`` after ``logits`` [V]; ``first``: no token before it is visible."""
    if not np.isfinite(logits.max()):
        raise UserError("the model's logits are not finite; its weights are broken or overflow in this dtype")
    logprobs = log_softmax(logits.astype(np.float64))
    best = [
        (int(candidate), bytes_of.text(int(candidate), first=first), float(logprobs[candidate]))
        for candidate in largest(logprobs, top)
    ]
    data = bytes_of(token, first=first)
    text = bytes_of.text(token, first=first)
    return TokenLogprob(token, text, float(logprobs[token]), data, best, entropy(logprobs))


def mean_states(
    backend: Backend, pool: PagePool, prompts: Sequence[Sequence[int]], make_room: MakeRoom, adapter: int
) -> NDArray[np.float32]:
    """Return for each prompt the mean input of the output head over its tokens, scaled to length 1: [N, H].

    Raises:
        UserError: a prompt does not fit the cache, or the activations are not finite.
    """
    if not prompts:
        return np.zeros((0, 0), np.float32)
    sums: dict[int, NDArray[np.float64]] = {}
    for call in _calls(backend, pool, prompts, backend.max_tokens, make_room, adapter):
        rows = iter(backend.hidden([chunk for _, chunk in call]))
        for number, chunk in call:
            # Row by row: the order of additions does not depend on the calls, so neighbours change no bit.
            for row in islice(rows, len(chunk.tokens)):
                sums[number] = row.astype(np.float64) if number not in sums else sums[number] + row
    totals = np.array([sums[number] for number in range(len(prompts))])
    if not np.isfinite(totals).all():
        raise UserError(
            "the model's activations are not finite; its weights are broken or overflow in this dtype"
        )
    lengths = np.linalg.norm(totals, axis=-1, keepdims=True)
    vectors: NDArray[np.float32] = (totals / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(
        np.float32
    )
    return vectors


def _calls(
    backend: Backend,
    pool: PagePool,
    texts: Sequence[Sequence[int]],
    limit: int,
    make_room: MakeRoom,
    adapter: int,
) -> Iterator[list[tuple[int, Chunk]]]:
    """Yield calls of at most ``limit`` tokens that feed every text once, as (number of the text, chunk).

    The caller must have computed a call before it requests the next one.

    Raises:
        UserError: a text does not fit the cache.
    """
    longest = max(map(len, texts), default=0)
    if pool.pages_for(longest) > pool.num_pages:
        raise UserError(
            f"a prompt has {longest} tokens to be read; the cache holds {pool.num_pages * pool.page_size}; "
            "shorten it, or give the cache more memory"
        )
    # By length, so that calls have similar lengths.
    order = sorted(
        (number for number, text in enumerate(texts) if text), key=lambda number: len(texts[number])
    )
    waiting = deque(_Text(number, texts[number], pool.sequence(adapter)) for number in order)
    limit = min(limit, backend.max_tokens)
    while waiting:
        batch: list[_Text] = []
        try:
            for text in _admit(backend, waiting, limit, make_room):
                batch.append(text)
            number_of = {text.pages.number: text.number for text in batch}
            chunks = [
                Chunk(text.pages.number, text.tokens, 0, text.pages.pages, range(len(text.tokens)), adapter)
                for text in batch
            ]
            for call in split_calls(backend, chunks, limit):
                yield [(number_of[chunk.sequence], chunk) for chunk in call]
            for text in batch:
                text.pages.computed = len(text.tokens)
                text.pages.share(text.tokens)
        finally:
            for text in batch:
                backend.release(text.pages.number)
                text.pages.close()


def _admit(backend: Backend, waiting: deque[_Text], limit: int, make_room: MakeRoom) -> Iterator[_Text]:
    """Take the texts of the next batch from ``waiting``: as many as fit one feed, at least one."""
    count = fed = 0
    while waiting and count < backend.max_chunks:
        text = waiting[0]
        fed += len(text.tokens)
        fits = not count or fed <= limit
        while fits and not text.pages.reserve(len(text.tokens)):
            fits = not count and make_room()
        if not fits:
            if not count:
                raise RuntimeError("prompts can't be read: pages are in use by no request of this engine")
            break
        count += 1
        yield waiting.popleft()
