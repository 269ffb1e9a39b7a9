"""The initial weights of a network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tercet.model.rope import rope_frequencies
from tercet.model.transformer import Transformer

# See `look_nearby`: how many tokens back the first heads of a layer attend initially, the constant in the
# embeddings, and the weight with which queries and keys read it.
NEARBY = (1, 2)
CONSTANT, ATTENTION = 6.0, 0.4
SLOWEST = 0.07  # radians a token: pairs that rotate more slowly can't tell a token from its neighbour


def initialize(model: Transformer, seed: int) -> None:
    """Draw normal weights: deviation 0.02 for the embedding, 1 / sqrt(width) for matrices, less at a branch's end.

    A matrix of that deviation keeps the size of its input (LeCun et al. 1998). Each of the 2L branches adds
    its variance to the residual stream, so their last matrices begin sqrt(2L) times smaller (GPT-2, Radford
    et al. 2019). Norms begin at one, biases at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    usual = model.config.hidden_size**-0.5
    last = usual / (2 * model.config.num_layers) ** 0.5
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                table = isinstance(module, nn.Embedding) or name == "lm_head"
                if name != "lm_head" or not model.config.tie_embeddings:
                    deviation = 0.02 if table else last if residual else usual
                    module.weight.normal_(0, deviation, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()


def look_nearby(model: Transformer) -> None:
    """Make two heads of each layer attend to the previous token and to the token before that.

    A head with random weights attends to all tokens alike, and a small network needs a million tokens to
    learn that the last few matter most. A head attends by position and not by content only if queries and
    keys hold a component that is the same for every token. Here that is the embedding's first dimension: a
    constant, which the final norm removes again, so that it changes no logit. Queries and keys read it into
    their fast-rotating pairs, with the query rotated back by as many tokens as the head is to attend back
    (RoPE: Su et al. 2021, arXiv:2104.09864), so that their product is largest there. The gain is measured
    in docs/experiments.md.
    """
    config = model.config
    dim, half = config.head_dim, config.head_dim // 2
    frequencies, _ = rope_frequencies(config, config.max_positions)
    rotating = [pair for pair, frequency in enumerate(frequencies) if frequency >= SLOWEST]
    groups = config.num_heads // config.num_kv_heads
    blocks: list[Any] = list(model.model.layers)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        norm: Any = model.model.norm
        norm.weight[0] = 0
        for block in blocks:
            attention = block.self_attn
            for reader in (attention.v_proj, block.mlp.gate_proj, block.mlp.up_proj):
                reader.weight[:, 0] = 0
            for head, back in zip(range(config.num_heads), NEARBY, strict=False):
                query, key = head * dim, head // groups * dim
                for pair in rotating:
                    angle = -back * float(frequencies[pair])
                    attention.q_proj.weight[query + pair, 0] = ATTENTION * math.cos(angle)
                    attention.q_proj.weight[query + pair + half, 0] = ATTENTION * math.sin(angle)
                    attention.k_proj.weight[key + pair, 0] = ATTENTION
                    attention.k_proj.weight[key + pair + half, 0] = 0
