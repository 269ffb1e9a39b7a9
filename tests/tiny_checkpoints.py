"""Small random checkpoints made by transformers, the reference that Tercet's network is compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Further fields that some families need, because their defaults do not fit these sizes.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "pad_token_id": 0, "query_pre_attn_scalar": 5},
    "gemma3_text": {"head_dim": 8, "pad_token_id": 0, "query_pre_attn_scalar": 5},
    "phi3": {"pad_token_id": 0, "original_max_position_embeddings": 16},
    "olmo2": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    "qwen3": {"head_dim": 8},
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.5, 7.0],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
TWO_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

# Every family with each variant that its configuration can select.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama: every head its own keys": ("llama", {"num_key_value_heads": None}),
    "llama: tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama: biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama: gelu": ("llama", {"hidden_act": "gelu"}),
    "llama: base 500000": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama: linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "llama: dynamic, longer than trained": (
        "llama", {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "llama: llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama: yarn": ("llama", {"rope_parameters": YARN}),
    "llama: yarn, all fields": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4,
                             "truncate": False}},
    ),
    "llama: yarn, own attention factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "mistral: window of 5": ("mistral", {"sliding_window": 5}),
    "mistral: no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"sliding_window": 5}),  # not in use: use_sliding_window is false
    "qwen2: windows above layer 1": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2: windows by layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": TWO_WINDOWS},
    ),
    "qwen3: tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3: biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "gemma2: window of 5 in every other layer": ("gemma2", {"sliding_window": 5}),
    "gemma2: tight caps": (
        "gemma2", {"sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2: no caps, untied, biases": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False,
         "attention_bias": True, "layer_types": TWO_WINDOWS},
    ),
    "gemma3: local and global": (
        "gemma3_text", {"sliding_window": 5, "layer_types": TWO_WINDOWS, "rope_parameters": GEMMA3_ROPE},
    ),
    "gemma3: global layers stretched": (
        "gemma3_text",
        {"sliding_window": 5, "layer_types": TWO_WINDOWS, "final_logit_softcapping": 4.0,
         "rope_parameters": GEMMA3_ROPE | {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    ),
    "gemma3: all local": ("gemma3_text", {"sliding_window": 5}),
    "gemma2: no windows": ("gemma2", {"layer_types": ["full_attention"] * 3}),
    "gemma3: no windows": ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    "phi3: window of 5": ("phi3", {"sliding_window": 5}),
    "phi3: a part rotated": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}),
    "phi3: longrope, longer than trained": ("phi3", {"rope_parameters": LONGROPE}),
    "phi3: longrope, not longer": (
        "phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE, "tie_word_embeddings": True},
    ),
    "phi3: longrope, own factors": (
        "phi3",
        {"rope_parameters": LONGROPE | {"attention_factor": 1.3, "short_factor": [1.5], "long_factor": [9.0],
                                        "partial_rotary_factor": 0.25}},
    ),
    "llama: longrope": ("llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 20, "factor": 2.0}}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox: one after the other, tied, half rotated": (
        "gpt_neox",
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new",
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox: no attention bias, linear": (
        "gpt_neox",
        {"attention_bias": False,
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2: biases, every head its own keys": ("olmo2", {"attention_bias": True, "num_key_value_heads": None}),
    "smollm3: layer 1 without positions": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3: windows, biases, interval": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2, "attention_bias": True,
         "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "mixtral": ("mixtral", {}),
    "mixtral: window of 5, one expert a token": ("mixtral", {"sliding_window": 5, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe: plain layers, weights sum to one": (
        "qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": True, "head_dim": 16, "attention_bias": True},
    ),
    "qwen3_moe: every second layer, windows": (
        "qwen3_moe", {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2: untied, narrow, gelu": (
        "gpt2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"},
    ),
}  # fmt: skip

Make = Callable[..., tuple[Any, Path]]


def save_random(directory: Path, family: str, **fields: Any) -> Any:
    """Save a transformers model with random weights in ``directory`` and return it."""
    sizes = GPT2_SIZES if family == "gpt2" else SIZES | FAMILY_FIELDS.get(family, {})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**sizes, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms and biases too: their initial ones and zeros would hide mistakes
            parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    return model


def reload(directory: Path) -> Any:
    """Load a directory with transformers and check that it neither misses nor ignores a weight."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()
