"""LoRA adapters: the real peft reads ours, we read those of the real peft, and logits agree."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from tercet.errors import UserError
from tercet.model.adapter import (
    AdapterConfig,
    LoRALinear,
    add_lora,
    is_adapter,
    load_adapter,
    merge_lora,
    read_adapter_config,
    save_adapter,
)
from tercet.model.loading import load_model, save_model
from tercet.model.transformer import Transformer
from tiny_checkpoints import Make

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out is set to False:UserWarning"
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama: rank-stabilised": ("llama", {"use_rslora": True}),
    "llama: some layers by name": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "llama: one layer by pattern": ("llama", {"target_modules": r".*layers\.1\..*\.(o_proj|up_proj)"}),
    "llama: without the MLP": ("llama", {"exclude_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "llama: own ranks": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 5},
                                   "alpha_pattern": {"o_proj": 7}}),
    "llama: own ranks, rank-stabilised": ("llama", {"rank_pattern": {"v_proj": 6}, "use_rslora": True}),
    "llama: only the first layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": (0,)}),
    "llama: two layers": (
        "llama", {"target_modules": ["o_proj"], "layers_to_transform": (2, 0), "layers_pattern": ("layers",)}),
    "llama: a layer and a whole name": (
        "llama", {"target_modules": ["v_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": (1,)}),
    "gpt2: only layer 1": (
        "gpt2", {"target_modules": ["c_attn"], "layers_to_transform": (1,), "layers_pattern": ("x", "h")}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "phi3": ("phi3", {}),
    "phi3: own ranks": ("phi3", {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 9}}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox: attention": ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "use_rslora": True}),
    "mixtral: attention": ("mixtral", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "qwen3_moe: attention": ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"]}),
    "gpt2": ("gpt2", {}),
    "gpt2: rank-stabilised": ("gpt2", {"use_rslora": True}),
    "gpt2: attention": ("gpt2", {"target_modules": ["c_attn"]}),
    "gpt2: both c_proj of one layer": ("gpt2", {"target_modules": r".*h\.1\..*c_proj"}),
    "gpt2: own ranks": ("gpt2", {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"mlp.c_proj": 9}}),
}  # fmt: skip


def ours_config(fields: dict[str, Any], base: Path) -> AdapterConfig:
    changed = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return AdapterConfig(r=4, alpha=6, base_model=str(base), **changed)


def randomise(model: Any) -> None:
    """Randomise B, whose initial zeros would hide the adapter's effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)


def peft_on(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings(
        record=True
    ) as caught:  # a warning about keys or patterns is a defect of Tercet
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert not [
        str(warning.message) for warning in caught if "is_gradient_checkpointing" not in str(warning.message)
    ]
    return loaded


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_peft_reads_adapters_of_tercet(case: str, make: Make, tokens: torch.Tensor, tmp_path: Path) -> None:
    family, fields = CASES[case]
    theirs, base = make(family)
    model, config = load_model(base), ours_config(fields, base)
    add_lora(model, config, seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", config)
    expected = model(tokens)
    assert (expected - theirs(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(
        peft_on(base, tmp_path / "adapter")(tokens).logits, expected, atol=1e-4, rtol=0
    )
    again = load_model(base)
    assert load_adapter(again, tmp_path / "adapter").base_model == str(base)
    torch.testing.assert_close(again(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_adapters_of_peft_are_read_and_written_back(
    case: str, make: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    family, fields = CASES[case]
    _, base = make(family)
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", **{"target_modules": "all-linear", **fields}
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), lora).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(base)
    config = load_adapter(model, tmp_path / "theirs")
    expected = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
    save_adapter(model, tmp_path / "ours", config)
    before, after = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(peft_on(base, tmp_path / "ours")(tokens).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
@torch.no_grad()
def test_merged_weights_give_the_same_logits(
    family: str, make: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    _, base = make(family)
    model = load_model(base)
    add_lora(model, AdapterConfig(r=4), seed=0)
    randomise(model)
    expected = model(tokens)
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=0)
    save_model(model, tmp_path / "merged")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reference(tokens).logits, expected, atol=1e-4, rtol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_merging_into_bfloat16_rounds_once(make: Make) -> None:
    _, base = make("llama")
    model = load_model(base, dtype=torch.bfloat16)
    add_lora(model, AdapterConfig(r=4, alpha=3), seed=0)
    randomise(model)
    layer = model.model.layers[0].self_attn.q_proj
    a, b, weight = (
        tensor.double() for tensor in (layer.lora_A.weight, layer.lora_B.weight, layer.base.weight)
    )
    merge_lora(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, (weight + b @ a * 0.75).float().bfloat16(), atol=0, rtol=2**-8)


# A fresh adapter


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(make: Make, tokens: torch.Tensor) -> None:
    _, base = make("llama")
    model = load_model(base, trainable=True)
    before, weights = model(tokens), {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, AdapterConfig(), seed=0)
    assert torch.equal(model(tokens), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 3 and all(".lora_A." in name or ".lora_B." in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # A moves from the second step on: its gradient is zero while B is
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).backward()
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    assert all(not torch.equal(start[name], p) for name, p in model.named_parameters() if name in trained)
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter, weights[name.replace(".base.", ".")])


def matrices(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def test_initialisation_is_pefts_and_depends_on_the_seed(make: Make) -> None:
    _, base = make("llama")
    models = [load_model(base) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, AdapterConfig(r=64), seed)
    first, same, other = (matrices(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "model.layers.0.mlp.down_proj.lora_A.weight"
    assert not torch.equal(first[name], other[name])
    # Kaiming-uniform with a = sqrt(5): uniform within sqrt(6 / ((1 + 5) * 48)).
    bound = math.sqrt(1 / 48)
    assert 0.97 * bound < first[name].abs().max() <= bound
    assert first[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)


def test_scaling() -> None:
    assert AdapterConfig().scaling(16, AdapterConfig().whole_alpha) == 2.0
    assert AdapterConfig(use_rslora=True).scaling(16, 32) == 8.0


@torch.no_grad()
def test_adapters_stay_float32_under_bfloat16(make: Make, tokens: torch.Tensor) -> None:
    _, base = make("llama")
    wide, narrow = load_model(base), load_model(base, dtype=torch.bfloat16)
    for model in (wide, narrow):
        add_lora(model, AdapterConfig(r=4), seed=0)
        randomise(model)
    assert {tensor.dtype for tensor in matrices(narrow).values()} == {torch.float32}
    torch.testing.assert_close(narrow(tokens), wide(tokens), atol=0.1, rtol=0.1)
    wide.compute_dtype = torch.bfloat16
    torch.testing.assert_close(narrow(tokens), wide(tokens), atol=0.1, rtol=0.1)


def test_the_directory_is_what_peft_writes(make: Make, tmp_path: Path) -> None:
    _, base = make("gpt2")
    model, config = load_model(base), AdapterConfig(r=4, base_model="org/name")
    add_lora(model, config, seed=0)
    save_adapter(model, tmp_path, config)
    text = (tmp_path / CONFIG).read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert content["inference_mode"] is True and content["task_type"] == "CAUSAL_LM"
    assert (content["r"], content["lora_alpha"], content["base_model_name_or_path"]) == (4, 8, "org/name")
    assert content["target_modules"] == ["c_attn", "c_fc", "c_proj"] and content["fan_in_fan_out"] is True
    # Three of ours side by side: three times the rank, and alpha with it.
    assert (content["rank_pattern"], content["alpha_pattern"]) == ({"c_attn": 12}, {"c_attn": 24})
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in opened.keys()  # noqa: SIM118
    assert is_adapter(tmp_path) and not is_adapter(base)
    assert read_adapter_config(tmp_path).rank_and_alpha("transformer.h.0.attn.c_attn") == (12, 24)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
@torch.no_grad()
def test_one_part_of_a_joint_layer_can_be_adapted_alone(
    family: str, make: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    _, base = make(family)
    model, config = load_model(base), AdapterConfig(r=4, target_modules=("q_proj", "v_proj"))
    add_lora(model, config, seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", config)
    torch.testing.assert_close(
        peft_on(base, tmp_path / "adapter")(tokens).logits, model(tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": 0},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 2},
        {"layers_to_transform": []},
        {"layers_to_transform": [0], "layers_pattern": []},
        {"layers_to_transform": 0, "layers_pattern": ""},
        {
            "layers_to_transform": [1, 2],
            "layers_pattern": "layers",
            "exclude_modules": ["model.layers.2.self_attn.q_proj"],
        },
    ],
)
def test_layers_are_chosen_as_peft_chooses_them(fields: dict[str, Any], make: Make, tmp_path: Path) -> None:
    _, base = make("llama")
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], **fields)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), lora)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter")
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert {f"base_model.model.{name}" for name in adapted} == {
        name.removesuffix(".lora_A") for name, _ in theirs.named_modules() if name.endswith(".lora_A")
    }


# Refusals


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "'task_type' is 'SEQ_CLS'"),
        ({"use_dora": True}, "'use_dora'"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7]},
            "in layers_to_transform matches no layer",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": False}, "'layers_to_transform' is False"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [True]}, "'layers_to_transform' is [True]"),
        ({"target_modules": ".*", "layers_to_transform": 0}, "layers_to_transform needs a list of modules"),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            "layers_pattern needs layers_to_transform",
        ),
        ({"trainable_token_indices": [3]}, "'trainable_token_indices'"),
        ({"target_parameters": ["x"]}, "'target_parameters'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa'"),
        ({"a_field_of_next_year": 1}, "'a_field_of_next_year'"),
        ({"a_field_of_next_year": 0}, "'a_field_of_next_year' is 0"),
        ({"r": 0}, "r is 0"),
        ({"r": "big"}, "'r' is 'big'"),
        ({"lora_alpha": -1}, "alpha is -1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' is 0"),
        ({"rank_pattern": {"(": 2}}, "'(' is not a regular expression"),
        ({"target_modules": "("}, "'(' is not a regular expression"),
        ({"target_modules": 3}, "'target_modules' is 3"),
        ({"target_modules": ["c_attn"]}, "matches no layer of this llama model, which has q_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "matches lm_head"),
        ({"target_modules": ["embed_tokens"]}, "matches model.embed_tokens"),
        ({"target_modules": ["q_proj"]}, "k_proj.lora_A.weight is unexpected"),
        ({"r": 5}, "has shape [4, 32]"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_name(
    fields: dict[str, Any], named: str, make: Make, tmp_path: Path
) -> None:
    _, base = make("llama")
    model = load_model(base)
    add_lora(model, AdapterConfig(r=4), seed=0)
    save_adapter(model, tmp_path / "adapter", AdapterConfig(r=4))
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError) as caught:
        load_adapter(load_model(base), tmp_path / "adapter")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_in_a_mixture_only_the_attention_is_adapted(make: Make) -> None:
    _, base = make("qwen3_moe", mlp_only_layers=[0])
    model = load_model(base)
    with pytest.raises(UserError, match=r"matches model\.layers\.0\.mlp\.gate_proj; in a mixture only the"):
        add_lora(model, AdapterConfig(target_modules=("q_proj", "gate_proj")), seed=0)
    add_lora(model, AdapterConfig(), seed=0)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert adapted == {
        f"model.layers.{layer}.self_attn.{letter}_proj" for layer in range(3) for letter in "qkvo"
    }


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("missing", "o_proj.lora_B.weight is missing"),
        ("extra", "lm_head.lora_A.weight is unexpected"),
        ("dora", "lora_magnitude_vector is unexpected"),
        ("shape", "check that this is the base that the adapter was trained on"),
        ("pickle", "adapter_model.bin is a pickle"),
        ("no weights", f"has no {WEIGHTS}"),
        ("no config", f"has no {CONFIG}"),
    ],
)
def test_a_broken_adapter_gets_one_clear_line(fault: str, named: str, make: Make, tmp_path: Path) -> None:
    _, base = make("llama")
    model = load_model(base)
    add_lora(model, AdapterConfig(r=4), seed=0)
    save_adapter(model, tmp_path / "adapter", AdapterConfig(r=4))
    path = tmp_path / "adapter" / WEIGHTS
    state = safetensors.torch.load_file(path)
    prefix = "base_model.model.model.layers.0.self_attn.o_proj"
    match fault:
        case "missing":
            del state[f"{prefix}.lora_B.weight"]
        case "extra":
            state["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 32)
        case "dora":
            state[f"{prefix}.lora_magnitude_vector"] = torch.ones(32)
        case "shape":
            state[f"{prefix}.lora_A.weight"] = torch.ones(4, 64)
    safetensors.torch.save_file(state, path)
    if fault in ("pickle", "no weights"):
        path.unlink()
    if fault == "pickle":
        (path.parent / "adapter_model.bin").write_bytes(b"\x80")
    if fault == "no config":
        (path.parent / CONFIG).unlink()
    with pytest.raises(UserError) as caught:
        load_adapter(load_model(base), tmp_path / "adapter")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_misuse_raises_value_error(make: Make, tmp_path: Path) -> None:
    _, base = make("llama")
    model = load_model(base)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(model, tmp_path, AdapterConfig())
    add_lora(model, AdapterConfig(), seed=0)
    with pytest.raises(ValueError, match="merge adapters before saving"):
        save_model(model, tmp_path)
    with pytest.raises(ValueError, match="already has an adapter"):
        add_lora(model, AdapterConfig(), seed=0)
