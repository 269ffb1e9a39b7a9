"""The networks that the written-out passes support; a module of its own, so that the check doesn't import numba."""

from __future__ import annotations

from typing import Any

import torch

from tercet.model.transformer import Linear, Transformer


def supports(model: Transformer) -> bool:
    """Return whether `passes` computes this network: all its parts are supported and all are trained."""
    config = model.config
    blocks: list[Any] = list(model.model.layers)
    return (
        config.norm == "rms"
        and config.norm_offset == 0
        and config.pre_norm
        and not config.post_norm
        and not config.parallel_residual
        and config.positions == "rope"
        and config.rotary == config.head_dim
        and (config.rope_scaling is None or not config.rope_scaling.by_length)
        and config.qk_norm in ("none", "head")
        and config.gated_mlp
        and config.activation == "silu"
        and not (config.attention_bias or config.output_bias or config.mlp_bias)
        and config.attention_softcap is None
        and config.logit_softcap is None
        and config.embedding_scale is None
        and all(
            config.has_rope(layer)
            and not config.has_local_rope(layer)
            and not config.is_mixture(layer)
            and (config.window(layer) or config.max_positions) >= config.max_positions
            for layer in range(config.num_layers)
        )
        and all(parameter.requires_grad for parameter in model.parameters())
        and all(type(layer.self_attn.q_proj) is Linear for layer in blocks)
        and model.device.type == "cpu"
        and model.model.embed_tokens.weight.dtype == torch.float32
    )
