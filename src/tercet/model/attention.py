"""How queries attend to keys: the key/value cache's interface, masks, document boundaries and the arithmetic.

Shapes: B sequences, T query tokens, S keys, N query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.model.config import ModelConfig


class KVCache(Protocol):
    """A key/value cache: keys and values of earlier tokens; the slot of a token is its position.

    Rows may hold different numbers of tokens. Slots beyond a row's own position are never attended
    to, because a query at position p sees slots 0..p only, and slot p is written before it is read.
    So unequal prompts are padded on the right and nothing needs a padding mask.
    """

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, D] at ``positions`` [B, T]; return the layer's slots 0..length-1, [B, K, length, D]."""
        ...


class Documents(NamedTuple):
    """The documents that rows consist of, in place of a mask.

    Attributes:
        begins: int32 [number of documents + 1], where each document begins, with all rows laid end to
            end; the last entry is the number of tokens.
        window: how many tokens a query sees at the most, itself among them; None: all before it.
    """

    begins: Tensor
    window: int | None


def visible_keys(
    positions: Tensor,
    segments: Tensor | None,
    window: int | None,
    length: int,
    *,
    cached: bool,
    plain: bool,
) -> Tensor | None:
    """Return a mask [B or 1, 1, T, S], True for each key that a query sees; None for plain causal attention.

    Args:
        positions: [B, T], each token's position in its own sequence.
        segments: [B, T], as in `Transformer.hidden`; None for one sequence per row.
        window: sliding window of the layer in tokens; None for none.
        length: one more than the largest position.
        cached: the keys are the slots 0..length-1 of a cache (S = length) instead of the row's own (S = T).
        plain: every row's positions are 0..T-1.
    """
    time = positions.shape[1]
    if window is not None and length <= window:
        window = None  # nothing is further away than the window
    if cached:
        if plain and window is None and time == length:
            return None
        query, key = positions[:, :, None], torch.arange(length, device=positions.device)[None, None, :]
        seen = key <= query
    else:
        if segments is None and window is None:
            return None
        # Order in the row decides what is earlier: positions restart with each packed document.
        place = torch.arange(time, device=positions.device)
        query, key = place[None, :, None], place[None, None, :]
        seen = key <= query
        if segments is not None:
            seen = seen & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        seen = seen & (query - key < window)
    return seen[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None, config: ModelConfig) -> Tensor:
    """Return attention's output [B, N, T, D] by the implementation that ``mask`` and ``config`` need.

    Args:
        q: [B, N, T, D].
        k: [B, K, S, D] with N a multiple of K.
        v: like ``k``.
        mask: a result of `visible_keys`, or `Documents`.
        config: gives the scale, the soft cap and the numbers of heads.
    """
    if isinstance(mask, Documents):
        return document_attention(q, k, v, mask, config.attention_scale)
    if config.attention_softcap is not None:
        return capped_attention(q, k, v, mask, config.attention_scale, config.attention_softcap)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] > 1,
        scale=config.attention_scale,
        enable_gqa=config.num_heads != config.num_kv_heads,
    )


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None) -> Tensor:
    """Causal attention that doesn't compute masked scores: FlashAttention 2 (Dao 2023, arXiv:2307.08691).

    PyTorch provides it. A mask over pairs of tokens would be read for every head, and blocks between
    documents computed to be thrown away. q [B, N, T, D]; k, v [B, K, T, D] with N a multiple of K,
    16 bits each. Returns [B, N, T, D].
    """
    batch, _, time, _ = q.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    begins, left = documents.begins, -1 if documents.window is None else documents.window - 1
    out = torch.ops.aten._flash_attention_forward(
        *flat, begins, begins, time, time, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip
    return cast(Tensor, out.view(batch, time, *out.shape[1:]).transpose(1, 2))


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float
) -> Tensor:
    """Attention with soft-capped scores, which PyTorch's own attention does not have.

    q [B, N, T, D]; k, v [B, K, S, D] with N a multiple of K; mask [B or 1, 1, T, S], True to see, or
    None for plain causal attention (T = S). Holds all scores [B, N, T, S] at once. Returns [B, N, T, D].
    """
    batch, heads, time, dim = q.shape
    groups = k.shape[1]
    if mask is None:
        mask = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()[None, None]
    grouped = q.view(batch, groups, heads // groups, time, dim) * (dim**-0.5 if scale is None else scale)
    scores = softcap(grouped @ k[:, :, None].transpose(3, 4), cap)
    weights = scores.float().masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(q.dtype)
    return (weights @ v[:, :, None]).view(batch, heads, time, dim)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Bend values into (-cap, cap): cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap
