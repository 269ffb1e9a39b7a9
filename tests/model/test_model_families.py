"""Every family computes what transformers computes, and is read and written as transformers reads and writes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import Make, reload

from tercet.errors import UserError
from tercet.model.checkpoint import read_config
from tercet.model.config import ModelConfig
from tercet.model.families import config_from_hf, config_to_hf
from tercet.model.loading import load_model, save_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TWO_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

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
    "gpt2": ("gpt2", {}),
    "gpt2: untied, narrow, gelu": (
        "gpt2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(
    case: str, make: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    family, fields = CASES[case]
    theirs, directory = make(family, **fields)
    ours = load_model(directory)
    expected = theirs(tokens).logits
    assert expected.std() > 0.1  # large enough for 1e-4 to mean something
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)

    padding = torch.ones_like(tokens)
    padding[0, :7] = 0  # on the left, as transformers generates
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=padding, position_ids=positions).logits
    padded = ours(tokens, positions=positions, segments=padding)
    torch.testing.assert_close(padded[padding == 1], expected[padding == 1], atol=1e-4, rtol=0)

    save_model(ours, tmp_path / "ours")
    torch.testing.assert_close(
        reload(tmp_path / "ours")(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0
    )
    assert read_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
@torch.no_grad()
def test_packed_documents_are_computed_as_if_alone(family: str, make: Make, tokens: torch.Tensor) -> None:
    window = {"mistral": {"sliding_window": 5}, "qwen3": {"head_dim": 8}}.get(family, {})
    theirs, directory = make(family, **window)
    ours = load_model(directory)
    lengths = [11, 1, 18]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = ours(tokens[:1], positions=positions, segments=segments)[0]
    for document, logits in zip(tokens[0].split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(logits, theirs(document[None]).logits[0], atol=1e-4, rtol=0)


# config.json

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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_fields_left_out_have_the_defaults_of_transformers(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family)
    ours = config_from_hf({"model_type": family}, "config.json")
    assert ours == config_from_hf(theirs.to_dict(), "config.json")  # theirs spells every field out
    eos = theirs.eos_token_id
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, () if eos is None else (eos,))


def test_both_layouts_are_written() -> None:
    config = config_from_hf(OLD_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json")
    hf = config_to_hf(replace(config, rope_theta=20_000.0), "bfloat16")
    assert hf["rope_theta"] == 20_000.0 and hf["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert hf["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 20_000.0}
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"


def test_a_choice_that_the_family_has_no_field_for_is_not_lost_in_silence() -> None:
    config = ModelConfig("llama", 61, 32, 48, 2, 4, 2, 8, 64, qk_norm=True)
    with pytest.raises(ValueError, match="qk_norm=True"):
        config_to_hf(config, "float32")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'"),
        ({"model_type": None, "architectures": []}, "None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"hidden_size": "big"}, "'hidden_size' is 'big'"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not a multiple of num_attention_heads 32"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
        ({"vocab_size": None}, "'vocab_size' is None"),
        ({"attention_bias": "no"}, "'attention_bias' is 'no'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling: rope_type 'longrope'"),
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
        ({"model_type": "gpt2", "architectures": None, "n_head": 7}, "n_embd 768"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_LLAMA | fields))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert named in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)
