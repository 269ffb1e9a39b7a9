"""Forward and backward pass of the network in `model.transformer`, written out by hand.

They cover the shape that Tercet builds and its relatives (Llama, Mistral, Qwen2 and Qwen3 without biases): RMS
norms, rotary positions, grouped queries, SwiGLU. The gradients are those of the textbook;
`tests/train/test_train_cpu.py` compares them with PyTorch's own.

They are faster than PyTorch's automatic gradients because everything between two matrix products is one pass over
memory (`kernels.py`), scores of tokens that can't see each other are not computed, logits exist for a few hundred
tokens at a time, and no operation needs more than one thread, so that a step gives each thread sequences of its
own and waits only at the end (`step.py`).

Shapes: B sequences of T tokens, M = B T, H hidden size, N query heads, K key heads, G = N / K,
D head dimension, I inner size, V vocabulary. Activations are bfloat16 or float32; the residual stream
and its gradient [M, H] are float32, sums of gradients too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.data.batches import IGNORED
from tercet.model.config import ModelConfig
from tercet.model.rope import rope_frequencies
from tercet.train.cpu import kernels
from tercet.train.cpu.attention import Read, attention_for
from tercet.train.cpu.products import Matrix, Products, Sum, raw

TOGETHER = (
    512  # tokens that go through several products in turn, while the cache holds the intermediate results
)
LOGITS = 1 << 21  # logits in memory at once: 4 MB in bfloat16, which the cache holds


Kind = TypeVar("Kind")  # a `Matrix`, laid out for products, or the `Sum` of its gradients


@dataclass
class LayerWeights(Generic[Kind]):
    """One layer's weights: matrices, joined where they have the same input, and norms in float32.

    qkv [(N + 2 K) D, H], o [H, N D], gate_up [2 I, H], down [H, I]; norms [H], [H], [D], [D].
    """

    qkv: Kind
    o: Kind
    gate_up: Kind
    down: Kind
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor


@dataclass
class Weights(Generic[Kind]):
    """All weights that a pass reads, or all sums that it adds gradients to.

    embedding [V, H] float32; head [V, H]. For gradients of tied weights the embedding is the head's sum.
    """

    embedding: Tensor
    layers: list[LayerWeights[Kind]]
    norm: Tensor
    head: Kind


@dataclass
class Rows:
    """Sequences of one length for a pass.

    tokens, targets, positions: [B, T] int64.
    begins: [B, T], for each token the index in its row of the first token that it sees.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    begins: NDArray[np.int64]

    @staticmethod
    def of(
        tokens: NDArray[np.int64],
        targets: NDArray[np.int64],
        positions: NDArray[np.int64] | None = None,
        segments: NDArray[np.int64] | None = None,
    ) -> Rows:
        """Return rows from the tensors of a `Batch`; positions default to 0..T-1, segments to one a row."""
        places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        begins = np.zeros(tokens.shape, np.int64)
        if segments is not None:
            fresh = segments[:, 1:] != segments[:, :-1]
            begins[:, 1:] = np.maximum.accumulate(np.where(fresh, places[:, 1:], 0), axis=1)
        return Rows(
            np.ascontiguousarray(tokens),
            np.ascontiguousarray(targets),
            # A copy, since `places` is read-only, and numba compiles functions again for read-only arrays.
            np.array(places if positions is None else positions, np.int64, order="C"),
            begins,
        )


@dataclass
class Activations:
    """The results of a layer's forward pass that its backward pass needs."""

    stream: Tensor  # [M, H] before the attention's norm
    factors: NDArray[np.float32]
    normed: Tensor
    qkv: Tensor
    read: Read  # the inputs of attention
    head_factors: NDArray[np.float32]
    attention_state: Any  # from `Attention.forward`
    attended: Tensor  # [B K, T G, D]
    merged: Tensor  # the same as [M, N D]
    middle: Tensor  # [M, H] before the MLP's norm
    middle_factors: NDArray[np.float32]
    middle_normed: Tensor
    gate_up: Tensor
    gated: Tensor


class Passes:
    """Computes loss and gradients for networks of one configuration; holds no weights."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, products: Products) -> None:
        self.config, self.dtype, self.products = config, dtype, products
        self.attention = attention_for(products)
        self.groups = config.num_heads // config.num_kv_heads
        scale = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
        self.scale, self.eps = np.float32(scale), np.float32(config.norm_eps)
        frequencies, factor = rope_frequencies(config, config.max_positions)
        angles = np.outer(np.arange(config.max_positions, dtype=np.float32), frequencies)
        self.cosines = (np.cos(angles) * np.float32(factor)).astype(np.float32)
        self.sines = (np.sin(angles) * np.float32(factor)).astype(np.float32)

    def run(
        self, rows: Rows, weights: Weights[Matrix], gradients: Weights[Sum], scale: float, z_weight: float
    ) -> float:
        """Return the summed loss (nats) and add ``scale`` times the gradient of loss and z-loss to ``gradients``.

        This runs on the calling thread, which must be the only one to use ``gradients``.
        """
        stream = torch.nn.functional.embedding(torch.from_numpy(rows.tokens.reshape(-1)), weights.embedding)
        all_activations: list[Activations] = []
        stream = stream.float()
        update: Tensor | None = None
        for layer in weights.layers:
            activations, update = self._layer(rows, layer, stream, update)
            stream = activations.middle
            all_activations.append(activations)
        assert update is not None
        final, normed, factors = self._add_and_norm(stream, update, weights.norm)
        loss, d_normed = self._head(rows, weights, gradients, normed, scale, z_weight)
        d_stream = torch.zeros_like(final)
        narrow = torch.empty_like(normed)
        self._norm_backward(final, factors, weights.norm, d_normed, d_stream, narrow, gradients.norm)
        for activations, layer, sums in zip(
            reversed(all_activations), reversed(weights.layers), reversed(gradients.layers), strict=True
        ):
            self._mlp_backward(activations, layer, sums, d_stream, narrow)
            self._attention_backward(rows, activations, layer, sums, d_stream, narrow)
        gradients.head.settle()
        kernels.add_rows(gradients.embedding.numpy(), rows.tokens.reshape(-1), d_stream.numpy())
        return loss

    # Forward

    def _add_and_norm(
        self, stream: Tensor, update: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
        """Return stream + update, its norm, and the factors 1 / rms for the backward pass."""
        added, normed = torch.empty_like(stream), torch.empty_like(stream, dtype=self.dtype)
        factors = np.empty(len(stream), np.float32)
        kernels.add_and_norm(
            stream.numpy(), raw(update), weight.numpy(), self.eps, added.numpy(), raw(normed), factors
        )
        return added, normed, factors

    def _layer(
        self, rows: Rows, layer: LayerWeights[Matrix], stream: Tensor, update: Tensor | None
    ) -> tuple[Activations, Tensor]:
        """Run one block. ``update`` is the previous block's addition to ``stream``; this block's is returned."""
        config = self.config
        batch, time = rows.tokens.shape
        if update is None:
            normed = torch.empty_like(stream, dtype=self.dtype)
            factors = np.empty(len(stream), np.float32)
            kernels.norm(stream.numpy(), layer.input_norm.numpy(), self.eps, raw(normed), factors)
        else:
            stream, normed, factors = self._add_and_norm(stream, update, layer.input_norm)
        qkv = normed.new_empty(len(normed), (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        layer.qkv.forward(normed, qkv)
        kv_heads, dim = config.num_kv_heads, config.head_dim
        q = torch.empty(batch * kv_heads, time * self.groups, dim, dtype=self.dtype)
        k, v = (torch.empty(batch * kv_heads, time, dim, dtype=self.dtype) for _ in range(2))
        head_factors = np.empty((batch * time, config.num_heads + kv_heads), np.float32)
        kernels.heads(
            raw(qkv),
            layer.q_norm.numpy(),
            layer.k_norm.numpy(),
            config.qk_norm == "head",
            self.eps,
            self.cosines,
            self.sines,
            rows.positions,
            self.scale,
            raw(q),
            raw(k),
            raw(v),
            head_factors,
        )
        read = Read(rows.begins, q, k, v)
        attended, attention_state = self.attention.forward(read)
        merged = self._merged(attended, batch)
        update = torch.empty_like(normed)
        layer.o.forward(merged, update)
        middle, middle_normed, middle_factors = self._add_and_norm(stream, update, layer.mlp_norm)
        gate_up, gated, down = self._mlp(layer, middle_normed)
        activations = Activations(
            stream,
            factors,
            normed,
            qkv,
            read,
            head_factors,
            attention_state,
            attended,
            merged,
            middle,
            middle_factors,
            middle_normed,
            gate_up,
            gated,
        )
        return activations, down

    def _mlp(self, layer: LayerWeights[Matrix], normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate_up, gated, and the block's update of the stream."""
        inner = self.config.intermediate_size
        gate_up, gated = (normed.new_empty(len(normed), size) for size in (2 * inner, inner))
        out = torch.empty_like(normed)
        for part in _parts(len(normed)):
            layer.gate_up.forward(normed[part], gate_up[part])
            kernels.gate(raw(gate_up[part]), raw(gated[part]))
            layer.down.forward(gated[part], out[part])
        return gate_up, gated, out

    def _merged(self, attended: Tensor, batch: int) -> Tensor:
        """Rearrange [B K, T G, D] to [M, N D], heads in the checkpoint's order."""
        split = attended.view(batch, self.config.num_kv_heads, -1, self.groups, self.config.head_dim)
        return split.transpose(1, 2).reshape(-1, self.config.num_heads * self.config.head_dim).contiguous()

    # The head, forward and backward at once, so that the logits can be discarded

    def _head(
        self,
        rows: Rows,
        weights: Weights[Matrix],
        gradients: Weights[Sum],
        normed: Tensor,
        scale: float,
        z_weight: float,
    ) -> tuple[float, Tensor]:
        """Return the summed loss, and its gradient (times ``scale``) for the final norm's output."""
        targets = rows.targets.reshape(-1)
        supervised = np.flatnonzero(targets != IGNORED)
        everything = len(supervised) == len(targets)
        hidden = normed if everything else normed[torch.from_numpy(supervised)]
        if not everything:
            targets = targets[supervised]
        d_hidden = torch.empty_like(hidden)
        losses = np.empty(len(hidden), np.float32)
        size = max(1, LOGITS // self.config.vocab_size)
        for begin in range(0, len(hidden), size):
            piece = hidden[begin : begin + size]
            logits = piece.new_empty(len(piece), self.config.vocab_size)
            weights.head.forward(piece, logits)
            kernels.cross_entropy(
                raw(logits),
                targets[begin : begin + size],
                np.float32(scale),
                np.float32(z_weight),
                losses[begin : begin + size],
            )
            weights.head.backward(logits, d_hidden[begin : begin + size])
            self.products.gradient(gradients.head, logits, piece)
        if everything:
            return float(losses.sum(dtype=np.float64)), d_hidden
        d_normed = torch.zeros_like(normed)
        d_normed[torch.from_numpy(supervised)] = d_hidden
        return float(losses.sum(dtype=np.float64)), d_normed

    # Backward. d_stream: gradient of the residual stream, float32; narrow: the same in the activations' type

    def _norm_backward(
        self,
        stream: Tensor,
        factors: NDArray[np.float32],
        weight: Tensor,
        d_normed: Tensor,
        d_stream: Tensor,
        narrow: Tensor,
        d_weight: Tensor,
    ) -> None:
        kernels.norm_backward(
            stream.numpy(),
            weight.numpy(),
            factors,
            raw(d_normed),
            d_stream.numpy(),
            d_weight.numpy(),
            raw(narrow),
        )

    def _mlp_backward(
        self,
        activations: Activations,
        layer: LayerWeights[Matrix],
        sums: LayerWeights[Sum],
        d_stream: Tensor,
        narrow: Tensor,
    ) -> None:
        inner = self.config.intermediate_size
        d_gated, d_gate_up = (activations.gated.new_empty(TOGETHER, size) for size in (inner, 2 * inner))
        d_normed = narrow.new_empty(TOGETHER, narrow.shape[1])
        for part in _parts(len(narrow)):
            count = part.stop - part.start
            self.products.gradient(sums.down, narrow[part], activations.gated[part])
            layer.down.backward(narrow[part], d_gated[:count])
            kernels.gate_backward(
                raw(activations.gate_up[part]), raw(d_gated[:count]), raw(d_gate_up[:count])
            )
            self.products.gradient(sums.gate_up, d_gate_up[:count], activations.middle_normed[part])
            layer.gate_up.backward(d_gate_up[:count], d_normed[:count])
            self._norm_backward(
                activations.middle[part],
                activations.middle_factors[part],
                layer.mlp_norm,
                d_normed[:count],
                d_stream[part],
                narrow[part],
                sums.mlp_norm,
            )

    def _attention_backward(
        self,
        rows: Rows,
        activations: Activations,
        layer: LayerWeights[Matrix],
        sums: LayerWeights[Sum],
        d_stream: Tensor,
        narrow: Tensor,
    ) -> None:
        config = self.config
        batch, time = rows.tokens.shape
        self.products.gradient(sums.o, narrow, activations.merged)
        d_merged = torch.empty_like(activations.merged)
        layer.o.backward(narrow, d_merged)
        split = d_merged.view(batch, time, config.num_kv_heads, self.groups, config.head_dim)
        # `reshape` alone need not copy a single row.
        d_attended = split.transpose(1, 2).reshape(activations.attended.shape).contiguous()
        d_q, d_k, d_v = self.attention.backward(
            activations.read, activations.attended, activations.attention_state, d_attended
        )
        d_qkv = torch.empty_like(activations.qkv)
        kernels.heads_backward(
            raw(activations.qkv),
            layer.q_norm.numpy(),
            layer.k_norm.numpy(),
            config.qk_norm == "head",
            self.cosines,
            self.sines,
            rows.positions,
            self.scale,
            activations.head_factors,
            raw(d_q),
            d_k.numpy(),
            d_v.numpy(),
            raw(d_qkv),
            sums.q_norm.numpy(),
            sums.k_norm.numpy(),
        )
        d_normed = narrow.new_empty(TOGETHER, narrow.shape[1])
        for part in _parts(len(narrow)):
            count = part.stop - part.start
            self.products.gradient(sums.qkv, d_qkv[part], activations.normed[part])
            layer.qkv.backward(d_qkv[part], d_normed[:count])
            self._norm_backward(
                activations.stream[part],
                activations.factors[part],
                layer.input_norm,
                d_normed[:count],
                d_stream[part],
                narrow[part],
                sums.input_norm,
            )


def _parts(tokens: int) -> list[slice]:
    """Divide tokens into parts so small that the cache still holds one product's results when the next reads them."""
    return [slice(begin, min(begin + TOGETHER, tokens)) for begin in range(0, tokens, TOGETHER)]
