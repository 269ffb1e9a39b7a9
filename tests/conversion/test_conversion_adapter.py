"""An adapter alone as a GGUF file: llama.cpp with it computes what the merged model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.cli.main import main as cli
from tercet.conversion import check as check_module
from tercet.conversion.check import CheckFailed
from tercet.conversion.export import export
from tercet.errors import UserError
from tercet.model import gguf_lora
from tiny_checkpoints import reload

peft = pytest.importorskip("peft")
Checkpoint = Callable[..., Path]
TOKENS = torch.randint(3, 200, (1, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "TOKENS", 200)


def make_adapter(base: Path, directory: Path, **fields: Any) -> Any:
    """Save an adapter of PEFT that changes the output; return PEFT's model."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "init_lora_weights": False,
            "base_model_name_or_path": str(base),
            **fields,
        }
    )
    model = peft.get_peft_model(reload(base), config)
    model.save_pretrained(directory)
    return model.eval()


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: queries, keys, MLP": ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "llama: rank-stabilised, other ranks and alphas": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "phi3: joint tensors": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt2: transposed, joint": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gemma3: scaled queries": ("gemma3_text", {"target_modules": ["q_proj", "o_proj"]}),
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_llama_cpp_with_the_adapter_computes_the_logits_of_peft(
    case: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    family, fields = ADAPTERS[case]
    base = checkpoint(family, **SIZES.get(family, {}))
    model = make_adapter(base, tmp_path / "adapter", **fields)
    export(str(base), "gguf", tmp_path / "base.gguf", "f32", check=False)
    done = export(str(tmp_path / "adapter"), "gguf-lora", tmp_path / "adapter.gguf")
    assert done.check is not None and done.check.kl < 1e-6
    float32 = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(
        str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "adapter.gguf"), n_ctx=64, n_batch=64, logits_all=True,
        n_threads=1, n_threads_batch=1, verbose=False, type_k=float32, type_v=float32, flash_attn=False,
    )  # fmt: skip
    theirs.eval(TOKENS[0].tolist())
    with torch.no_grad():
        expected = model(TOKENS).logits[0].numpy()
        plain = reload(base)(TOKENS).logits[0].numpy()
    precision = 1e-4 if family in ("llama", "phi3") else 0.01  # llama.cpp's GELU is a table of float16
    np.testing.assert_allclose(
        np.array(theirs.scores[:30]), expected, atol=precision * expected.std(), rtol=0
    )
    assert abs(expected - plain).max() > 0.1 * expected.std()


def test_one_part_of_a_joint_tensor_may_be_adapted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As an adapter of Tercet's own names: the other rows of B are zeros; the check compares with the merged model."""
    gguf = pytest.importorskip("gguf")
    base = checkpoint("phi3")
    make_adapter(base, tmp_path / "adapter", target_modules=["qkv_proj"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = ["k_proj"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {
        name: (values[64:96] if "lora_B" in name else values) for name, values in load_file(path).items()
    }
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)
    export(str(tmp_path / "adapter"), "gguf-lora", tmp_path / "adapter.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    b = stored["blk.0.attn_qkv.weight.lora_b"].data
    assert b.shape == (128, 4)
    assert not b[:64].any() and b[64:96].any() and not b[96:].any()


def test_the_file_says_what_it_is(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    base = checkpoint("llama")
    make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], alpha_pattern={"1.self_attn.q_proj": 4}
    )
    out = tmp_path / "adapter.gguf"
    arguments = ["export", str(tmp_path / "adapter"), "--format", "gguf-lora", "--type", "f16"]
    assert cli([*arguments, "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert (done["format"], done["tensors"], done["merged"], done["context_length"]) == (
        "gguf-lora",
        4,
        None,
        None,
    )
    assert "the scaling of 1 tensors is folded into B" in captured.err
    assert f"next: llama-cli -m BASE.gguf --lora {out}" in captured.err
    reader = gguf.GGUFReader(out)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert (values["adapter.type"], values["adapter.lora.alpha"]) == ("lora", 8.0)
    assert {tensor.name: list(map(int, tensor.shape)) for tensor in reader.tensors} == {
        f"blk.{layer}.attn_q.weight.lora_{part}": shape
        for layer in (0, 1)
        for part, shape in (("a", [64, 4]), ("b", [4, 64]))
    }


def test_rows_in_the_wrong_order_are_caught(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(checkpoint("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    monkeypatch.setattr(gguf_lora, "interleave", lambda rows, heads: rows)
    with pytest.raises(CheckFailed, match=r"layers.0.self_attn.q_proj.weight is .* off"):
        export(str(tmp_path / "adapter"), "gguf-lora", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_model_is_no_adapter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no adapter"):
        export(str(checkpoint("llama")), "gguf-lora", tmp_path / "m.gguf")
