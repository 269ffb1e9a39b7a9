"""Batches are a pure function of seed and step, and contain every example."""

from hypothesis import given
from hypothesis import strategies as st

from tercet.data.batches import IGNORED, PADDING, Encoded, items_at, micro_batches, padded


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5))
def test_each_item_comes_once_an_epoch(count: int, per_step: int, seed: int) -> None:
    steps = count * 2  # enough for 2 * per_step epochs
    seen = [item for step in range(steps) for item in items_at(step, per_step, count, seed)]
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))


def test_epochs_have_different_orders() -> None:
    assert items_at(0, 50, 50, 0) != items_at(1, 50, 50, 0) != list(range(50))


def test_targets_are_the_next_tokens_and_padding_hides_no_stop_token() -> None:
    stop = PADDING
    a = Encoded.of((1, 2, 3, stop), (False, False, True, True))
    b = Encoded.of((4, 5), (True, True))
    tokens, targets = padded([a, b])
    assert tokens.tolist() == [[1, 2, 3], [4, PADDING, PADDING]]
    assert targets.tolist() == [[IGNORED, 3, stop], [5, IGNORED, IGNORED]]
    assert a.count == 2 and b.count == 1  # nothing predicts the first token


def test_an_example_takes_five_bytes_a_token_also_after_truncation() -> None:
    example = Encoded.of(range(1000), [True] * 1000)
    assert (example.ids.nbytes, example.supervised.nbytes) == (4000, 1000)
    short = example.truncated(10)
    assert short.ids.tolist() == list(range(10)) and short.count == 9
    assert short.ids.base is None and short.supervised.base is None


@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(8, 64))
def test_pieces_hold_every_example_within_the_budget(lengths: list[int], budget: int) -> None:
    examples = [Encoded.of(tuple(range(100 * i, 100 * i + n)), (True,) * n) for i, n in enumerate(lengths)]
    pieces = micro_batches(examples, budget)
    assert all(len(tokens) == 1 or tokens.shape[0] * (tokens.shape[1] + 1) <= budget for tokens, _ in pieces)
    targets = sorted(int(t) for _, piece in pieces for t in piece.ravel() if t != IGNORED)
    assert targets == sorted(token for example in examples for token in example.ids[1:])
