"""Small random checkpoints, made by transformers: the reference that the network is held against."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What some families need beyond that, their defaults being too large for the rest.
MORE: dict[str, dict[str, Any]] = {
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

Make = Callable[..., tuple[Any, Path]]


def reload(directory: Path) -> Any:
    """What transformers makes of a directory; it must not miss or ignore any weight."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()
