"""Each tensor of a quantised file has the type that llama.cpp's own quantisation gives it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tercet.conversion.export import export
from tercet.model.checkpoint import read_config
from tercet.model.gguf_architecture import architecture_of, targets
from tercet.model.gguf_mix import MAIN_TYPES, type_of

gguf = pytest.importorskip("gguf")
Checkpoint = Callable[..., Path]
FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "own head": ("llama", WIDE),
    "tied": ("llama", {**WIDE, "tie_word_embeddings": True}),
    "columns that 256 does not divide": ("llama", {"num_hidden_layers": 9, "intermediate_size": 96}),
    "the same, tied": (
        "llama",
        {"num_hidden_layers": 9, "intermediate_size": 256, "tie_word_embeddings": True},
    ),
    "80 layers, taken for 70B": ("llama", {**WIDE, "num_hidden_layers": 80}),
    "joint queries, keys and values": ("phi3", WIDE),
    "8 experts": ("mixtral", {**WIDE, "num_local_experts": 8}),
    "4 experts": ("mixtral", {**WIDE, "num_local_experts": 4}),
    "columns that 32 does not divide": ("qwen3", {"head_dim": 8, "intermediate_size": 48}),
}


def types_of(directory: Path, type_name: str) -> dict[str, str]:
    config = read_config(directory)
    graph = architecture_of(config)
    return {target.name: type_of(target, config, graph, type_name).type for target in targets(config, graph)}


@pytest.mark.parametrize("model", MODELS)
def test_every_type_is_that_of_llama_cpp(model: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    family, fields = MODELS[model]
    directory = checkpoint(family, **fields)
    export(str(directory), "gguf", tmp_path / "f32.gguf", "f32", check=False)
    assert FILE_TYPES.keys() == MAIN_TYPES.keys()
    for type_name, number in FILE_TYPES.items():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = number, 1
        out = tmp_path / f"{type_name}.gguf"
        paths = (str(tmp_path / "f32.gguf").encode(), str(out).encode())
        assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)) == 0
        theirs = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
        assert types_of(directory, type_name) == theirs


def test_a_third_of_the_layers_and_both_ends_get_more_bits(checkpoint: Checkpoint) -> None:
    types = types_of(checkpoint("llama", **{**WIDE, "num_hidden_layers": 16}), "q4_k_m")
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == "Q4_K"
    more = [layer for layer in range(16) if types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert all((types[f"blk.{layer}.attn_v.weight"] == "Q6_K") == (layer in more) for layer in range(16))


def test_the_files_types_are_written_and_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("llama")  # 64 columns
    done = export(str(directory), "gguf", tmp_path / "m.gguf", "q4_k_m", check=False)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == types_of(
        directory, "q4_k_m"
    )
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert sum((done.types or {}).values()) == done.tensors
    fallbacks = [note for note in done.notes if "are stored as" in note or "is stored as" in note]
    assert "blocks of 256 (Q4_K) do not divide their 64 columns: " in " ".join(fallbacks)


@pytest.mark.parametrize(
    ("family", "fields", "note"),
    [
        ("qwen3", {"head_dim": 8}, "takes heads of 128 for every qwen3 file, so it can't load this one"),
        ("qwen3", {"head_dim": 128}, None),
        ("qwen3_moe", {"norm_topk_prob": True}, "takes experts of width 768"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}, "ignores the linear scaling"),
        ("llama", {}, None),
    ],
)  # fmt: skip
def test_what_transformers_makes_of_a_file_is_said(
    family: str, fields: dict[str, Any], note: str | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """docs/compatibility.md shows how each was seen."""
    done = export(str(checkpoint(family, **fields)), "gguf", tmp_path / "m.gguf", "f32", check=False)
    notes = [text for text in done.notes if "transformers" in text]
    assert len(notes) == (note is not None)
    assert note is None or (note in notes[0] and "`format=hf` writes a directory that it loads" in notes[0])


def test_a_name_that_llama_cpp_cant_load_is_not_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It looks up tokens of Phi 3 in every model that is named so."""
    directory = checkpoint("llama").rename(tmp_path / "my-Phi-3")
    export(str(directory), "gguf", tmp_path / "m.gguf", "f32", check=False)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "model"
