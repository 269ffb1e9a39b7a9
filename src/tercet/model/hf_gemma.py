"""Convert ``config.json`` of Gemma 2 and of Gemma 3's text model to `ModelConfig` and back."""

from __future__ import annotations

from typing import Any

from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.hf_config import LLAMA, biases, read_decoder, write_decoder
from tercet.model.hf_fields import (
    HF,
    integer,
    layer_types,
    number,
    positive,
    refuse,
    sliding_window,
    window_size,
    windows_by_type,
    wrong,
)
from tercet.model.hf_rope import rope_kind, scaling_object

GEMMA2 = LLAMA | {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GEMMA3 = GEMMA2 | {
    "vocab_size": 262_208, "max_position_embeddings": 131_072, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
}  # fmt: skip


def _read(hf: HF, family: str, every: int, **choices: Any) -> ModelConfig:
    """Read the fields that both share; unless layers are listed, every ``every``-th layer has no window."""
    refuse(hf, "use_bidirectional_attention", False)
    layers = integer(hf, "num_hidden_layers")
    scalar = number(hf, "query_pre_attn_scalar")
    if scalar <= 0:
        raise wrong("query_pre_attn_scalar", scalar, "above 0")
    return read_decoder(
        hf,
        family,
        act="hidden_activation",
        norm_offset=1.0,
        post_norm=True,
        embedding_scale=integer(hf, "hidden_size") ** 0.5,
        attention_scale=scalar**-0.5,
        logit_softcap=positive(hf, "final_logit_softcapping"),
        windows=windows_by_type(
            hf, layers, sliding_window(hf), [(layer + 1) % every != 0 for layer in range(layers)]
        ),
        **biases(hf),
        **choices,
    )


def read_gemma2(hf: HF) -> ModelConfig:
    """Read the configuration of a Gemma 2 model."""
    hf = GEMMA2 | hf
    return _read(hf, "gemma2", 2, attention_softcap=positive(hf, "attn_logit_softcapping"))


def read_gemma3(hf: HF) -> ModelConfig:
    """Read the configuration of a Gemma 3 text model (``model_type`` gemma3_text).

    Local layers, which have a window, have their own rotary base without scaling.
    """
    hf = GEMMA3 | hf
    refuse(hf, "attn_logit_softcapping", None)
    every = integer(hf, "sliding_window_pattern")
    if every < 1:
        raise wrong("sliding_window_pattern", every, "at least 1")
    by_type = hf.get("rope_parameters") or {}
    for name in ("full_attention", "sliding_attention"):
        if not isinstance(by_type, dict) or not isinstance(by_type.get(name) or {}, dict):
            raise wrong("rope_parameters", by_type, "an object with full_attention and sliding_attention")
    if unknown := [name for name in by_type if name not in ("full_attention", "sliding_attention")]:
        raise UserError(
            f"field 'rope_parameters' contains {unknown[0]!r}; supported are full_attention, sliding_attention"
        )
    local = by_type.get("sliding_attention") or {}
    if rope_kind(local) != "default":
        raise UserError(
            f"rope_parameters: 'rope_type' of sliding_attention is {rope_kind(local)!r}; only default is supported"
        )
    older, newer = hf.get("rope_scaling") or {}, by_type.get("full_attention") or {}
    if not isinstance(older, dict):
        raise wrong("rope_scaling", older, "an object")
    hf["rope_scaling"], hf["rope_parameters"] = None, newer | older
    source = local if local.get("rope_theta") is not None else {"rope_theta": hf["rope_local_base_freq"]}
    return _read(hf, "gemma3_text", every, qk_norm="head", local_rope_theta=number(source, "rope_theta"))


def _write(config: ModelConfig) -> HF:
    hf = write_decoder(config)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return hf | {
        "hidden_activation": hf["hidden_act"],  # the name for older readers
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "attention_bias": config.attention_bias,
        "sliding_window": window_size(config) or GEMMA2["sliding_window"],  # required even where unused
        "layer_types": layer_types(config),
    }


def write_gemma2(config: ModelConfig) -> HF:
    """Return the fields of a Gemma 2 model."""
    return _write(config)


def write_gemma3(config: ModelConfig) -> HF:
    """Return the fields of a Gemma 3 text model."""
    scaling = scaling_object(config.rope_scaling) or {"rope_type": "default"}
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return _write(config) | {
        "rope_local_base_freq": config.local_rope_theta,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": config.rope_theta},
            "sliding_attention": local,
        },
    }
