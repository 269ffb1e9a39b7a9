"""The pages of keys and values: which sequence uses which, and which of them a later sequence can reuse.

A full page is looked up by what was computed into it: its key is a hash of its tokens and of the key of
the page before it, so equal keys mean equal tokens from the beginning of the sequence on (and the same
adapter). A system prompt, a few-shot header or the earlier turns of a conversation are therefore
computed once, whichever request uses them next. A page without users stays in this prefix cache until
its room is needed; the page unused for longest is dropped first.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

WORTH_WAITING = 2  # pages; for fewer, waiting for another sequence to compute them costs more than it saves


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a full page behind the page with key ``before`` (empty for the first)."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Hands out the pages of one backend, counts their users and looks them up by their keys.

    Args:
        num_pages: as in `Backend`.
        page_size: as in `Backend`.
        reuse: whether full pages can be looked up. If False, a page is free as soon as it has no user.
    """

    def __init__(self, num_pages: int, page_size: int, reuse: bool = True) -> None:
        self.num_pages, self.page_size, self.reuse = num_pages, page_size, reuse
        self.users = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest first: memory can grow with need
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # without users but with a key, longest unused first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._coming: Counter[bytes] = Counter()  # keys of pages that sequences are computing now
        self.numbers = itertools.count()

    @property
    def available(self) -> int:
        """The number of pages that `take` can return: free ones, and cached ones without users."""
        return len(self._free) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that ``tokens`` positions require."""
        return -(-tokens // self.page_size)

    def sequence(self, adapter: int = 0) -> PagedSequence:
        """Return a new sequence without pages, computed by the network with this adapter."""
        return PagedSequence(self, next(self.numbers), adapter)

    def take(self) -> int:
        """Return an empty page with one user. Raise IndexError when none is available."""
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
        """Return the pages of the longest cached beginning of ``keys``, and add a user to each."""
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
        """Add a page in use, with all positions computed, to the cache. Of two with one key the first counts."""
        if self.reuse and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Sequence[int]) -> None:
        """Remove pages in use from the cache."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def drop(self, pages: Sequence[int]) -> None:
        """Remove one user from each of a sequence's pages, given in order."""
        # The last page first: without the page before it, a page can't be looked up and must not outlive it.
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def announce(self, keys: Sequence[bytes]) -> None:
        """Note that a sequence is going to compute the pages with these keys."""
        self._coming.update(keys)

    def withdraw(self, keys: Sequence[bytes]) -> None:
        """Note that the sequence has computed these pages, or will not."""
        for key in keys:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

    def coming(self, keys: Sequence[bytes]) -> bool:
        """Return whether enough of the first ``keys`` are being computed to make waiting worthwhile."""
        first = keys[:WORTH_WAITING]
        return len(first) == WORTH_WAITING and all(key in self._coming for key in first)


class PagedSequence:
    """The pages of one sequence, and how many of its positions are computed.

    Attributes:
        pool: hands out the pages.
        number: differs from that of every other sequence of the pool; `close` changes it.
        adapter: as in `Chunk`.
        pages: in the order of their positions.
        computed: the number of positions whose keys and values are in the pages.
    """

    def __init__(self, pool: PagePool, number: int, adapter: int = 0) -> None:
        self.pool, self.number, self.adapter = pool, number, adapter
        self.pages: list[int] = []
        self.computed = 0
        # The key before the first page: another adapter computes other keys and values for the same tokens.
        self._root = adapter.to_bytes(8, "little") if adapter else b""
        self._keys: list[bytes] = []  # of the first pages, as far as they were requested
        self._shared = 0  # the number of first pages that are in the cache
        self._announced: list[bytes] = []

    def reuse(self, tokens: Sequence[int], limit: int) -> None:
        """Take cached pages that were computed for the same tokens, up to ``limit`` positions.

        Only for a sequence without pages.
        """
        if self.pool.reuse:
            keys = self._keys_of(tokens, limit // self.pool.page_size)
            self.pages = self.pool.find(keys)
            self._shared = len(self.pages)
            self.computed = self._shared * self.pool.page_size

    def should_wait(self, tokens: Sequence[int], limit: int) -> bool:
        """Return whether other sequences are computing pages that this one could reuse. Call `reuse` first."""
        if not self.pool.reuse:
            return False
        return self.pool.coming(self._keys_of(tokens, limit // self.pool.page_size)[self._shared :])

    def announce(self, tokens: Sequence[int]) -> None:
        """Note that all of ``tokens`` are going to be computed, so that other sequences can wait for them."""
        if self.pool.reuse:
            keys = self._keys_of(tokens, len(tokens) // self.pool.page_size)
            self._announced = keys[self._shared :][::-1]
            self.pool.announce(self._announced)

    def reserve(self, length: int) -> bool:
        """Take pages for ``length`` positions. Return False, and take none, when too few are available."""
        missing = self.pool.pages_for(length) - len(self.pages)
        if missing > self.pool.available:
            return False
        self.pages.extend(self.pool.take() for _ in range(missing))
        return True

    def share(self, tokens: Sequence[int]) -> None:
        """Add the pages that are full of computed ``tokens`` to the cache; they must not be rewritten."""
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

    def fork(self, length: int, capacity: int) -> PagedSequence | None:
        """Return a sequence with the same first ``length`` positions and room for ``capacity`` positions.

        Both sequences use the full pages. A page that is partly filled has a counterpart in the new
        sequence, into which the caller copies its contents. Return None when there is no room.
        """
        if not self.pool.reuse:
            return None  # pages that only one sequence may use can't be forked
        copy = self.pool.sequence(self.adapter)
        copy.pages = self.pages[: length // self.pool.page_size]
        for page in copy.pages:
            self.pool.users[page] += 1
        if not copy.reserve(capacity):
            copy.close()
            return None
        copy.computed = length
        return copy

    def close(self, forget: bool = False) -> None:
        """Return all pages to the pool; with ``forget``, no sequence may reuse their contents.

        The sequence is then empty, and the same tokens can be computed anew.
        """
        if forget:
            self.pool.forget(self.pages)
        self.pool.withdraw(self._announced)
        self.pool.drop(self.pages)
        self.number = next(self.pool.numbers)
        self.pages, self.computed = [], 0
        self._announced, self._shared = [], 0

    def _keys_of(self, tokens: Sequence[int], pages: int) -> list[bytes]:
        """Return the keys of the first pages, which are full of ``tokens``."""
        size = self.pool.page_size
        while len(self._keys) < pages:
            begin = len(self._keys) * size
            before = self._keys[-1] if self._keys else self._root
            self._keys.append(page_key(before, tokens[begin : begin + size]))
        return self._keys[:pages]
