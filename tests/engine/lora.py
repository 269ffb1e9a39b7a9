"""Adapters made by peft on tiny checkpoints, far from zero, and their logits by peft."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray

Logits = NDArray[np.float32]

# Family, its fields, and those of peft's LoraConfig.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama: rank-stabilised": ("llama", {}, {"use_rslora": True}),
    "llama: some layers by name": ("llama", {}, {"target_modules": ["q_proj", "down_proj"]}),
    "llama: one layer by pattern": ("llama", {}, {"target_modules": r".*layers\.1\..*\.(v_proj|o_proj|up_proj)"}),
    "llama: own ranks": (
        "llama", {},
        {"rank_pattern": {"q_proj": 1, r"layers\.1\..*up_proj": 35}, "alpha_pattern": {"o_proj": 7}},
    ),
    "llama: biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama: odd sizes": (
        "llama",
        {"vocab_size": 67, "hidden_size": 52, "intermediate_size": 71, "head_dim": 26, "num_attention_heads": 2,
         "num_key_value_heads": 1},
        {"r": 3},
    ),
    "qwen3": ("qwen3", {}, {}),
    "gemma2": ("gemma2", {}, {}),
    "olmo2": ("olmo2", {}, {}),
    "phi3": ("phi3", {}, {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 9}}),
    "gpt_neox": ("gpt_neox", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "mixtral: attention": ("mixtral", {}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
}  # fmt: skip


def make_adapter(base: Path, directory: Path, seed: int = 3, **fields: Any) -> Any:
    """Save an adapter of random numbers; return peft's model with it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **fields}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    wrapped.save_pretrained(directory)
    return wrapped


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int]) -> Logits:
    logits: Logits = model(torch.tensor([list(tokens)])).logits[0].float().numpy()
    return logits
