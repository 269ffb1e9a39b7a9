"""Every token is predicted once, pieces do not cross documents, and there is little padding."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.batches import IGNORED
from tercet.data.packing import WASTE, batch, best_fit, pack
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer

END = 0


def stream_of(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Return a stream of distinct tokens (0 ends a document) and the starts of its documents."""
    numbers = itertools.count(1)
    tokens, starts = [END], []
    for length in lengths:
        starts.append(len(tokens))
        tokens += [*itertools.islice(numbers, length), END]
    return np.array(tokens, np.uint32), np.array([*starts, len(tokens)])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 24))
@settings(max_examples=200, deadline=None)
def test_every_token_is_predicted_once_from_its_own_document(lengths: list[int], width: int) -> None:
    stream, starts = stream_of(lengths)
    packing = pack(starts, width)
    tokens, targets, positions, segments = batch(stream, packing, list(range(packing.rows)))
    seen = []
    document = np.repeat(np.arange(len(lengths)), np.array(lengths) + 1)  # of each predicted token
    document_of = {int(token): int(document[place]) for place, token in enumerate(stream[1:]) if token}
    for row, column in zip(*np.nonzero(targets != IGNORED), strict=True):
        token, target = int(tokens[row, column]), int(targets[row, column])
        seen.append(target)
        if token and target:
            assert target == token + 1, "the target is the token that follows the input"
        if positions is not None and segments is not None and column:
            same = segments[row, column] == segments[row, column - 1]
            assert positions[row, column] == (positions[row, column - 1] + 1 if same else 0)
            before = int(tokens[row, column - 1])
            if same and before and token:
                assert document_of[before] == document_of[token]
    assert sorted(seen) == sorted(int(token) for token in stream[1:])
    if segments is not None:
        for row in range(len(tokens)):
            for segment in set(segments[row].tolist()):
                real = {bool(value) for value in targets[row][segments[row] == segment] != IGNORED}
                assert len(real) == 1, "padding shares no segment with text"


def brute_force(lengths: list[int], width: int) -> int:
    """Return how many rows best-fit decreasing opens if it places a single piece at a time."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(width - length)
    return len(room)


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 30))
@settings(max_examples=200, deadline=None)
def test_best_fit_opens_as_many_rows_as_placing_single_pieces(lengths: list[int], width: int) -> None:
    rows = best_fit(np.array(lengths, np.int64), width)
    assert len(set(rows.tolist())) == brute_force(lengths, width)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert (filled <= width).all()


@pytest.mark.parametrize("mean", [30, 200, 700, 3000])
@pytest.mark.parametrize("width", [256, 512])
def test_there_is_little_padding(mean: int, width: int) -> None:
    rng = np.random.default_rng(mean)
    lengths = np.maximum(1, rng.lognormal(np.log(mean), 0.9, 3000)).astype(int)
    packing = pack(np.concatenate(([1], 1 + np.cumsum(lengths + 1))), width)
    assert packing.waste <= WASTE
    assert packing.lengths.sum() == lengths.sum() + len(lengths)


def test_pieces_are_cut_to_fill_rows_that_no_piece_fits() -> None:
    lengths = np.full(100, 60)  # 61 predictions each: one per row of 100 would waste a third
    packing = pack(np.concatenate(([1], 1 + np.cumsum(lengths + 1))), 100)
    assert packing.rows == 61 and packing.waste == 0


def test_two_million_pieces_take_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, 2_000_000)
    begun = time.process_time()
    rows = best_fit(lengths, 512)
    assert time.process_time() - begun < 6
    assert np.bincount(rows, weights=lengths).max() <= 512


def test_a_packed_row_gives_the_logits_of_its_separate_documents() -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            family="qwen3", vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
            num_kv_heads=1, head_dim=16, max_positions=32, qk_norm="head", tie_embeddings=True,
        )
    ).eval()  # fmt: skip
    stream, starts = stream_of([5, 9, 3])
    packing = pack(starts, 24)
    assert packing.rows == 1
    tokens, _, positions, segments = batch(stream, packing, [0])
    assert positions is not None and segments is not None
    with torch.no_grad():
        together = model(*(torch.from_numpy(array) for array in (tokens, positions, segments)))[0]
        for piece in range(3):
            begin, length = int(packing.begins[piece]), int(packing.lengths[piece])
            alone = model(torch.from_numpy(stream[begin : begin + length].astype(np.int64))[None])[0]
            torch.testing.assert_close(together[segments[0] == piece], alone, atol=1e-5, rtol=0)


def test_a_batch_of_single_pieces_needs_no_mask() -> None:
    stream, starts = stream_of([40])
    packing = pack(starts, 20)
    assert packing.rows == 3
    tokens, targets, positions, segments = batch(stream, packing, [0, 1, 2])
    assert positions is None and segments is None
    assert (tokens[1, 0], targets[0, -1]) == (20, 20), "a cut loses no prediction"
    assert (targets[2, 1:] == IGNORED).all()
