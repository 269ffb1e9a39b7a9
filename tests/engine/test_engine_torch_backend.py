"""Pages, passes and padding against plain forward passes of the same network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.backend import Chunk, split_calls
from tercet.engine.engine import Engine
from tercet.engine.torch_backend import TorchBackend
from tercet.model.config import RopeScaling

Make = Callable[..., Engine]


def backend_of(engine: Engine) -> TorchBackend:
    assert isinstance(engine.backend, TorchBackend)
    return engine.backend


def by_hand(backend: TorchBackend, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = backend.model(torch.tensor([tokens]))[0].numpy()
    return logits


@st.composite
def feeds(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Calls of (sequence, start, count): every sequence is continued, or rewound first."""
    lengths = [0] * 4
    calls = []
    for _ in range(draw(st.integers(1, 6))):
        call = []
        for sequence in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)):
            # At most the last of the hundred positions, because a chunk has at least one token.
            start = min(99, draw(st.sampled_from([lengths[sequence], lengths[sequence] * 2 // 3])))
            count = draw(st.sampled_from([1, 1, 2, 5, 17, 40]))
            call.append((sequence, start, min(count, 100 - start)))
            lengths[sequence] = start + call[-1][2]
        calls.append(call)
    return calls


@pytest.mark.parametrize(
    "changes", [{}, {"windows": (5, None)}, {"positions": "learned", "qk_norm": False}, {"num_kv_heads": 4}]
)
@settings(derandomize=True, max_examples=25, deadline=None)
@given(feeds(), st.randoms(use_true_random=False))
def test_any_chunks_give_the_logits_of_a_plain_forward_pass(
    make_engine: Make, changes: dict[str, Any], calls: list[list[tuple[int, int, int]]], random: Any
) -> None:
    backend = backend_of(make_engine(room=500, **changes))
    backend._gathered_tokens = random.choice([50, 10_000])
    order = random.sample(range(backend.num_pages), backend.num_pages)
    pages = [order[25 * n : 25 * n + 25] for n in range(4)]
    tokens: list[list[int]] = [[] for _ in range(4)]
    for call in calls:
        chunks, expected = [], []
        for sequence, start, count in call:
            new = [random.randrange(300) for _ in range(count)]
            tokens[sequence][start:] = new
            places = sorted(random.sample(range(count), random.randint(0, min(3, count))))
            needed = -(-(start + count) // 4) + random.randint(
                0, 1
            )  # one page more than necessary is allowed
            chunks.append(Chunk(sequence, new, start, pages[sequence][:needed], places))
            expected += [by_hand(backend, tokens[sequence])[start + place] for place in places]
        targets = [[random.randrange(300) for _ in range(random.randint(0, 2))] for _ in expected]
        logits = backend.feed(chunks)
        assert logits.shape == (len(expected), 300) and logits.dtype == np.float32
        for row, reference, row_targets in zip(logits, expected, targets, strict=True):
            np.testing.assert_allclose(row, reference, atol=2e-5)
            row_targets.append(int(reference.argmax()))
        logprobs, likeliest = backend.logprobs(chunks, targets)  # the same chunks again overwrite themselves
        reference = [
            (float(torch.log_softmax(torch.from_numpy(row), -1)[token]), token == int(row.argmax()))
            for row, row_targets in zip(expected, targets, strict=True)
            for token in row_targets
        ]
        np.testing.assert_allclose(logprobs, [value for value, _ in reference], atol=2e-5)
        assert likeliest.tolist() == [best for _, best in reference]


def test_earlier_contents_of_a_page_do_not_matter(make_engine: Make) -> None:
    """Even where they are not finite, which masking alone would not hide."""
    backend = backend_of(make_engine(room=64))
    tokens = list(range(5, 22))
    expected = by_hand(backend, tokens)
    backend.feed([Chunk(0, [1] * 64, 0, range(16), [])])
    with torch.inference_mode():
        for layer in (*backend._pages.keys, *backend._pages.values):
            layer.fill_(float("nan"))
    for start, end in ((0, 6), (6, 7), (7, 17)):
        chunk = Chunk(1, tokens[start:end], start, [7, 3, 9, 1, 4], [end - start - 1])
        np.testing.assert_allclose(backend.feed([chunk])[0], expected[end - 1], atol=2e-5)


def test_copied_pages_have_the_same_contents(make_engine: Make) -> None:
    backend = backend_of(make_engine())
    tokens = list(range(5, 16))
    expected = by_hand(backend, tokens)
    backend.feed([Chunk(0, tokens[:10], 0, [0, 1, 2], [])])
    backend.copy_pages([(2, 200), (1, 90)])
    for pages in ([0, 1, 200], [0, 90, 200]):
        np.testing.assert_allclose(
            backend.feed([Chunk(1, tokens[10:], 10, pages, [0])])[0], expected[10], atol=2e-5
        )
    backend.release(1)


def test_memory_grows_when_required_up_to_the_budget(make_engine: Make) -> None:
    backend = backend_of(make_engine(room=2000))
    assert backend.num_pages == 500 and backend._pages.count == 0
    backend.feed([Chunk(0, [5, 6], 0, [3], [])])
    assert backend._pages.count == 64
    backend.feed([Chunk(1, [5, 6], 0, [499], [])])
    assert backend._pages.count == 500
    assert backend.feed([Chunk(0, [7], 2, [3], [0])])[0] == pytest.approx(
        by_hand(backend, [5, 6, 7])[2], abs=2e-5
    )


def test_passes_pad_little_and_keep_their_bounds(make_engine: Make) -> None:
    backend = backend_of(make_engine())

    def passes(*sizes: tuple[int, int]) -> list[list[int]]:
        chunks = [Chunk(n, [5] * count, start, range(32), []) for n, (start, count) in enumerate(sizes)]
        return list(backend._passes(chunks))

    assert passes((10, 1), (20, 1), (0, 100), (5, 1)) == [[0, 1, 3], [2]]
    assert passes((10, 1), (20, 5), (0, 9)) == [[0, 1, 2]], "a few padded tokens cost less than a pass"
    backend._gathered_tokens = 64
    assert passes((30, 1), (30, 1), (30, 1), (100, 1)) == [[0, 1], [2], [3]]


def test_scaled_positions_do_not_depend_on_other_sequences(make_engine: Make) -> None:
    """Dynamic scaling takes its frequencies from the length of the pass, which must be that of the row."""
    scaling = RopeScaling("dynamic", 4.0, 16)
    backend = backend_of(make_engine(rope_scaling=scaling))
    rows = [[5] * 10, [6] * 40, [7] * 60]
    chunks = [Chunk(n, row, 0, range(16 * n, 16 * n + 16), [len(row) - 1]) for n, row in enumerate(rows)]
    for logits, row in zip(backend.feed(chunks), rows, strict=True):
        np.testing.assert_allclose(logits, by_hand(backend, row)[-1], atol=2e-5)


def test_long_chunks_are_cut_to_calls_in_order() -> None:
    class Bounds:
        max_tokens, max_chunks = 5, 2

    chunks = [
        Chunk(0, [1, 2], 0, [0], [1]),
        Chunk(1, list(range(9)), 3, [1], [0, 2, 8]),
        Chunk(2, [7], 0, [2], []),
        Chunk(3, [8], 0, [3], [0]),
    ]
    calls = list(split_calls(Bounds(), chunks))  # type: ignore[arg-type]
    assert [[(chunk.sequence, chunk.start, len(chunk.tokens)) for chunk in call] for call in calls] == [
        [(0, 0, 2), (1, 3, 3)],
        [(1, 6, 5)],
        [(1, 11, 1), (2, 0, 1)],
        [(3, 0, 1)],
    ]
    assert [[list(chunk.outputs) for chunk in call] for call in calls] == [
        [[1], [0, 2]],
        [[]],
        [[0], []],
        [[0]],
    ]
