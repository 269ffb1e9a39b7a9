"""Whose keys and values lie in which page, and which pages can serve a sequence that comes later.

A page that is full is found again by what was computed into it: its key is a hash of its tokens and
of the key of the page before, so that equal keys mean equal tokens from the sequence's beginning on (and the same adapter).
A system prompt, a few-shot header or the earlier turns of a conversation are then computed once,
whoever comes with them next. Pages that nobody uses stay findable until room is needed; the one
unused for longest goes first.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

WORTH_WAITING = 2  # pages: for fewer, waiting for another sequence to compute them costs more than it saves


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page behind the page with key ``before`` (empty for the first)."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Hands out the pages of one backend, counts their users and finds them again by their keys.

    reuse: False switches the finding off; pages are then free as soon as nobody uses them.
    """

    def __init__(self, num_pages: int, page_size: int, reuse: bool = True) -> None:
        self.num_pages, self.page_size, self.reuse = num_pages, page_size, reuse
        self.users = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest first: memory can grow with need
        self._idle: OrderedDict[int, None] = OrderedDict()  # no users but findable, longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._coming: Counter[bytes] = Counter()  # being computed by some sequence now
        self.numbers = itertools.count()

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones and those kept only in case they serve again."""
        return len(self._free) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold ``tokens`` positions."""
        return -(-tokens // self.page_size)

    def sequence(self, adapter: int = 0) -> PagedSequence:
        """A new sequence without pages; its keys and values are those of the network with this adapter."""
        return PagedSequence(self, next(self.numbers), adapter)

    def take(self) -> int:
        """A page with one user and nothing in it. Raises IndexError when none is available."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self.forget([page])
        else:
            raise IndexError("every page is in use")
        self.users[page] = 1
        return page

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of ``keys``, each with one user more."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self.users[page] += 1
            pages.append(page)
        return pages

    def share(self, page: int, key: bytes) -> None:
        """Let a page in use, all its positions computed, be found. Where two have one key, the first counts."""
        if self.reuse and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Sequence[int]) -> None:
        """Let pages in use not be found any more."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def drop(self, pages: Sequence[int]) -> None:
        """One user less of each of a sequence's pages, given in order."""
        for page in reversed(
            pages
        ):  # a page must not outlive the one before it, without which it isn't found
            self.users[page] -= 1
            if self.users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def announce(self, keys: Sequence[bytes]) -> None:
        """Some sequence is about to compute the pages with these keys."""
        self._coming.update(keys)

    def withdraw(self, keys: Sequence[bytes]) -> None:
        """It has computed them, or will not."""
        for key in keys:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

    def coming(self, keys: Sequence[bytes]) -> bool:
        """Whether enough of the first ``keys`` are being computed that waiting for them is worth it."""
        first = keys[:WORTH_WAITING]
        return len(first) == WORTH_WAITING and all(key in self._coming for key in first)


class PagedSequence:
    """The pages of one sequence, and how much of it is computed.

    number: differs from that of every other sequence of the pool; another one after `close`.
    computed: keys and values of positions before this one are in the pages.
    """

    def __init__(self, pool: PagePool, number: int, adapter: int = 0) -> None:
        self.pool, self.number, self.adapter = pool, number, adapter
        self.pages: list[int] = []
        self.computed = 0
        # What the first page stands behind: other adapters make other keys and values of the same tokens.
        self._root = adapter.to_bytes(8, "little") if adapter else b""
        self._keys: list[bytes] = []  # of the first pages, as far as their tokens were seen
        self._shared = 0  # pages that can be found, by this sequence or by the one that computed them
        self._announced: list[bytes] = []

    def reuse(self, tokens: Sequence[int], most: int) -> None:
        """Take over pages that were computed for the same tokens, up to ``most`` positions.

        Only for a sequence without pages.
        """
        if self.pool.reuse:
            keys = self._keys_of(tokens, most // self.pool.page_size)
            self.pages = self.pool.find(keys)
            self._shared = len(self.pages)
            self.computed = self._shared * self.pool.page_size

    def should_wait(self, tokens: Sequence[int], most: int) -> bool:
        """Whether others are computing pages that could be taken over then (after `reuse`)."""
        if not self.pool.reuse:
            return False
        return self.pool.coming(self._keys_of(tokens, most // self.pool.page_size)[self._shared :])

    def announce(self, tokens: Sequence[int]) -> None:
        """Say that all of ``tokens`` are going to be computed, so that others may wait for it."""
        if self.pool.reuse:
            keys = self._keys_of(tokens, len(tokens) // self.pool.page_size)
            self._announced = keys[self._shared :][::-1]
            self.pool.announce(self._announced)

    def reserve(self, length: int) -> bool:
        """Have pages for ``length`` positions; False, and nothing has changed, when there are too few."""
        missing = self.pool.pages_for(length) - len(self.pages)
        if missing > self.pool.available:
            return False
        self.pages.extend(self.pool.take() for _ in range(missing))
        return True

    def share(self, tokens: Sequence[int]) -> None:
        """Let the pages be found that are computed and full of ``tokens``, which nothing will rewrite."""
        if not self.pool.reuse:
            return
        full = min(self.computed, len(tokens)) // self.pool.page_size
        keys = self._keys_of(tokens, full)
        while self._shared < full:
            key = keys[self._shared]
            self.pool.share(self.pages[self._shared], key)
            self._shared += 1
            if self._announced and self._announced[-1] == key:
                self.pool.withdraw([self._announced.pop()])

    def fork(self, length: int, whole: int) -> PagedSequence | None:
        """A sequence with the same first ``length`` positions and room for ``whole``; None without room.

        Full pages are used by both. One that is partly filled has a counterpart in the new sequence,
        whose contents the caller copies.
        """
        if not self.pool.reuse:
            return None  # pages that only one sequence may use can't be forked
        copy = self.pool.sequence(self.adapter)
        copy.pages = self.pages[: length // self.pool.page_size]
        for page in copy.pages:
            self.pool.users[page] += 1
        if not copy.reserve(whole):
            copy.close()
            return None
        copy.computed = length
        return copy

    def close(self, forget: bool = False) -> None:
        """Give all pages back; ``forget``: what is in them must not be used again.

        The same tokens may begin anew then.
        """
        if forget:
            self.pool.forget(self.pages)
        self.pool.withdraw(self._announced)
        self.pool.drop(self.pages)
        self.number = next(self.pool.numbers)
        self.pages, self.computed = [], 0
        self._announced, self._shared = [], 0

    def _keys_of(self, tokens: Sequence[int], pages: int) -> list[bytes]:
        size = self.pool.page_size
        while len(self._keys) < pages:
            begin = len(self._keys) * size
            before = self._keys[-1] if self._keys else self._root
            self._keys.append(page_key(before, tokens[begin : begin + size]))
        return self._keys[:pages]
