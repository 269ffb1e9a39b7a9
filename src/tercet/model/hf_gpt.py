"""Convert ``config.json`` of GPT-2 and GPT-NeoX (Pythia) to `ModelConfig` and back."""

from __future__ import annotations

from tercet.model.config import ModelConfig
from tercet.model.hf_fields import (
    HF,
    activation,
    activation_name,
    boolean,
    eos_ids,
    head_size,
    integer,
    number,
    optional_integer,
    refuse,
    token_ids,
)
from tercet.model.hf_rope import partial_factor, read_rope, read_rotary_dim, write_rope

GPT2: HF = {
    "vocab_size": 50_257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 50_256, "eos_token_id": 50_256,
}  # fmt: skip
GPT_NEOX: HF = {
    "vocab_size": 50_432, "hidden_size": 6144, "intermediate_size": 24_576, "num_hidden_layers": 44,
    "num_attention_heads": 64, "max_position_embeddings": 2048, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25, "rotary_emb_base": 10_000.0, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def read_gpt2(hf: HF) -> ModelConfig:
    """Read the configuration of a GPT-2 model."""
    hf = GPT2 | hf
    refuse(hf, "scale_attn_weights", True)
    refuse(hf, "scale_attn_by_inverse_layer_idx", False)
    refuse(hf, "add_cross_attention", False)
    hidden, heads = integer(hf, "n_embd"), integer(hf, "n_head")
    inner = optional_integer(hf, "n_inner")
    return ModelConfig(
        family="gpt2",
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=4 * hidden if inner is None else inner,
        num_layers=integer(hf, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_size(hidden, heads, "n_embd", "n_head"),
        max_positions=integer(hf, "n_positions"),
        norm="layer",
        norm_eps=number(hf, "layer_norm_epsilon"),
        positions="learned",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=activation(hf, "activation_function"),
        tie_embeddings=boolean(hf, "tie_word_embeddings"),
        bos_token_id=optional_integer(hf, "bos_token_id"),
        eos_token_ids=eos_ids(hf),
        pad_token_id=optional_integer(hf, "pad_token_id"),
    )


def write_gpt2(config: ModelConfig) -> HF:
    """Return the fields of a GPT-2 model."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,  # for older readers
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "activation_function": activation_name(config, gelu_tanh="gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids(config),
    }


def read_gpt_neox(hf: HF) -> ModelConfig:
    """Read the configuration of a GPT-NeoX model."""
    # The rotary base and the rotated part have other names in this family, which take precedence.
    hf = GPT_NEOX | hf
    hf |= {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    head_dim = head_size(hidden, heads, "hidden_size", "num_attention_heads")
    refuse(hf, "head_dim", head_dim)
    max_positions = integer(hf, "max_position_embeddings")
    theta, scaling = read_rope(hf, max_positions)
    bias = boolean(hf, "attention_bias", True)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(hf, "intermediate_size"),
        num_layers=integer(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm="layer",
        norm_eps=number(hf, "layer_norm_eps"),
        parallel_residual=boolean(hf, "use_parallel_residual", True),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=read_rotary_dim(hf, head_dim),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        gated_mlp=False,
        activation=activation(hf, "hidden_act"),
        tie_embeddings=boolean(hf, "tie_word_embeddings"),
        bos_token_id=optional_integer(hf, "bos_token_id"),
        eos_token_ids=eos_ids(hf),
        pad_token_id=optional_integer(hf, "pad_token_id"),
    )


def write_gpt_neox(config: ModelConfig) -> HF:
    """Return the fields of a GPT-NeoX model."""
    factor = partial_factor(config)
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = factor
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "hidden_act": activation_name(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rotary_pct": factor,
        "rotary_emb_base": config.rope_theta,
        **rope,
        **token_ids(config),
    }
