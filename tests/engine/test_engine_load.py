from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tercet.engine import load
from tercet.engine.backend import Chunk
from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def base(tmp_path: Path, byte_level: Tokenizer) -> Path:
    """A random llama in bfloat16 with two stop tokens, and a tokenizer whose EOS is a third."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [290, 291]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_level.save(tmp_path / "base")
    return tmp_path / "base"


def next_logits(engine: Any) -> np.ndarray:
    logits: np.ndarray = engine.backend.feed([Chunk(0, PROMPT, 0, [0], [len(PROMPT) - 1])])
    last: np.ndarray = logits[0]
    return last


def reference_logits(base: Path) -> np.ndarray:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        row: np.ndarray = model(torch.tensor([PROMPT])).logits[0, -1].numpy()
    return row


def test_a_checkpoint_runs_in_int8_on_a_cpu_by_default(base: Path) -> None:
    assert load_engine(base, device="cpu").backend.quantization == "int8"  # type: ignore[attr-defined]
    for options, error in (({}, 0.3), ({"quantize": "none"}, 1e-4), ({"dtype": "float32"}, 1e-4)):
        engine = load_engine(base, device="cpu", **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(next_logits(engine), reference_logits(base), atol=error)
    half = load_engine(base, dtype="bfloat16", device="cpu")
    assert half.backend.quantization == "bf16"  # type: ignore[attr-defined]
    request = Request(tuple(PROMPT), Sampling(max_tokens=3, temperature=0))
    assert half.generate([request])[0].usage.completion_tokens >= 1


def test_other_devices_run_through_torch(base: Path) -> None:
    """The "device" is still this CPU, the only device in tests."""
    backend = load._torch_backend(base, None, None, "cpu")
    logits = backend.feed([Chunk(0, PROMPT, 0, [0], [len(PROMPT) - 1])])
    np.testing.assert_allclose(logits[0], reference_logits(base), atol=1e-4)


def test_every_stop_token_of_checkpoint_and_tokenizer_stops(base: Path, byte_level: Tokenizer) -> None:
    assert load_engine(base, device="cpu").stop_ids == {290, 291, byte_level.eos_id}


@pytest.fixture
def adapted(base: Path) -> Any:
    """peft's model on the base, with an adapter far from zero that is stored beside the base."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(base.parent / "adapter")
    return model


def rename_base(adapter: Path, name: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("name", ["absolute", "../base", "base"])
def test_an_adapter_runs_merged_into_its_base(
    base: Path, adapted: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = base.parent / "adapter"
    rename_base(adapter, str(base) if name == "absolute" else name)
    monkeypatch.chdir(base.parent)
    engine = load_engine(adapter, device="cpu", quantize="none")
    with torch.no_grad():
        expected = adapted(torch.tensor([PROMPT])).logits[0, -1].numpy()
    logits = next_logits(engine)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits - next_logits(load_engine(base, device="cpu"))).max() > 0.1
    assert {290, 291} < engine.stop_ids, "the base's, as the adapter has no generation_config.json"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "the base model nowhere is not a directory here"),
        (None, "field 'base_model_name_or_path' is empty"),
    ],
)
def test_an_adapter_without_its_base_is_refused(base: Path, adapted: Any, name: str, message: str) -> None:
    rename_base(base.parent / "adapter", name)
    with pytest.raises(UserError) as problem:
        load_engine(base.parent / "adapter", device="cpu")
    assert message in str(problem.value) and "adapter_config.json" in str(problem.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "`dtype` is 'int3'; it must be float32, bfloat16, float16"),
        (
            {"dtype": "float16"},
            "`dtype` is 'float16', which is for GPUs; on a CPU use float32 or bfloat16, or `quantize`",
        ),
        ({"threads": 0}, "`threads` is 0; this machine has"),
        ({"threads": 9999}, "`threads` is 9999; this machine has"),
        ({"quantize": "int3"}, "`quantize` is 'int3'; it must be int8, int4, bf16, none"),
        ({"quantize": "int8", "dtype": "float32"}, "give `dtype` or `quantize`, not both"),
        ({"device": "gpu"}, "`device` is 'gpu'; it must be"),
        ({"device": "cuda:99"}, "`device` is 'cuda:99', but this machine only has"),
        ({"device": "meta"}, "`device` is 'meta', but this machine only has"),
    ],
)
def test_an_unknown_dtype_or_device_is_refused(base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as problem:
        load_engine(base, **options)
    assert message in str(problem.value)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_engine(tmp_path)
