from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.cache import PagePool, page_key


def test_a_key_identifies_all_tokens_from_the_beginning_on() -> None:
    first = page_key(b"", [1, 2])
    assert page_key(b"", [1, 2]) == first != page_key(b"", [2, 1])
    assert page_key(first, [3, 4]) != page_key(b"", [3, 4])
    assert page_key(b"", [1 << 40]) != page_key(b"", [0])


def test_full_computed_pages_are_reused_for_the_same_tokens() -> None:
    pool = PagePool(8, 2)
    sequence = pool.sequence()
    assert sequence.reserve(5) and len(sequence.pages) == 3
    sequence.computed = 3
    sequence.share([1, 2, 3, 4, 5])
    later = pool.sequence()
    later.reuse([1, 2, 3, 4, 5], 4)
    assert (later.pages, later.computed) == (sequence.pages[:1], 2), "the second page is half computed"
    later.close()
    sequence.computed = 5
    sequence.share([1, 2, 3, 4, 5])
    for tokens, limit, pages in (([1, 2, 3, 4], 4, 2), ([1, 2, 3, 4], 3, 1), ([9, 2, 3, 4], 4, 0)):
        later = pool.sequence()
        later.reuse(tokens, limit)
        assert later.pages == sequence.pages[:pages]
        later.close()


def test_the_pages_unused_for_longest_are_dropped_first_and_pages_in_use_never() -> None:
    pool = PagePool(4, 1)
    for token in (1, 2):
        sequence = pool.sequence()
        sequence.reserve(2)
        sequence.computed = 2
        sequence.share([token, 0])
        sequence.close()
    assert pool.available == 4
    user = pool.sequence()
    user.reuse([1, 0], 1)  # the first page of the older one is in use again
    new = pool.sequence()
    assert not new.reserve(4) and new.pages == [] and pool.available == 3
    assert new.reserve(2)
    assert not set(new.pages) & set(user.pages)
    for tokens, count in (([1, 0], 1), ([2, 0], 1)):  # the last page of each is dropped
        later = pool.sequence()
        later.reuse(tokens, 2)
        assert len(later.pages) == count
        later.close()
    with pytest.raises(IndexError, match="in use"):
        for _ in range(4):
            pool.take()


def test_waiting_for_pages_that_another_sequence_computes() -> None:
    pool = PagePool(16, 2)
    tokens = list(range(9))
    sequence = pool.sequence()
    sequence.reserve(9)
    sequence.announce(tokens)
    later = pool.sequence()
    assert later.should_wait(tokens, 8) and not later.should_wait(tokens, 2)
    assert not pool.sequence().should_wait([0, 1, 2, 9], 4), "one page is not worth waiting for"
    sequence.computed = 8
    sequence.share(tokens)
    later.reuse(tokens, 8)
    assert later.computed == 8 and not later.should_wait(tokens, 8)
    sequence.close()
    third = pool.sequence()
    third.reserve(6)
    third.announce([5, 6, 7, 8, 9, 10])
    third.close()
    assert not pool.sequence().should_wait([5, 6, 7, 8, 9, 10], 6), (
        "no sequence computes these pages any more"
    )


def test_a_fork_shares_full_pages_and_has_its_own_for_the_rest() -> None:
    pool = PagePool(5, 2)
    sequence = pool.sequence()
    sequence.reserve(3)
    fork = sequence.fork(3, 5)
    assert fork is not None and fork.pages[0] == sequence.pages[0]
    assert len({*fork.pages, *sequence.pages}) == 4 and pool.users[sequence.pages[0]] == 2
    assert sequence.fork(3, 6) is None and pool.available == 1 and pool.users[sequence.pages[0]] == 2
    sequence.close()
    fork.close()
    assert pool.available == 5 and not any(pool.users)


def test_forgotten_pages_are_not_reused() -> None:
    pool = PagePool(4, 2)
    sequence = pool.sequence()
    sequence.reserve(4)
    sequence.computed = 4
    sequence.share([1, 2, 3, 4])
    sequence.close(forget=True)
    later = pool.sequence()
    later.reuse([1, 2, 3, 4], 4)
    assert later.pages == []


actions = st.tuples(st.sampled_from(["begin", "grow", "close"]), st.integers(0, 5), st.integers(1, 9))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(actions, max_size=40), st.booleans())
def test_pages_are_never_lost_nor_used_twice(steps: list[tuple[str, int, int]], reuse: bool) -> None:
    pool = PagePool(6, 2, reuse)
    owned = {}
    tokens = {number: [number // 2] * 6 + [number] * 20 for number in range(6)}  # pairs share 3 pages
    for action, number, size in steps:
        if action == "begin" and number not in owned:
            owned[number] = pool.sequence()
            owned[number].reuse(tokens[number], 8)
            owned[number].announce(tokens[number][:8])
        elif action == "grow" and number in owned:
            sequence = owned[number]
            if sequence.reserve(sequence.computed + size):
                sequence.computed += size
                sequence.share(tokens[number])
        elif action == "close" and number in owned:
            owned.pop(number).close()
        counts = [sum(page in sequence.pages for sequence in owned.values()) for page in range(6)]
        assert counts == pool.users
        assert pool.available == counts.count(0)
    for sequence in owned.values():
        sequence.close()
    assert pool.available == 6 and not any(pool.users) and not pool._coming
