"""What the network makes of given texts, token by token: all of their places are wanted.

Pages are taken as for scoring. None that others computed can be taken over, since what is wanted of a
token is not kept with its keys and values; but those computed here serve requests that come later.
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

MakeRoom = Callable[[], bool]  # frees pages that others hold; False when there are none


@dataclass(frozen=True)
class _Text:
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
    """For each prompt None, then what `TokenLogprob` says of each token after the first."""
    found: list[list[TokenLogprob | None]] = [[None] for _ in prompts]
    first = [not bytes_of(prompt[0]) for prompt in prompts]  # whether none of the tokens so far is visible
    # The last token of each is scored, not fed.
    texts = [prompt[:-1] for prompt in prompts]
    most = max(1, LOGIT_VALUES // backend.vocab_size)
    for call in _calls(backend, pool, texts, most, make_room, adapter):
        rows = iter(backend.feed([chunk for _, chunk in call]))
        for number, chunk in call:
            for place, row in enumerate(islice(rows, len(chunk.tokens)), chunk.start + 1):
                token = prompts[number][place]
                found[number].append(_logprob(row, token, top, bytes_of, first[number]))
                first[number] = first[number] and not bytes_of(token)
    return found


def _logprob(
    logits: NDArray[np.float32], token: int, top: int, bytes_of: TokenBytes, first: bool
) -> TokenLogprob:
    if not np.isfinite(logits.max()):
        raise UserError("the model's logits are not finite; its weights are broken or overflow in this dtype")
    logprobs = log_softmax(logits.astype(np.float64))
    best = [
        (int(one), bytes_of.text(int(one), first=first), float(logprobs[one]))
        for one in largest(logprobs, top)
    ]
    data = bytes_of(token, first=first)
    text = bytes_of.text(token, first=first)
    return TokenLogprob(token, text, float(logprobs[token]), data, best, entropy(logprobs))


def mean_states(
    backend: Backend, pool: PagePool, prompts: Sequence[Sequence[int]], make_room: MakeRoom, adapter: int
) -> NDArray[np.float32]:
    """For each prompt the mean of what the head reads at its tokens, of length 1: [N, H]."""
    if not prompts:
        return np.zeros((0, 0), np.float32)
    sums: dict[int, NDArray[np.float64]] = {}
    for call in _calls(backend, pool, prompts, backend.max_tokens, make_room, adapter):
        rows = iter(backend.hidden([chunk for _, chunk in call]))
        for number, chunk in call:
            # One by one: in this order whatever the calls, so that neighbours don't change a bit.
            for row in islice(rows, len(chunk.tokens)):
                sums[number] = row.astype(np.float64) if number not in sums else sums[number] + row
    found = np.array([sums[number] for number in range(len(prompts))])
    if not np.isfinite(found).all():
        raise UserError(
            "the model's activations are not finite; its weights are broken or overflow in this dtype"
        )
    lengths = np.linalg.norm(found, axis=-1, keepdims=True)
    vectors: NDArray[np.float32] = (found / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)
    return vectors


def _calls(
    backend: Backend,
    pool: PagePool,
    texts: Sequence[Sequence[int]],
    most: int,
    make_room: MakeRoom,
    adapter: int,
) -> Iterator[list[tuple[int, Chunk]]]:
    """Feeds of ``most`` tokens at most that read every text once: chunks, and the number of each one's text.

    Whoever asks for the next feed has computed the last one.

    Raises:
        UserError: a text does not fit the cache.
    """
    longest = max(map(len, texts), default=0)
    if pool.pages_for(longest) > pool.num_pages:
        raise UserError(
            f"a prompt has {longest} tokens to be read; the cache holds {pool.num_pages * pool.page_size}; "
            "shorten it, or give the cache more memory"
        )
    # By length, so that feeds are of similar lengths.
    order = sorted((number for number, text in enumerate(texts) if text), key=lambda one: len(texts[one]))
    waiting = deque(_Text(number, texts[number], pool.sequence(adapter)) for number in order)
    most = min(most, backend.max_tokens)
    while waiting:
        batch: list[_Text] = []
        try:
            for one in _admit(backend, waiting, most, make_room):
                batch.append(one)
            number_of = {one.pages.number: one.number for one in batch}
            chunks = [
                Chunk(one.pages.number, one.tokens, 0, one.pages.pages, range(len(one.tokens)), adapter)
                for one in batch
            ]
            for call in split_calls(backend, chunks, most):
                yield [(number_of[chunk.sequence], chunk) for chunk in call]
            for one in batch:
                one.pages.computed = len(one.tokens)
                one.pages.share(one.tokens)
        finally:
            for one in batch:
                backend.release(one.pages.number)
                one.pages.close()


def _admit(backend: Backend, waiting: deque[_Text], most: int, make_room: MakeRoom) -> Iterator[_Text]:
    """Take texts out of ``waiting`` that are read together: as many as fit one feed, one at least."""
    count = fed = 0
    while waiting and count < backend.max_chunks:
        one = waiting[0]
        fed += len(one.tokens)
        fits = not count or fed <= most
        while fits and not one.pages.reserve(len(one.tokens)):
            fits = not count and make_room()
        if not fits:
            if not count:
                raise RuntimeError("reading can't begin: pages are held by nobody the engine knows")
            break
        count += 1
        yield waiting.popleft()
