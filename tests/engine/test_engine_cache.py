from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.cache import PagePool, page_key


def test_a_key_says_all_tokens_from_the_beginning_on() -> None:
    first = page_key(b"", [1, 2])
    assert page_key(b"", [1, 2]) == first != page_key(b"", [2, 1])
    assert page_key(first, [3, 4]) != page_key(b"", [3, 4])
    assert page_key(b"", [1 << 40]) != page_key(b"", [0])


def test_pages_are_found_by_their_tokens_once_they_are_full_and_computed() -> None:
    pool = PagePool(8, 2)
    one = pool.sequence()
    assert one.reserve(5) and len(one.pages) == 3
    one.computed = 3
    one.share([1, 2, 3, 4, 5])
    other = pool.sequence()
    other.reuse([1, 2, 3, 4, 5], 4)
    assert (other.pages, other.computed) == (one.pages[:1], 2), "the second page is half computed"
    other.close()
    one.computed = 5
    one.share([1, 2, 3, 4, 5])
    for tokens, most, pages in (([1, 2, 3, 4], 4, 2), ([1, 2, 3, 4], 3, 1), ([9, 2, 3, 4], 4, 0)):
        other = pool.sequence()
        other.reuse(tokens, most)
        assert other.pages == one.pages[:pages]
        other.close()


def test_the_pages_unused_for_longest_go_first_and_those_in_use_never() -> None:
    pool = PagePool(4, 1)
    for token in (1, 2):
        one = pool.sequence()
        one.reserve(2)
        one.computed = 2
        one.share([token, 0])
        one.close()
    assert pool.available == 4
    user = pool.sequence()
    user.reuse([1, 0], 1)  # the first page of the older one is in use again
    new = pool.sequence()
    assert not new.reserve(4) and new.pages == [] and pool.available == 3
    assert new.reserve(2)
    assert not set(new.pages) & set(user.pages)
    for tokens, found in (([1, 0], 1), ([2, 0], 1)):  # the last pages of both are gone, the deepest first
        other = pool.sequence()
        other.reuse(tokens, 2)
        assert len(other.pages) == found
        other.close()
    with pytest.raises(IndexError, match="in use"):
        for _ in range(4):
            pool.take()


def test_who_computes_the_same_is_waited_for_if_it_is_worth_it() -> None:
    pool = PagePool(16, 2)
    tokens = list(range(9))
    one = pool.sequence()
    one.reserve(9)
    one.announce(tokens)
    other = pool.sequence()
    assert other.should_wait(tokens, 8) and not other.should_wait(tokens, 2)
    assert not pool.sequence().should_wait([0, 1, 2, 9], 4), "one page is not worth a turn"
    one.computed = 8
    one.share(tokens)
    other.reuse(tokens, 8)
    assert other.computed == 8 and not other.should_wait(tokens, 8)
    one.close()
    third = pool.sequence()
    third.reserve(6)
    third.announce([5, 6, 7, 8, 9, 10])
    third.close()
    assert not pool.sequence().should_wait([5, 6, 7, 8, 9, 10], 6), "it will not come any more"


def test_a_fork_uses_full_pages_and_has_its_own_for_the_rest() -> None:
    pool = PagePool(5, 2)
    one = pool.sequence()
    one.reserve(3)
    fork = one.fork(3, 5)
    assert fork is not None and fork.pages[0] == one.pages[0]
    assert len({*fork.pages, *one.pages}) == 4 and pool.users[one.pages[0]] == 2
    assert one.fork(3, 6) is None and pool.available == 1 and pool.users[one.pages[0]] == 2
    one.close()
    fork.close()
    assert pool.available == 5 and not any(pool.users)


def test_what_must_not_be_used_again_is_not_found() -> None:
    pool = PagePool(4, 2)
    one = pool.sequence()
    one.reserve(4)
    one.computed = 4
    one.share([1, 2, 3, 4])
    one.close(forget=True)
    other = pool.sequence()
    other.reuse([1, 2, 3, 4], 4)
    assert other.pages == []


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
            one = owned[number]
            if one.reserve(one.computed + size):
                one.computed += size
                one.share(tokens[number])
        elif action == "close" and number in owned:
            owned.pop(number).close()
        counts = [sum(page in one.pages for one in owned.values()) for page in range(6)]
        assert counts == pool.users
        assert pool.available == counts.count(0)
    for one in owned.values():
        one.close()
    assert pool.available == 6 and not any(pool.users) and not pool._coming
