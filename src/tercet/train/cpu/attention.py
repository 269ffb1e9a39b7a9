"""Causal attention within documents, forward and backward, in two ways.

`PlainAttention` uses PyTorch's products, for a range of queries at a time, so that few scores of invisible keys
are computed.

`PairedAttention` multiplies pairs of bfloat16 (`products.py`), four rows of queries at a time. Their scores
stay in the cache, in float32, until they become weights, and keys that none of the four sees are skipped. The
backward pass computes the queries' gradients four rows at a time as well, and sums the gradients of keys and
values over `TOGETHER` rows at a time.

Both keep the attention weights for the backward pass. The G queries of a key head at one position are adjacent:
row r is at position r // G.

Shapes: q, out [B K, T G, D]; k, v [B K, T, D]; begins [B, T], the first position that each token sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.simd import F32, I64, LANES, VECTOR, Vectors, kernel
from tercet.train.cpu import kernels
from tercet.train.cpu.compiling import addressing
from tercet.train.cpu.kernels import get, put
from tercet.train.cpu.products import (
    PANEL,
    ROWS,
    VECTORS,
    PairedProducts,
    Products,
    exact_tile,
    gradient,
    pair_columns,
    pair_rows,
    raw,
    tile,
)

QUERIES = 128  # positions whose scores PyTorch computes together: the fastest of 64 to 512 at 512 tokens
UNSEEN = np.float32(-3e38)  # the score of a key that a query does not see: its weight is exactly 0
TOGETHER = 128  # rows whose gradients for keys and values are added together


class Read(NamedTuple):
    """The inputs of attention, forward and backward; shapes as above."""

    begins: NDArray[np.int64]
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def groups(self) -> int:
        """Number of query heads for each key head."""
        return self.q.shape[1] // self.k.shape[1]


class Attention(Protocol):
    """An implementation of attention."""

    def forward(self, read: Read) -> tuple[Tensor, Any]:
        """Return the output, and the state that `backward` needs."""

    def backward(self, read: Read, out: Tensor, state: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q (in the activations' type), k and v (float32)."""


def attention_for(products: Products) -> Attention:
    """Return the attention that uses the same instructions as ``products``."""
    return PairedAttention() if isinstance(products, PairedProducts) else PlainAttention()


def _along(out: Tensor, d_out: Tensor) -> NDArray[np.float32]:
    """Return [B K, T G]: for each row, the sum of weights times their gradients (Dao et al. 2022, arXiv:2205.14135)."""
    along = np.empty(out.shape[:2], np.float32)
    kernels.row_products(raw(out), raw(d_out), along)
    return along


class PlainAttention:
    """Attention by PyTorch's products."""

    def forward(self, read: Read) -> tuple[Tensor, Any]:
        """Return the output, and the weights of each range of queries."""
        begins, q, k, v = read
        groups, out = read.groups, torch.empty_like(q)
        all_weights = []
        for first, end, start in _ranges(begins):
            scores = q[:, first * groups : end * groups] @ k[:, start:end].transpose(1, 2)
            kernels.softmax(raw(scores), begins, groups, first, start)
            out[:, first * groups : end * groups] = scores @ v[:, start:end]
            all_weights.append(scores)
        return out, all_weights

    def backward(self, read: Read, out: Tensor, state: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v; ``state``: the weights of each range."""
        begins, q, k, v = read
        groups, d_q = read.groups, torch.empty_like(q)
        d_k, d_v = (torch.zeros(k.shape) for _ in range(2))
        along = _along(out, d_out)
        for (first, end, start), weights in zip(_ranges(begins), state, strict=True):
            rows = slice(first * groups, end * groups)
            d_v[:, start:end] += weights.transpose(1, 2) @ d_out[:, rows]
            d_scores = d_out[:, rows] @ v[:, start:end].transpose(1, 2)
            kernels.softmax_backward(raw(weights), raw(d_scores), along, first * groups)
            d_q[:, rows] = d_scores @ k[:, start:end]
            d_k[:, start:end] += d_scores.transpose(1, 2) @ q[:, rows]
        return d_q, d_k, d_v


def _ranges(begins: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return triples (first, end, start): in all rows, queries first..end-1 see no keys outside start..end-1."""
    time = begins.shape[1]
    return [
        (first, min(first + QUERIES, time), int(begins[:, first].min())) for first in range(0, time, QUERIES)
    ]


class PairedAttention:
    """Attention by products of pairs of bfloat16."""

    def forward(self, read: Read) -> tuple[Tensor, Any]:
        """Return the output, and the weights [B K, T G, columns(T)]."""
        begins, q, k, v = read
        out, weights = torch.empty_like(q), q.new_empty(*q.shape[:2], columns(k.shape[1]))
        attend(raw(q), raw(k), raw(v), begins, read.groups, raw(weights), raw(out))
        return out, weights

    def backward(self, read: Read, out: Tensor, state: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v; ``state``: the weights, which are overwritten where unseen."""
        begins, q, k, v = read
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros(k.shape) for _ in range(2))
        attend_backward(
            raw(q),
            raw(k),
            raw(v),
            begins,
            read.groups,
            raw(state),
            _along(out, d_out),
            raw(d_out),
            raw(d_q),
            d_k.numpy(),
            d_v.numpy(),
        )
        return d_q, d_k, d_v


@kernel(3)
def _softmax(v: Vectors, scores: Any, panels: Any, weights: Any) -> None:
    """Emit weights (bfloat16) = softmax of ``panels`` panels of float32 scores, which are overwritten."""
    b = v.b
    largest = [v.variable(VECTOR, v.constant(-3e38)) for _ in range(VECTORS)]
    totals = [v.variable(VECTOR, v.constant(0.0)) for _ in range(VECTORS)]
    with v.loop(panels) as panel:
        for i in range(VECTORS):
            at = v.address(scores, b.add(b.mul(panel, I64(4 * PANEL)), I64(64 * i)))
            b.store(v.largest(v.floats(at), b.load(largest[i])), largest[i])
    highest = b.load(largest[0])
    for variable in largest[1:]:
        highest = v.largest(b.load(variable), highest)
    shift = v.splat(v.maximum(highest))
    with v.loop(panels) as panel:
        for i in range(VECTORS):
            at = v.address(scores, b.add(b.mul(panel, I64(4 * PANEL)), I64(64 * i)))
            power = v.exp(b.fsub(v.floats(at), shift))
            v.store(power, at, 4)
            b.store(b.fadd(b.load(totals[i]), power), totals[i])
    total = b.load(totals[0])
    for variable in totals[1:]:
        total = b.fadd(total, b.load(variable))
    share = v.splat(b.fdiv(F32(1.0), v.total(total)))
    with v.loop(panels) as panel:
        for i in range(VECTORS):
            place = b.add(b.mul(panel, I64(PANEL)), I64(LANES * i))
            value = b.fmul(v.floats(v.address(scores, b.mul(place, I64(4)))), share)
            v.store(v.narrow(value), v.address(weights, b.mul(place, I64(2))), 2)


def columns(positions: int) -> int:
    """Return the length in memory of a row of weights: whole panels."""
    return -(-positions // PANEL) * PANEL


@addressing
def attend(q, k, v, begins, groups, weights, out):
    """Compute weights [B K, T G, columns(T)] = softmax of q times k, and out = weights times v; all bfloat16.

    In a row of weights only those panels are written that some row of the same tile sees.
    """
    heads, rows, dim = q.shape
    positions, per_row = k.shape[1], heads // len(begins)
    keys = np.zeros((weights.shape[2] // PANEL, dim // 2, PANEL), np.uint32)
    values = np.empty(((dim + PANEL - 1) // PANEL, (positions + 1) // 2, PANEL), np.uint32)
    scores = np.empty((ROWS, weights.shape[2]), np.float32)
    rest = np.empty((ROWS, PANEL), np.float32)
    for head in range(heads):
        begin = begins[head // per_row]
        pair_columns(k[head], keys, 0)
        pair_rows(v[head], values, 0)
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            low = begin[row // groups] // PANEL  # documents are in order: later queries see no earlier keys
            high = ((row + count - 1) // groups) // PANEL + 1
            queries, row_weights = q[head, row : row + count], weights[head, row : row + count]
            for panel in range(low, high):
                exact_tile(
                    queries.ctypes.data, queries.strides[0], keys[panel].ctypes.data, dim // 2,
                    scores.ctypes.data + 4 * panel * PANEL, scores.strides[0], count, PANEL,
                )  # fmt: skip
            for i in range(count):
                position = (row + i) // groups
                scores[i, low * PANEL : begin[position]] = UNSEEN
                scores[i, position + 1 : high * PANEL] = UNSEEN
                start = 4 * low * PANEL
                _softmax(scores[i].ctypes.data + start, high - low, row_weights[i].ctypes.data + start // 2)
            seen = min(high * PANEL, positions + 1) - low * PANEL  # an odd last key is paired with a zero
            for panel in range(len(values)):
                tile(
                    row_weights.ctypes.data + 2 * low * PANEL, row_weights.strides[0],
                    values[panel, low * PANEL // 2 :].ctypes.data, seen // 2,
                    out[head, row : row + count], panel * PANEL, rest,
                )  # fmt: skip


@addressing
def attend_backward(q, k, v, begins, groups, weights, along, d_out, d_q, d_k, d_v):
    """Compute the gradients of `attend`: d_q (bfloat16) is set, d_k and d_v (float32) are added to.

    ``along`` [B K, T G] is `kernels.row_products` of out and d_out: for each row the sum of weights times their
    gradients.
    """
    heads, rows, dim = q.shape
    positions, per_row = k.shape[1], heads // len(begins)
    values = np.zeros((weights.shape[2] // PANEL, dim // 2, PANEL), np.uint32)
    keys = np.empty(((dim + PANEL - 1) // PANEL, (positions + 1) // 2, PANEL), np.uint32)
    d_weights = np.empty((ROWS, weights.shape[2]), np.float32)
    d_scores = np.empty((TOGETHER, weights.shape[2]), np.uint16)
    rest = np.empty((ROWS, PANEL), np.float32)
    for head in range(heads):
        begin = begins[head // per_row]
        pair_columns(v[head], values, 0)
        pair_rows(k[head], keys, 0)
        for start in range(0, rows, TOGETHER):
            stop = min(start + TOGETHER, rows)
            bottom, top = begin[start // groups] // PANEL * PANEL, (stop - 1) // groups + 1
            weights_here, d_scores_here = weights[head, start:stop], d_scores[: stop - start]
            for row in range(start, stop, ROWS):
                count = min(ROWS, stop - row)
                low = begin[row // groups] // PANEL
                high = ((row + count - 1) // groups) // PANEL + 1
                upstream = d_out[head, row : row + count]
                for panel in range(low, high):
                    exact_tile(
                        upstream.ctypes.data, upstream.strides[0], values[panel].ctypes.data, dim // 2,
                        d_weights.ctypes.data + 4 * panel * PANEL, d_weights.strides[0], count, PANEL,
                    )  # fmt: skip
                left, right = low * PANEL, high * PANEL
                for i in range(count):
                    shift = along[head, row + i]
                    p, dp = weights[head, row + i, left:right], d_weights[i, left:right]
                    ds = d_scores[row - start + i]
                    ds[bottom:left] = 0
                    weights[head, row + i, bottom:left] = 0
                    seen_ds = ds[left:right]
                    for j in range(right - left):
                        put(seen_ds, j, get(p, j) * (dp[j] - shift))
                    ds[right:top] = 0
                    weights[head, row + i, right:top] = 0
                seen = min(right, positions + 1) - left
                for panel in range(len(keys)):
                    tile(
                        d_scores[row - start].ctypes.data + 2 * left, d_scores.strides[0],
                        keys[panel, left // 2 :].ctypes.data, seen // 2,
                        d_q[head, row : row + count], panel * PANEL, rest,
                    )  # fmt: skip
            gradient(weights_here[:, bottom:top], d_out[head, start:stop], d_v[head, bottom:top], False)
            gradient(d_scores_here[:, bottom:top], q[head, start:stop], d_k[head, bottom:top], False)
