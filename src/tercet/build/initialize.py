"""Weights to begin with."""

from __future__ import annotations

import torch
from torch import nn

from tercet.model.transformer import Transformer


def initialize(model: Transformer, seed: int) -> None:
    """Normal weights of standard deviation 0.02, smaller where a residual branch ends.

    Each of the 2L branches adds its variance to the stream, so their last matrices begin at
    0.02 / sqrt(2L) (GPT-2, Radford et al. 2019). Norms begin at one, biases at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    last = 0.02 / (2 * model.config.num_layers) ** 0.5
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                if name != "lm_head" or not model.config.tie_embeddings:
                    module.weight.normal_(0, last if residual else 0.02, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
