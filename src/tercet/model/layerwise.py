"""Compute a network with the weights of one layer at a time in memory, from any source of weights.

An export compares a file with its checkpoint, and measures activations, on a machine that may not hold the
model in float32. Every layer computes all tokens before the next layer is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tercet.model.attention import softcap
from tercet.model.config import ModelConfig
from tercet.model.loading import without_weights
from tercet.model.weights import Floats

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Matrices(Protocol):
    """Weights by the network's names, as `tercet.model.weights.Weights`."""

    config: ModelConfig

    def __call__(self, name: str) -> Floats:
        """Return a tensor as float32."""


@torch.no_grad()
def hidden_states(
    weights: Matrices, tokens: Tensor, observe: Callable[[str, Tensor], None] | None = None
) -> Tensor:
    """Return the inputs of the head [B, T, H] in float32 for ``tokens`` [B, T].

    Args:
        weights: the network's weights; each tensor is read once.
        tokens: token ids.
        observe: called with the name of each linear layer and its input [..., columns].
    """
    network = without_weights(weights.config)
    handles = []
    for name, module in network.named_modules():
        if name in ("model.embed_tokens", "model.embed_positions", "model.norm") or _is_layer(name):
            handles.append(module.register_forward_pre_hook(_filler(weights, name)))
            handles.append(module.register_forward_hook(_emptied))
        if observe is not None and isinstance(module, nn.Linear) and ".layers." in f".{name}":
            handles.append(module.register_forward_pre_hook(_observer(observe, name)))
    hidden = network.hidden(tokens)
    for handle in handles:
        handle.remove()
    return hidden


def head_logits(weights: Matrices, hidden: Tensor, step: int = 64) -> Iterator[Tensor]:
    """Yield the logits [at most ``step``, V] of hidden states [N, H], a few tokens at a time."""
    config = weights.config
    head = _tensor(weights(EMBEDDING if config.tie_embeddings else HEAD))
    for at in range(0, len(hidden), step):
        logits = hidden[at : at + step] @ head.T
        yield logits if config.logit_softcap is None else softcap(logits, config.logit_softcap)


def _is_layer(name: str) -> bool:
    before, _, number = name.rpartition(".")
    return before == "model.layers" and number.isdecimal()


def _filler(weights: Matrices, prefix: str) -> Callable[[nn.Module, Any], None]:
    def fill(module: nn.Module, _: Any) -> None:
        names = [name for name, _ in module.named_parameters()]
        module.load_state_dict({name: _tensor(weights(f"{prefix}.{name}")) for name in names}, assign=True)

    return fill


def _emptied(module: nn.Module, _: Any, output: Tensor) -> None:
    module.to_empty(device="meta")


def _observer(observe: Callable[[str, Tensor], None], name: str) -> Callable[[nn.Module, Any], None]:
    return lambda _, inputs: observe(name, inputs[0])


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # a copy of what is mapped to a file
