"""Convert ``config.json`` of Llama and the families that descend from it to `ModelConfig` and back.

The other families are in `tercet.model.hf_gemma` and `tercet.model.hf_gpt`. A missing field takes the
default of the family's configuration class in transformers; a field that is null takes none.
"""

from __future__ import annotations

from typing import Any

from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.hf_fields import (
    HF,
    activation,
    activation_name,
    boolean,
    eos_ids,
    head_size,
    integer,
    layer_list,
    layer_types,
    number,
    optional_integer,
    refuse,
    same_windows,
    sliding_window,
    token_ids,
    window_size,
    windows_by_type,
    wrong,
)
from tercet.model.hf_rope import (
    partial_factor,
    read_rope,
    read_rotary_dim,
    rope_kind,
    rope_object,
    scaling_object,
    write_rope,
)

# Defaults of transformers 5, family by family.
LLAMA: HF = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MISTRAL = LLAMA | {
    "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
}  # fmt: skip
MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN2 = LLAMA | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "max_position_embeddings": 32_768,
    "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN3 = QWEN2 | {"head_dim": 128}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "moe_intermediate_size": 768, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
OLMO2 = LLAMA | {
    "vocab_size": 50_304, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50_279, "pad_token_id": 1,
}  # fmt: skip
SMOLLM3 = LLAMA | {
    "vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 32_768, "rope_theta": 2e6, "no_rope_layer_interval": 4,
    "tie_word_embeddings": True, "bos_token_id": 128_000, "eos_token_id": 128_001, "pad_token_id": 128_004,
}  # fmt: skip
PHI3 = LLAMA | {
    "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32_000, "pad_token_id": 32_000,
}  # fmt: skip


# Reading


def read_decoder(
    hf: HF, family: str, *, act: str = "hidden_act", partial_rotary: bool = False, **choices: Any
) -> ModelConfig:
    """Read the fields that Llama and its descendants share.

    Args:
        hf: the fields, with the family's defaults filled in.
        family: the family's name.
        act: the field that names the activation.
        partial_rotary: the family can rotate only a part of each head.
        **choices: the other fields of `ModelConfig`.
    """
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    head_dim = optional_integer(hf, "head_dim")
    if head_dim is None:
        head_dim = head_size(hidden, heads, "hidden_size", "num_attention_heads")
    max_positions = integer(hf, "max_position_embeddings")
    theta, scaling = read_rope(hf, max_positions)
    if not partial_rotary:
        for holder in (hf, rope_object(hf)[1]):
            refuse(holder, "partial_rotary_factor", 1.0)
    groups = optional_integer(hf, "num_key_value_heads")
    return ModelConfig(
        family=family,
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(hf, "intermediate_size"),
        num_layers=integer(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if groups is None else groups,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=number(hf, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=read_rotary_dim(hf, head_dim),
        activation=activation(hf, act),
        tie_embeddings=boolean(hf, "tie_word_embeddings"),
        bos_token_id=optional_integer(hf, "bos_token_id"),
        eos_token_ids=eos_ids(hf),
        pad_token_id=optional_integer(hf, "pad_token_id"),
        **choices,
    )


def biases(hf: HF) -> dict[str, Any]:
    """Read ``attention_bias``: all four projections of the attention have a bias, or none has."""
    bias = boolean(hf, "attention_bias")
    return {"attention_bias": bias, "output_bias": bias}


def read_llama(hf: HF) -> ModelConfig:
    """Read the configuration of a Llama model."""
    hf = LLAMA | hf
    return read_decoder(hf, "llama", mlp_bias=boolean(hf, "mlp_bias"), **biases(hf))


def read_mistral(hf: HF) -> ModelConfig:
    """Read the configuration of a Mistral model."""
    hf = MISTRAL | hf
    layers = integer(hf, "num_hidden_layers")
    return read_decoder(hf, "mistral", windows=same_windows(sliding_window(hf), layers))


def read_mixtral(hf: HF) -> ModelConfig:
    """Read the configuration of a Mixtral model."""
    hf = MIXTRAL | hf
    return read_decoder(
        hf,
        "mixtral",
        windows=same_windows(sliding_window(hf), integer(hf, "num_hidden_layers")),
        num_experts=integer(hf, "num_local_experts"),
        experts_per_token=integer(hf, "num_experts_per_tok"),
        moe_intermediate_size=integer(hf, "intermediate_size"),
    )


def _window_in_use(hf: HF) -> int | None:
    return sliding_window(hf) if boolean(hf, "use_sliding_window") else None


def _upper_windows(hf: HF) -> tuple[int | None, ...]:
    """Return Qwen's sliding windows: in the listed layers, or else from ``max_window_layers`` upwards."""
    layers, size = integer(hf, "num_hidden_layers"), _window_in_use(hf)
    first = integer(hf, "max_window_layers")
    return windows_by_type(hf, layers, size, [size is not None and layer >= first for layer in range(layers)])


def read_qwen2(hf: HF) -> ModelConfig:
    """Read the configuration of a Qwen2 model."""
    hf = QWEN2 | hf
    return read_decoder(hf, "qwen2", attention_bias=True, windows=_upper_windows(hf))


def read_qwen3(hf: HF) -> ModelConfig:
    """Read the configuration of a Qwen3 model."""
    hf = QWEN3 | hf
    return read_decoder(hf, "qwen3", qk_norm="head", windows=_upper_windows(hf), **biases(hf))


def read_qwen3_moe(hf: HF) -> ModelConfig:
    """Read the configuration of a Qwen3 MoE model."""
    hf = QWEN3_MOE | hf
    layers = integer(hf, "num_hidden_layers")
    every, dense = integer(hf, "decoder_sparse_step"), hf["mlp_only_layers"]
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise wrong("mlp_only_layers", dense, "a list of layer numbers")
    if every < 1:
        raise wrong("decoder_sparse_step", every, "at least 1")
    # transformers 5 writes the second name, other programs the first.
    counts = {hf[name] for name in ("num_experts", "num_local_experts") if hf.get(name) is not None}
    if len(counts) > 1:
        raise UserError("fields 'num_experts' and 'num_local_experts' differ; they must be equal")
    return read_decoder(
        hf,
        "qwen3_moe",
        qk_norm="head",
        windows=same_windows(_window_in_use(hf), layers),
        num_experts=integer({"num_experts": next(iter(counts), 128)}, "num_experts"),
        experts_per_token=integer(hf, "num_experts_per_tok"),
        moe_intermediate_size=integer(hf, "moe_intermediate_size"),
        normalize_expert_weights=boolean(hf, "norm_topk_prob"),
        dense_layers=tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % every),
        **biases(hf),
    )


def read_olmo2(hf: HF) -> ModelConfig:
    """Read the configuration of a OLMo 2 model."""
    hf = OLMO2 | hf
    return read_decoder(hf, "olmo2", pre_norm=False, post_norm=True, qk_norm="projection", **biases(hf))


def read_smollm3(hf: HF) -> ModelConfig:
    """Read the configuration of a SmolLM3 model."""
    hf = SMOLLM3 | hf
    layers, size = integer(hf, "num_hidden_layers"), _window_in_use(hf)
    rotated = layer_list(hf, "no_rope_layers", layers)
    if rotated is None:
        every = integer(hf, "no_rope_layer_interval")
        if every < 1:
            raise wrong("no_rope_layer_interval", every, "at least 1")
        rotated = [(layer + 1) % every != 0 for layer in range(layers)]
    if not all(value in (0, 1) for value in rotated):
        raise wrong("no_rope_layers", rotated, "a list of 1 (rotary positions) and 0 (none)")
    return read_decoder(
        hf,
        "smollm3",
        nope_layers=tuple(layer for layer in range(layers) if not rotated[layer]),
        windows=windows_by_type(hf, layers, size, [size is not None and not value for value in rotated]),
        mlp_bias=boolean(hf, "mlp_bias"),
        **biases(hf),
    )


def read_phi3(hf: HF) -> ModelConfig:
    """Read the configuration of a Phi-3 model."""
    hf = PHI3 | hf
    name, rope = rope_object(hf)
    kind = rope_kind(rope)
    if kind in ("su", "yarn"):  # the names in early Phi-3 checkpoints
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise UserError(f"{name}: 'rope_type' is {kind!r}; phi3 supports default and longrope")
    hf[name] = {**rope, "rope_type": kind}
    windows = same_windows(sliding_window(hf), integer(hf, "num_hidden_layers"))
    return read_decoder(hf, "phi3", partial_rotary=True, windows=windows)


# Writing


def write_decoder(config: ModelConfig) -> HF:
    """Return the fields that Llama and its descendants share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation_name(config),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
        **token_ids(config),
    }


def write_llama(config: ModelConfig) -> HF:
    """Return the fields of a Llama model."""
    return write_decoder(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def write_mistral(config: ModelConfig) -> HF:
    """Return the fields of a Mistral model."""
    return write_decoder(config) | {"sliding_window": window_size(config)}


def write_mixtral(config: ModelConfig) -> HF:
    """Return the fields of a Mixtral model."""
    experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    return write_mistral(config) | experts


def _write_windows(config: ModelConfig) -> HF:
    return {
        "use_sliding_window": window_size(config) is not None,
        "sliding_window": window_size(config),
        "layer_types": layer_types(config),
    }


def write_qwen2(config: ModelConfig) -> HF:
    """Return the fields of a Qwen2 model."""
    sliding = [layer for layer in range(config.num_layers) if config.window(layer)]
    # Older readers use the number of full layers at the bottom, newer ones the list.
    bottom = {"max_window_layers": sliding[0] if sliding else config.num_layers}
    return write_decoder(config) | _write_windows(config) | bottom


def write_qwen3(config: ModelConfig) -> HF:
    """Return the fields of a Qwen3 model."""
    return write_qwen2(config) | {"attention_bias": config.attention_bias}


def write_qwen3_moe(config: ModelConfig) -> HF:
    """Return the fields of a Qwen3 MoE model."""
    return write_decoder(config) | {
        "attention_bias": config.attention_bias,
        "use_sliding_window": window_size(config) is not None,
        "sliding_window": window_size(config),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.normalize_expert_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }


def write_olmo2(config: ModelConfig) -> HF:
    """Return the fields of a OLMo 2 model."""
    return write_decoder(config) | {"attention_bias": config.attention_bias}


def write_smollm3(config: ModelConfig) -> HF:
    """Return the fields of a SmolLM3 model."""
    rotated = [int(layer not in config.nope_layers) for layer in range(config.num_layers)]
    return write_llama(config) | _write_windows(config) | {"no_rope_layers": rotated}


def write_phi3(config: ModelConfig) -> HF:
    """Return the fields of a Phi-3 model."""
    hf = write_mistral(config)
    scaling = config.rope_scaling
    if config.rotary_dim is not None:
        hf["partial_rotary_factor"] = hf["rope_parameters"]["partial_rotary_factor"] = partial_factor(config)
    if scaling is not None:
        hf["original_max_position_embeddings"] = scaling.original_max_positions
        rope = scaling_object(scaling) or {}
        if scaling.factor == config.max_positions / scaling.original_max_positions:
            # Early readers accept only these three and compute the rest, as all other readers do.
            rope = {
                "type": "longrope",
                "short_factor": rope["short_factor"],
                "long_factor": rope["long_factor"],
            }
            if scaling.attention_factor is not None:
                rope["attention_factor"] = scaling.attention_factor
        hf["rope_scaling"] = rope
    return hf
