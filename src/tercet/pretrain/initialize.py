"""Weights to begin with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tercet.model.rope import rope_frequencies
from tercet.model.transformer import Transformer

# How far back the first heads of a layer look at the beginning, and what makes them: see `look_nearby`.
NEARBY = (1, 2)
CONSTANT, ATTENTION = 6.0, 0.4
SLOWEST = 0.07  # radians a token: pairs that turn more slowly can't tell a token from its neighbour


def initialize(model: Transformer, seed: int) -> None:
    """Normal weights: 0.02 for the embedding, 1 / sqrt(width) for matrices, less where a branch ends.

    A matrix of that deviation keeps the size of what goes through it (LeCun et al. 1998). Each of the 2L
    branches adds its variance to the stream, so their last matrices begin sqrt(2L) times smaller (GPT-2,
    Radford et al. 2019). Norms begin at one, biases at zero.
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
    """Make two heads of each layer attend to the token before and to the one before that.

    A head that begins at random looks at all tokens alike, and a small network needs a million tokens to find
    out that the last few say most. Where a head looks can only follow from places, not from contents, if
    queries and keys hold something that is the same for every token. Here that is the embedding's first
    dimension: a constant, which the final norm takes out again, so that it changes no logit. Queries and
    keys read it into their fast-turning rotary pairs, queries turned back by as many tokens as the head is
    to look back (RoPE: Su et al. 2021, arXiv:2104.09864), so that their product is largest there.
    What it gives is in docs/experiments.md.
    """
    config = model.config
    dim, half = config.head_dim, config.head_dim // 2
    frequencies, _ = rope_frequencies(config, config.max_positions)
    turning = [pair for pair, frequency in enumerate(frequencies) if frequency >= SLOWEST]
    groups = config.num_heads // config.num_kv_heads
    blocks: list[Any] = list(model.model.layers)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        norm: Any = model.model.norm
        norm.weight[0] = 0
        for block in blocks:
            attention = block.self_attn
            for other in (attention.v_proj, block.mlp.gate_proj, block.mlp.up_proj):
                other.weight[:, 0] = 0
            for head, back in zip(range(config.num_heads), NEARBY, strict=False):
                query, key = head * dim, head // groups * dim
                for pair in turning:
                    angle = -back * float(frequencies[pair])
                    attention.q_proj.weight[query + pair, 0] = ATTENTION * math.cos(angle)
                    attention.q_proj.weight[query + pair + half, 0] = ATTENTION * math.sin(angle)
                    attention.k_proj.weight[key + pair, 0] = ATTENTION
                    attention.k_proj.weight[key + pair + half, 0] = 0
