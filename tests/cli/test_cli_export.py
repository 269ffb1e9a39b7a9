"""The export command: both formats, adapters, refusals and output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.cli.main import main as cli
from tercet.model.checkpoint import open_tensors, stream_tensors
from tercet.model.safetensors_file import TensorSpec, read_safetensors
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.corpus import train_tokenizer
from tiny_checkpoints import CASES, Make, reload, save_random

TEXT = "Once upon a time there was a king, and the king had 3 daughters.\n\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 50], 300)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Write a run directory's model, shaped and named as ``tercet build`` does it."""
    directory = tmp_path / "mine" / "model"
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    save_random(
        directory, "qwen3", vocab_size=tokenizer.vocab_size, head_dim=8, tie_word_embeddings=True, **ids
    )
    tokenizer.save(directory)
    return directory


def make_adapter(base: Path, directory: Path) -> Any:
    """Save a LoRA adapter by PEFT with weights that change the output; return its model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        base_model_name_or_path=str(base),
    )  # fmt: skip
    model = peft.get_peft_model(reload(base), config)
    model.save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(tokens).logits
    return result


TOKENS = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(1))


def test_gguf_by_run_directory_and_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out" / "mine.gguf"
    arguments = ["export", str(checkpoint.parent), "--format", "gguf", "--type", "q8_0", "--out", str(out)]
    assert cli([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert done["path"] == str(out)
    assert (done["format"], done["type"], done["architecture"]) == ("gguf", "q8_0", "qwen3")
    assert (done["tokenizer"], done["context_length"], done["merged"]) == ("qwen2", 64, None)
    assert done["bytes"] == out.stat().st_size
    assert f"next: llama-cli -m {out} " in captured.err
    assert "3 tensors are stored as F16, because blocks of 32 (Q8_0) do not divide" in captured.err
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.name"].contents() == "mine"
    stored = {name: tensor.shape for name, tensor in open_tensors(checkpoint).items()}
    assert done["parameters"] == sum(int(np.prod(shape)) for shape in stored.values())
    assert done["tensors"] == len(reader.tensors) == len(stored)
    assert [path.name for path in out.parent.iterdir()] == ["mine.gguf"]


@pytest.mark.parametrize(
    "case", ["llama", "phi3: window of 5", "gpt2", "qwen3_moe", "gpt_neox", "gemma3: all local"]
)
def test_hf_loads_in_transformers_with_equal_logits(
    case: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, fields = CASES[case]
    _, directory = make(family, **fields)
    assert cli(["export", str(directory), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    assert "has no tokenizer.json, so the copy has none either" in capsys.readouterr().err
    assert torch.equal(logits(reload(tmp_path / "out"), TOKENS), logits(reload(directory), TOKENS))


def test_hf_copies_tokenizer_and_generation_config(
    checkpoint: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from transformers import AutoTokenizer

    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.5}')
    (checkpoint / "notes.txt").write_text("not part of a checkpoint")
    out = tmp_path / "out"
    assert cli(["export", str(checkpoint), "--format", "hf", "--type", "bf16", "--out", str(out)]) == 0
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.encode(TEXT) == tokenizer.encode(TEXT)
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == ([0, 2], 0.5)
    assert not (out / "notes.txt").exists()
    before = reload(checkpoint)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.copy_(parameter.bfloat16().float())  # torch's own rounding
    after = reload(out).float()
    for (name, parameter), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert {tensor.dtype for tensor in open_tensors(out).values()} == {"BF16"}


def test_an_adapter_is_merged_as_peft_merges(checkpoint: Path, tmp_path: Path) -> None:
    model = make_adapter(checkpoint, tmp_path / "adapter")
    out = tmp_path / "merged"
    assert cli(["export", str(tmp_path / "adapter"), "--format", "hf", "--out", str(out)]) == 0
    expected = logits(model, TOKENS)
    torch.testing.assert_close(logits(reload(out), TOKENS), expected, atol=1e-5, rtol=0)
    assert (expected - logits(reload(checkpoint), TOKENS)).abs().max() > 0.1
    assert (out / "tokenizer.json").is_file()  # the base's
    merged = model.merge_and_unload().state_dict()
    for name, tensor in open_tensors(out).items():
        values = torch.from_numpy(np.array(tensor.data).view(np.float32).reshape(tensor.shape))
        torch.testing.assert_close(values, merged[name], atol=1e-6, rtol=0)


def test_an_adapter_becomes_one_gguf_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = make_adapter(checkpoint, tmp_path / "adapter")
    arguments = ["export", str(tmp_path / "adapter"), "--format", "gguf", "--type", "f32"]
    assert cli([*arguments, "--out", str(tmp_path / "m.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"] == str(tmp_path / "adapter")
    float32 = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(
        str(tmp_path / "m.gguf"),
        n_ctx=64,
        logits_all=True,
        n_threads=1,
        verbose=False,
        type_k=float32,
        type_v=float32,
    )
    theirs.eval(TOKENS[0].tolist())
    np.testing.assert_allclose(
        np.array(theirs.scores[:30]), logits(model, TOKENS[:1])[0].numpy(), atol=2e-5, rtol=0
    )


def test_tensors_keep_the_types_they_are_stored_in(checkpoint: Path, tmp_path: Path) -> None:
    import safetensors.torch

    state = safetensors.torch.load_file(checkpoint / "model.safetensors")
    mixed = {name: value if "norm" in name else value.bfloat16() for name, value in state.items()}
    safetensors.torch.save_file(mixed, checkpoint / "model.safetensors", {"format": "pt"})
    assert cli(["export", str(checkpoint), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == mixed.keys()
    for name, value in mixed.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value)


def test_shards_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    import safetensors.numpy

    values = {f"t{i}": np.full((i + 1, 3), i, np.float32 if i % 2 else np.float16) for i in range(6)}
    kinds = {"float32": "F32", "float16": "F16"}
    specs = [TensorSpec(name, kinds[str(value.dtype)], value.shape) for name, value in values.items()]
    stream_tensors(tmp_path, specs, lambda spec: values[spec.name].reshape(-1).view(np.uint8), 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / file)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == file}
        assert all(np.array_equal(tensors[name], values[name]) for name in tensors)
        assert sum(tensor.data.nbytes for tensor in read_safetensors(tmp_path / file).values()) <= 100


def test_existing_files_are_not_overwritten(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, full, empty = tmp_path / "m.gguf", tmp_path / "full", tmp_path / "empty"
    file.write_text("precious")
    full.mkdir()
    (full / "thesis.tex").write_text("precious")
    empty.mkdir()

    def attempt(format: str, out: Path) -> str:
        assert cli(["export", str(checkpoint), "--format", format, "--out", str(out)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    assert f"{file} exists already" in attempt("gguf", file)
    assert f"{full} exists already" in attempt("hf", full)
    assert f"{file} exists already" in attempt("hf", file)
    assert "is a directory; name the file" in attempt("gguf", empty)
    assert f"{checkpoint} exists already" in attempt("hf", checkpoint)
    assert file.read_text() == (full / "thesis.tex").read_text() == "precious"
    assert cli(["export", str(checkpoint), "--format", "hf", "--out", str(empty)]) == 0
    assert (empty / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx"], "--format is 'onnx'; it must be hf, gguf or gguf-lora"),
        (
            ["--format", "gguf", "--type", "q4_k"],
            "--type is 'q4_k'; for --format gguf it must be one of f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_1, q5_0, "
            "q4_k_m, q4_1, q4_0",
        ),
        (
            ["--format", "hf", "--type", "q8_0"],
            "--type is 'q8_0'; for --format hf it must be one of f32, bf16, f16",
        ),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["export", str(checkpoint), *options, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_models_that_run_elsewhere_and_broken_ones_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(reference: str) -> str:
        assert cli(["export", reference, "--format", "gguf", "--out", str(tmp_path / "m.gguf")]) == 2
        assert not (tmp_path / "m.gguf").exists()
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "only checkpoints, adapters and GGUF files, here or on the Hub, can be" in attempt("openai:gpt-9")
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "is truncated" in attempt(str(checkpoint))
    weights.write_bytes(whole)
    (checkpoint / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in attempt(str(checkpoint))
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "gone"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert "the base model gone is not a directory here" in attempt(str(tmp_path / "adapter"))


def test_a_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    monkeypatch.setattr("tercet.model.export.stream_tensors", full)
    for format, name in (("gguf", "m.gguf"), ("hf", "out")):
        target = tmp_path / "there" / name
        assert cli(["export", str(checkpoint), "--format", format, "--out", str(target)]) == 2
        assert capsys.readouterr().err == f"error: cannot write {target}: No space left on device\n"
        assert list(target.parent.iterdir()) == []


def test_a_moved_adapter_finds_its_base_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    make_adapter(checkpoint, tmp_path / "adapter")
    shutil.copytree(checkpoint, tmp_path / "adapter" / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "base"}))
    assert cli(["export", str(tmp_path / "adapter"), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
