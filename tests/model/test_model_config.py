"""config.json of every family: both layouts are read as transformers reads them; unsupported fields are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tercet.errors import UserError
from tercet.model.checkpoint import read_config
from tercet.model.config import ModelConfig
from tercet.model.families import FAMILIES, config_from_hf, config_to_hf
from tercet.model.loading import load_model
from tiny_checkpoints import Make

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def new(model_type: str, **fields: Any) -> dict[str, Any]:
    """Return the fields that turn the Llama below into another family with that family's default sizes."""
    return {"model_type": model_type, "architectures": None, "max_position_embeddings": 4096, **fields}


OLD_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 128}


def test_the_layout_of_transformers_4_is_read() -> None:
    old = OLD_LLAMA | {
        "rope_theta": 500_000.0, "torch_dtype": "bfloat16", "eos_token_id": [5, 6],
        "rope_scaling": {**LLAMA3, "type": "llama3", "original_max_position_embeddings": 32},
    }  # fmt: skip
    config = config_from_hf(old, "config.json")
    assert (config.rope_theta, config.eos_token_ids) == (500_000.0, (5, 6))
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.original_max_positions) == ("llama3", 32)
    linear = config_from_hf(OLD_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json")
    assert linear.rope_scaling is not None and linear.rope_scaling.kind == "linear"


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_left_out_have_the_defaults_of_transformers(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family)
    ours = config_from_hf({"model_type": family}, "config.json")
    assert ours == config_from_hf(theirs.to_dict(), "config.json")  # theirs spells every field out
    eos = theirs.eos_token_id
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, () if eos is None else (eos,))


# As the model cards of these have it, shortened: fields of transformers 4 and before.
OLD: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 5,
        "query_pre_attn_scalar": 144, "rope_theta": 20000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 13, "rope_local_base_freq": 20000, "rope_theta": 500000, "sliding_window": 512,
        "sliding_window_pattern": 4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "eos_token_id": [1, 106],
    },
    "phi3": {
        "max_position_embeddings": 131072, "original_max_position_embeddings": 2048, "partial_rotary_factor": 0.75,
        "rope_theta": 20000.0, "sliding_window": 262144, "tie_word_embeddings": True, "num_key_value_heads": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 36, "long_factor": [2.5] * 36},
    },
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 5000, "use_parallel_residual": False, "hidden_dropout": 0.0},
    "olmo2": {"rope_theta": 500000, "num_hidden_layers": 4, "rope_scaling": None},
    "smollm3": {
        "no_rope_layers": [1, 1, 1, 0, 1, 1], "num_hidden_layers": 6, "rope_theta": 5000000.0, "rope_scaling": None,
        "max_window_layers": 28, "use_sliding_window": False, "sliding_window": None,
        "layer_types": ["full_attention"] * 6,
    },
    "mixtral": {"rope_theta": 500000.0, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 3},
    "qwen3_moe": {
        "head_dim": 128, "max_window_layers": 48, "num_experts": 64, "norm_topk_prob": True, "rope_theta": 1000000.0,
        "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "num_hidden_layers": 7,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OLD)
def test_older_field_names_are_understood_as_transformers_does(family: str) -> None:
    ours = config_from_hf({"model_type": family, **OLD[family]}, "config.json")
    theirs = transformers.AutoConfig.for_model(family, **OLD[family]).to_dict()
    assert not theirs.keys() & {"rope_theta", "rope_local_base_freq", "rotary_pct"}  # the new layout
    assert ours == config_from_hf(theirs, "config.json")
    written = config_to_hf(ours, "float32")
    again = transformers.AutoConfig.for_model(**written).to_dict()
    assert ours == config_from_hf(again, "config.json")
    # Old and new readers use their own layout: without the other layout nothing changes.
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert ours == config_from_hf(older, "config.json")


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_early_names_of_longrope_are_understood(kind: str) -> None:
    fields = OLD["phi3"]
    early = fields | {"rope_scaling": fields["rope_scaling"] | {"type": kind}}
    ours, expected = (
        config_from_hf({"model_type": "phi3", **fields_of_phi3}, "config.json")
        for fields_of_phi3 in (early, fields)
    )
    assert ours == expected


def test_the_text_part_of_a_gemma_3_with_pictures_is_a_text_model(make: Make, tokens: torch.Tensor) -> None:
    theirs, directory = make("gemma3_text", sliding_window=5)
    path = directory / "config.json"
    text = json.loads(path.read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    path.write_text(json.dumps(whole | {"vision_config": {}, "tie_word_embeddings": True}))
    ours = load_model(directory)
    assert ours.config.family == "gemma3_text"
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    state = safetensors.torch.load_file(directory / "model.safetensors")
    state = {f"language_model.{name}": tensor for name, tensor in state.items()}
    state["vision_tower.patch.weight"] = torch.ones(2)
    safetensors.torch.save_file(state, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"vision_tower\.patch\.weight belongs to a vision model"):
        load_model(directory)


def test_both_layouts_are_written() -> None:
    config = config_from_hf(OLD_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json")
    hf = config_to_hf(replace(config, rope_theta=20_000.0), "bfloat16")
    assert hf["rope_theta"] == 20_000.0 and hf["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert hf["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 20_000.0}
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"


def test_a_choice_that_the_family_cannot_express_raises() -> None:
    config = ModelConfig("llama", 61, 32, 48, 2, 4, 2, 8, 64, qk_norm="head")
    with pytest.raises(ValueError, match="qk_norm='head'"):
        config_to_hf(config, "float32")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'"),
        ({"model_type": None, "architectures": []}, "None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"hidden_size": "big"}, "'hidden_size' is 'big'"),
        ({"hidden_size": 4100}, "'hidden_size' is 4100; it must be a multiple of 'num_attention_heads', 32"),
        ({"num_attention_heads": 0}, "a multiple of 'num_attention_heads', 0"),
        ({"num_key_value_heads": 5}, "a multiple of `num_kv_heads`, 5"),
        ({"vocab_size": None}, "'vocab_size' is None"),
        ({"attention_bias": "no"}, "'attention_bias' is 'no'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_scaling: 'rope_type' is 'spiral'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope_scaling: field 'short_factor' is None",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor' is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "'low_freq_factor' is None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 0}, "'sliding_window' is 0"),
        ({"model_type": "qwen2", "architectures": None, "layer_types": ["full_attention"]}, "'layer_types'"),
        (
            {"model_type": "qwen3", "architectures": None, "layer_types": ["linear_attention"] * 32},
            "'linear_attention'",
        ),
        ({"model_type": "gpt2", "architectures": None, "scale_attn_weights": False}, "'scale_attn_weights'"),
        (
            {"model_type": "gpt2", "architectures": None, "scale_attn_by_inverse_layer_idx": True},
            "'scale_attn_by_inv",
        ),
        ({"model_type": "gpt2", "architectures": None, "n_head": 7}, "'n_embd' is 768"),
        (new("gemma2", use_bidirectional_attention=True), "'use_bidirectional_attention' is True"),
        (new("gemma2", query_pre_attn_scalar=0), "'query_pre_attn_scalar' is 0.0"),
        (new("gemma2", attn_logit_softcapping=-1), "'attn_logit_softcapping' is -1.0"),
        (new("gemma2", sliding_window=None), "no 'sliding_window' is in use"),
        (new("gemma3_text", attn_logit_softcapping=50.0), "'attn_logit_softcapping' is 50.0"),
        (
            new("gemma3_text", rope_parameters={"rope_type": "default"}),
            "'rope_parameters' contains 'rope_type'",
        ),
        (
            new("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "'rope_type' of sliding_attention is 'linear'",
        ),
        (new("gemma3_text", sliding_window_pattern=0), "'sliding_window_pattern' is 0"),
        (new("gemma3"), "'text_config' is None"),
        (new("gemma3", text_config={"hidden_size": "big"}), "'hidden_size' is 'big'"),
        (
            new("phi3", rope_scaling={"type": "linear", "factor": 2.0}),
            "'rope_type' is 'linear'; phi3 supports",
        ),
        (
            new("phi3", rope_scaling={"type": "su", "short_factor": [1.0], "long_factor": [1.0]}),
            "`short_factor` of longrope has 1 numbers; it must have 48",
        ),
        (
            {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "2 dimensions of each head are rotated; dynamic scaling needs at least 4",
        ),
        (
            new("phi3", partial_rotary_factor=0.01),
            "0 dimensions of each head are rotated; it must be an even number from 2 to `head_dim`, 96",
        ),
        (new("gpt_neox", rotary_pct=0.33), "31 dimensions of each head are rotated"),
        (new("gpt_neox", head_dim=32), "'head_dim' is 32"),
        (new("smollm3", no_rope_layers=[1, 0]), "'no_rope_layers' is [1, 0]"),
        (new("smollm3", no_rope_layer_interval=0), "'no_rope_layer_interval' is 0"),
        (
            new("mixtral", num_experts_per_tok=9),
            "`experts_per_token` is 9; it must be from 1 to `num_experts`, 8",
        ),
        (
            new("qwen3_moe", num_experts=4, num_local_experts=8),
            "'num_experts' and 'num_local_experts' differ",
        ),
        (new("qwen3_moe", mlp_only_layers=3), "'mlp_only_layers' is 3"),
        (new("qwen3_moe", mlp_only_layers=0), "'mlp_only_layers' is 0"),
        (new("qwen3_moe", decoder_sparse_step=0), "'decoder_sparse_step' is 0"),
        (new("olmo2", partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_LLAMA | fields))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert named in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)
