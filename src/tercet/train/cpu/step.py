"""The gradients of an optimizer step: each thread takes sequences of its own through the whole network.

PyTorch divides every operation among threads and waits for all of them after each, a thousand times a step. Here
there is one barrier, at the end, where the threads' gradients are added in a fixed order: a step repeats bit for
bit with the same number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tercet.model.transformer import Transformer
from tercet.train.batch import Batch
from tercet.train.cpu.passes import LayerWeights, Passes, Rows, Weights
from tercet.train.cpu.products import Matrix, Sum, products_for


class Stepper:
    """Computes the gradients of ``model`` and sets its parameters' ``grad``.

    Each step reads the weights again, so an optimizer may change them in place between steps.
    """

    def __init__(self, model: Transformer, threads: int, z_weight: float = 0.0) -> None:
        self.model, self.threads, self.z_weight = model, max(1, threads), z_weight
        config = model.config
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = (config.hidden_size, query, key, config.intermediate_size, config.vocab_size)
        products = products_for(model.dtype, sizes)
        self.passes = Passes(config, model.dtype, products)
        self._head = products.matrix([model.lm_head.weight])
        blocks: list[Any] = list(model.model.layers)
        self._matrices = [
            (
                products.matrix(
                    [
                        block.self_attn.q_proj.weight,
                        block.self_attn.k_proj.weight,
                        block.self_attn.v_proj.weight,
                    ]
                ),
                products.matrix([block.self_attn.o_proj.weight]),
                products.matrix([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]),
                products.matrix([block.mlp.down_proj.weight]),
            )
            for block in blocks
        ]
        self._sums = [self._zeros() for _ in range(self.threads)]
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        # Compile the kernels that this machine has not compiled yet (half a minute, once), before any time is
        # measured.
        place = np.zeros((1, 2), np.int64)
        self._each(self._run, [([Rows.of(place, place)], self._weights(), self._sums[0], 0.0)])

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Return the mean loss (nats) over the supervised tokens of all ``batches``, and the number of those tokens.

        Every parameter's ``grad`` is set to the gradient of that mean.
        """
        tokens = sum(batch.supervised for batch in batches)
        scale = 1.0 / max(1, tokens)
        rows: list[list[Rows]] = [[] for _ in range(self.threads)]
        for batch in batches:
            for number, part in enumerate(_shares(batch, self.threads)):
                rows[number].append(part)
        weights = self._weights()
        work = [(own_rows, weights, sums, scale) for own_rows, sums in zip(rows, self._sums, strict=True)]
        total = sum(self._each(self._run, work))
        self._each(_add_up, list(zip(*(list(_tensors(sums)) for sums in self._sums), strict=True)))
        self._hand_over(self._sums[0])
        return total * scale, tokens

    def _run(self, work: tuple[list[Rows], Weights[Matrix], Weights[Sum], float]) -> float:
        """Do one thread's part: return the summed loss of its rows, and replace its sums by their gradients."""
        rows, weights, sums, scale = work
        vectors, matrices = _parts_of(sums)
        for vector in vectors:
            vector.zero_()
        for matrix in matrices:
            matrix.fresh = True
        total = sum(self.passes.run(part, weights, sums, scale, self.z_weight) for part in rows)
        for matrix in matrices:
            matrix.settle()
        return total

    def _each(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Apply ``function`` to each of the items, on the threads."""

        def alone(item: Any) -> Any:
            if torch.get_num_threads() != 1:
                torch.set_num_threads(
                    1
                )  # PyTorch's setting is per thread: operations run on this thread alone
            with torch.inference_mode():
                return function(item)

        return list(map(alone, items) if self._pool is None else self._pool.map(alone, items))

    def _weights(self) -> Weights[Matrix]:
        """Return the network's present weights, laid out for the passes."""
        inner, normed = self.model.model, self.model.config.qk_norm == "head"
        self._each(lambda matrix: matrix.refresh(), [self._head, *itertools.chain(*self._matrices)])
        ones = torch.ones(self.model.config.head_dim)
        blocks: list[Any] = list(inner.layers)
        layers = [
            LayerWeights(
                *matrices,
                block.input_layernorm.weight.detach(),
                block.post_attention_layernorm.weight.detach(),
                block.self_attn.q_norm.weight.detach() if normed else ones,
                block.self_attn.k_norm.weight.detach() if normed else ones,
            )
            for block, matrices in zip(blocks, self._matrices, strict=True)
        ]
        norm: Any = inner.norm
        return Weights(inner.embed_tokens.weight.detach(), layers, norm.weight.detach(), self._head)

    def _zeros(self) -> Weights[Sum]:
        config = self.model.config
        hidden, dim = config.hidden_size, config.head_dim
        query, key = config.num_heads * dim, config.num_kv_heads * dim
        layers = [
            LayerWeights(
                Sum(query + 2 * key, hidden),
                Sum(hidden, query),
                Sum(2 * config.intermediate_size, hidden),
                Sum(hidden, config.intermediate_size),
                torch.zeros(hidden),
                torch.zeros(hidden),
                torch.zeros(dim),
                torch.zeros(dim),
            )
            for _ in range(config.num_layers)
        ]
        head = Sum(config.vocab_size, hidden)
        embedding = head.value if config.tie_embeddings else torch.zeros(config.vocab_size, hidden)
        return Weights(embedding, layers, torch.zeros(hidden), head)

    def _hand_over(self, sums: Weights[Sum]) -> None:
        """Set each parameter's gradient to its part of the sums."""
        config, inner = self.model.config, self.model.model
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        blocks: list[Any] = list(inner.layers)
        for block, layer in zip(blocks, sums.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            for projection, part in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj),
                torch.split(layer.qkv.value, [query, key, key]),
                strict=True,
            ):
                projection.weight.grad = part
            attention.o_proj.weight.grad = layer.o.value
            mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad = layer.gate_up.value.chunk(2)
            mlp.down_proj.weight.grad = layer.down.value
            block.input_layernorm.weight.grad = layer.input_norm
            block.post_attention_layernorm.weight.grad = layer.mlp_norm
            if config.qk_norm == "head":
                attention.q_norm.weight.grad = layer.q_norm
                attention.k_norm.weight.grad = layer.k_norm
        norm: Any = inner.norm
        norm.weight.grad = sums.norm
        inner.embed_tokens.weight.grad = sums.embedding
        if not config.tie_embeddings:
            self.model.lm_head.weight.grad = sums.head.value


def _parts_of(sums: Weights[Sum]) -> tuple[list[Tensor], list[Sum]]:
    """Return the tensors to clear before a step, and the sums that need no clearing; each once."""
    parts = [part for layer in sums.layers for part in vars(layer).values()]
    vectors = [sums.norm, *(part for part in parts if not isinstance(part, Sum))]
    if sums.embedding is not sums.head.value:
        vectors.append(sums.embedding)
    return vectors, [sums.head, *(part for part in parts if isinstance(part, Sum))]


def _tensors(sums: Weights[Sum]) -> list[Tensor]:
    vectors, matrices = _parts_of(sums)
    return [*vectors, *(matrix.value for matrix in matrices)]


def _add_up(copies: Sequence[Tensor]) -> None:
    """Add the second and later tensors to the first, in order."""
    for copy in copies[1:]:
        copies[0].add_(copy)


def _shares(batch: Batch, parts: int) -> list[Rows]:
    """Divide the batch's rows into at most ``parts`` parts of nearly equal size."""
    count = len(batch.tokens)
    ends = np.linspace(0, count, min(parts, count) + 1).round().astype(int).tolist()
    shares = []
    for begin, end in itertools.pairwise(ends):
        tokens, targets, positions, segments = (
            None if tensor is None else tensor[begin:end].numpy()
            for tensor in (batch.tokens, batch.targets, batch.positions, batch.segments)
        )
        assert tokens is not None and targets is not None
        shares.append(Rows.of(tokens, targets, positions, segments))
    return shares
