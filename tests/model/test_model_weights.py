"""Weights read without torch are bit for bit those that torch reads; adapters are merged as torch merges them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tercet.errors import UserError
from tercet.model.adapter import AdapterConfig, add_lora, load_adapter, merge_lora, save_adapter
from tercet.model.loading import load_model, save_model
from tercet.model.tensor_names import network_tensors
from tercet.model.weights import Weights
from tiny_checkpoints import CASES, Make


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_one_that_torch_loads(case: str, make: Make) -> None:
    family, fields = CASES[case]
    theirs, directory = make(family, **fields)
    weights, state = Weights(directory), load_model(directory).state_dict()
    if weights.config.tie_embeddings:
        del state["lm_head.weight"]
    names = [part.name for part in network_tensors(weights.config)]
    assert sorted(names) == sorted(state)
    for name in [*names, *reversed(names)]:  # in any order
        values = weights(name)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, state[name].numpy())
    assert weights.parameters == theirs.num_parameters()
    assert weights.dtype == "F32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_is_read_exactly(dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    _, directory = make("gpt2")
    save_model(load_model(directory), tmp_path / "stored", dtype=dtype)
    weights = Weights(tmp_path / "stored")
    assert weights.dtype == {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[dtype]
    for name, tensor in load_model(tmp_path / "stored").state_dict().items():
        if name != "lm_head.weight":
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(weights(name), tensor.float().numpy())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_special_values_survive(kind: torch.dtype, make: Make) -> None:
    _, directory = make("llama")
    file = directory / "model.safetensors"
    tensors = {name: tensor.to(kind) for name, tensor in safetensors.torch.load_file(file).items()}
    special = torch.tensor([torch.inf, -torch.inf, -0.0, 6e-8, 1e-40, 65504]).to(kind)
    tensors["model.norm.weight"][:6] = special
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    values = Weights(directory)("model.norm.weight")[:6]
    np.testing.assert_array_equal(values.view(np.uint32), special.float().numpy().view(np.uint32))


def test_tensors_that_are_not_aligned_are_read(make: Make) -> None:
    """Older versions of safetensors wrote such files; their header may have any length."""
    _, directory = make("llama")
    expected = load_model(directory, trainable=True).state_dict()
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length])).encode()
    header += b" " * (1 + -len(header) % 4)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert (8 + len(header)) % 4 == 1
    weights = Weights(directory)
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"):
        np.testing.assert_array_equal(weights(name), expected[name].numpy())


# Adapters

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama: rank-stabilised, own ranks": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "llama: some layers": ("llama", {"target_modules": ("q_proj", "down_proj")}),
    "phi3: joined": ("phi3", {}),
    "gpt2: joined, transposed": ("gpt2", {"alpha_pattern": {"mlp.c_proj": 9}}),
    "gpt_neox: by head": ("gpt_neox", {}),
    "mixtral: attention": ("mixtral", {"target_modules": ("q_proj", "o_proj")}),
    "gemma3": ("gemma3_text", {}),
}


def write_adapter(base: Path, directory: Path, seed: int = 3, **fields: Any) -> None:
    model, config = load_model(base), AdapterConfig(r=4, alpha=6, base_model=str(base), **fields)
    add_lora(model, config, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B begins at zero, where nothing can be seen
                parameter.normal_(std=0.2, generator=generator)
    save_adapter(model, directory, config)


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_are_merged_as_by_torch(case: str, make: Make, tmp_path: Path) -> None:
    family, fields = ADAPTERS[case]
    _, base = make(family)
    write_adapter(base, tmp_path / "adapter", **fields)
    model = load_model(base, trainable=True)
    load_adapter(model, tmp_path / "adapter")
    merge_lora(model)
    weights, plain, changed = Weights(base, tmp_path / "adapter"), Weights(base), 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and weights.config.tie_embeddings:
            continue
        values = weights(name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, tensor.detach().numpy(), atol=1e-6, rtol=1e-6)
        changed += not np.array_equal(values, plain(name))
    assert changed >= 3
    assert weights.parameters == plain.parameters  # merged: as many as before


def test_what_an_adapter_adds_to_bfloat16_is_not_rounded_away(make: Make, tmp_path: Path) -> None:
    _, base = make("llama")
    save_model(load_model(base), tmp_path / "base", dtype=torch.bfloat16)
    write_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=("q_proj",))
    weights, plain = Weights(tmp_path / "base", tmp_path / "adapter"), Weights(tmp_path / "base")
    assert (plain.dtype, weights.dtype) == ("BF16", "F32")
    name = "model.layers.1.self_attn.q_proj"
    stored = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    added = 6 / 4 * (b @ a).numpy()
    np.testing.assert_allclose(weights(f"{name}.weight") - plain(f"{name}.weight"), added, atol=1e-6)


def test_an_adapter_of_another_base_is_refused(make: Make, tmp_path: Path) -> None:
    write_adapter(make("llama", hidden_size=64)[1], tmp_path / "adapter")
    _, base = make("llama")
    with pytest.raises(UserError, match="check that this is the base that the adapter was trained on"):
        Weights(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        Weights(base, tmp_path / "adapter")


def test_reading_weights_needs_no_torch(make: Make, tmp_path: Path) -> None:
    _, base = make("gpt_neox")
    write_adapter(base, tmp_path / "adapter")
    program = (
        "import sys\n"
        "from tercet.model.weights import Weights\n"
        f"weights = Weights({str(base)!r}, {str(tmp_path / 'adapter')!r})\n"
        "assert weights('model.layers.0.self_attn.k_proj.weight').shape == (32, 32)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False False\n", "")
