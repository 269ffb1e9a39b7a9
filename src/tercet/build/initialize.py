"""Weights to begin with."""

from __future__ import annotations

import torch
from torch import nn

from tercet.model.transformer import Transformer


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
