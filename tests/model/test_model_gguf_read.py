"""Models read from GGUF files: configuration and weights of every family, compared with the exported checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_files import copy, exported
from tercet.conversion.export import export
from tercet.errors import UserError
from tercet.model.checkpoint import read_config, read_stop_ids, weights_identity
from tercet.model.gguf_directory import gguf_directory
from tercet.model.gguf_file import GGUFFile
from tercet.model.loading import load_model
from tercet.model.rope import rope_frequencies
from tercet.model.tensor_names import network_tensors
from tercet.model.tokenizer import Tokenizer
from tercet.model.weights import Weights
from tiny_checkpoints import CASES, YARN

UINT32, FLOAT32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING

# Cases that no graph of llama.cpp computes (tests/model/test_model_gguf.py).
NOT_EXPORTED = {
    "llama: gelu",
    "qwen3: biases",
    "gemma2: no caps, untied, biases",
    "gemma2: no windows",
    "gpt_neox: no attention bias, linear",
    "olmo2: biases, every head its own keys",
    "smollm3: layer 1 without positions",
    "smollm3: windows, biases, interval",
    "qwen3_moe",
    "qwen3_moe: plain layers, weights sum to one",
    "qwen3_moe: every second layer, windows",
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3: yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2: yarn, own attention factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "qwen3: linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "qwen3_moe: weights sum to one": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma3: six layers, the sixth global": ("gemma3_text", {"sliding_window": 5, "num_hidden_layers": 7}),
}
READ = {**{name: case for name, case in CASES.items() if name not in NOT_EXPORTED}, **MORE}

NO_WINDOWS = {"max_positions", "windows"}  # the export limits the context to the window
# Fields that come back in another form with the same results, or that GGUF has no key for.
CHANGED: dict[str, set[str]] = {
    "llama: dynamic, longer than trained": {"rope_scaling"},
    "llama: yarn": {"rope_scaling"},
    "llama: yarn, all fields": {"rope_scaling"},
    "llama: yarn, own attention factor": {"rope_scaling"},
    "llama: longrope": {"rope_scaling"},
    "mistral: window of 5": {"family", *NO_WINDOWS},
    "mistral: no window": {"family"},
    "qwen2: windows above layer 1": NO_WINDOWS,
    "qwen2: windows by layer": NO_WINDOWS,
    "phi3: window of 5": NO_WINDOWS,
    "mixtral: window of 5, one expert a token": NO_WINDOWS,
    "gpt_neox: one after the other, tied, half rotated": {"activation", "tie_embeddings"},
    "gpt2: untied, narrow, gelu": {"activation"},
}


def prompt(length: int = 30) -> torch.Tensor:
    return torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = load_model(directory)(tokens)
    return result


@pytest.mark.parametrize("case", READ)
def test_a_model_of_every_family_comes_back(case: str, tmp_path: Path) -> None:
    family, fields = READ[case]
    checkpoint, path = exported(tmp_path, family, **fields)
    directory = gguf_directory(path)
    config, back = read_config(checkpoint), read_config(directory)
    changed = CHANGED.get(case, set()) | {"eos_token_ids"}
    if family.startswith("gemma"):
        changed = changed | {"attention_scale"}  # the file's queries are scaled instead
    ours, theirs = asdict(config), asdict(back)
    assert {name for name in ours if ours[name] != theirs[name]} == changed
    tokens = prompt(min(30, back.max_positions))
    expected = logits(checkpoint, tokens)
    # GPT-2's two forms of GELU differ in the fourth digit, and a file does not say which one it is.
    precision = 1e-3 if "activation" in changed else 1e-4
    error = (logits(directory, tokens) - expected).abs().max() / expected.std()
    assert expected.std() > 0.1
    assert error < precision


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "mixtral", "gpt2", "gpt_neox"])
def test_weights_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    scalar = {"query_pre_attn_scalar": 8} if family == "gemma3_text" else {}
    checkpoint, path = exported(tmp_path, family, **scalar)
    original, weights = Weights(checkpoint), Weights(gguf_directory(path))
    assert weights.parameters == original.parameters and weights.dtype == "F32"
    for part in network_tensors(weights.config):
        values = weights(part.name)
        assert values.shape == part.shape and values.dtype == np.float32
        # Gemma's norms are stored plus one.
        tolerance = 1e-7 if "norm" in part.name else 0
        np.testing.assert_allclose(values, original(part.name), rtol=0, atol=tolerance)


SIZES = {"hidden_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral", "gpt2", "gpt_neox"])
def test_blocks_are_the_files_own_bytes_in_our_order(family: str, tmp_path: Path) -> None:
    fields = {"n_embd": 64} if family == "gpt2" else SIZES
    if family == "gemma3_text":
        fields = fields | {"query_pre_attn_scalar": 8}
    checkpoint, path = exported(tmp_path, family, "q8_0", **fields)
    original, weights = Weights(checkpoint), Weights(gguf_directory(path))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    quantised = {tensor.data.tobytes() for tensor in stored.values() if tensor.tensor_type.name == "Q8_0"}
    rows_in_file = {
        row for tensor in quantised for row in (tensor[i : i + 68] for i in range(0, len(tensor), 68))
    }
    assert weights.dtype == "F32"
    for part in network_tensors(weights.config):
        blocks = weights.blocks(part.name)
        matrix = len(part.shape) == 2 and not part.name.endswith(
            ("mlp.gate.weight", "embed_positions.weight")
        )
        assert (blocks is not None) == matrix
        if blocks is None:
            continue
        assert (blocks.type, blocks.data.shape) == ("Q8_0", (part.shape[0], part.shape[1] // 32 * 34))
        values = gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(values, weights(part.name))
        exact = original(part.name)
        assert abs(values - exact).max() <= abs(exact).max() / 150
        if part.shape[1] == 64:
            assert blocks.data[0].tobytes() in rows_in_file


def test_a_quantised_model_computes_its_dequantised_weights(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "llama", "q8_0", **SIZES)
    directory = gguf_directory(path)
    model, weights = load_model(directory), Weights(directory)
    for name, parameter in model.state_dict().items():
        assert parameter.dtype == torch.float32
        np.testing.assert_array_equal(parameter.numpy(), weights(name))
    assert {p.dtype for p in load_model(directory, torch.bfloat16).parameters()} == {torch.bfloat16}
    before = weights("model.norm.weight").copy()
    with torch.no_grad():
        for parameter in load_model(directory, trainable=True).parameters():
            parameter.zero_()  # memory of its own, not the file's
    np.testing.assert_array_equal(weights("model.norm.weight"), before)


@pytest.mark.parametrize(("type_name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_unquantised_types_are_kept(type_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, path = exported(tmp_path, "qwen3", type_name)
    directory = gguf_directory(path)
    assert Weights(directory).dtype == type_name.upper()
    assert json.loads((directory / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {parameter.dtype for parameter in load_model(directory).parameters()} == {dtype}
    assert Weights(directory).blocks("model.layers.0.mlp.up_proj.weight") is None


def test_separate_tensors_are_read_where_the_graph_has_a_joined_one(tmp_path: Path) -> None:
    checkpoint, path = exported(tmp_path, "phi3")
    names = {"blk.0.attn_qkv.weight": None}
    weights = Weights(checkpoint)
    apart = {
        f"blk.0.attn_{kind}.weight": weights(f"model.layers.0.self_attn.{kind}_proj.weight") for kind in "qkv"
    }
    other = copy(path, tmp_path / "apart.gguf", tensors={**names, **apart})
    torch.testing.assert_close(logits(gguf_directory(other), prompt()), logits(checkpoint, prompt()))


def test_factors_of_frequencies_are_kept_exactly(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "llama")
    factors = np.array([1.0, 1.37, 2.9, 8.25], np.float32)
    other = copy(path, tmp_path / "b.gguf", tensors={"rope_freqs.weight": factors})
    plain, _ = rope_frequencies(read_config(gguf_directory(path)), 1)
    for length in (1, 1000):
        frequencies, attention = rope_frequencies(read_config(gguf_directory(other)), length)
        np.testing.assert_array_equal(frequencies, plain / factors)
        assert attention == 1
    same = copy(path, tmp_path / "c.gguf", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    assert read_config(gguf_directory(same)).rope_scaling is None


def test_llama_3s_scaling_is_recognised(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
    fields = {"rope_parameters": rope, "max_position_embeddings": 131_072, "head_dim": 64}
    checkpoint, path = exported(tmp_path, "llama", **fields)
    config = read_config(gguf_directory(path))
    assert config.rope_scaling == read_config(checkpoint).rope_scaling is not None


# Directories


def test_the_directory_is_made_once_and_holds_no_weights(tmp_path: Path) -> None:
    checkpoint, path = exported(tmp_path, "llama")
    directory = gguf_directory(path)
    files = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "gguf.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert gguf_directory(path) == directory
    assert {file.name: file.stat().st_mtime_ns for file in directory.iterdir()} == files
    assert weights_identity(directory) == [(str(path), path.stat().st_size, path.stat().st_mtime_ns)]
    assert read_stop_ids(directory) == (0, 2)
    tokenizer = Tokenizer.load(checkpoint)
    assert Tokenizer.load(directory).encode("the king: 123") == tokenizer.encode("the king: 123")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    checkpoint, path = exported(tmp_path, "llama")
    directory = gguf_directory(path)
    copy(path, tmp_path / "b.gguf", {"llama.context_length": (17, UINT32)})
    (tmp_path / "b.gguf").replace(path)
    with pytest.raises(UserError, match=r"llama\.gguf has changed since .* was made of it"):
        Weights(directory)
    assert read_config(gguf_directory(path)).max_positions == 17
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*llama\.gguf: No such file"):
        Weights(directory)
    assert checkpoint.is_dir()


def test_a_split_file_is_a_model(tmp_path: Path) -> None:
    checkpoint, path = exported(tmp_path, "llama")
    reader = GGUFFile(path)
    names = list(reader.tensors)
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    count = {"split.count": (2, UINT32)}
    copy(path, first, count | {"split.no": (0, UINT32)}, dict.fromkeys(names[5:]))
    copy(path, second, count | {"split.no": (1, UINT32)}, dict.fromkeys(names[:5]))
    directory = gguf_directory(second)
    assert [Path(name) for name, _, _ in weights_identity(directory)] == [first, second]
    torch.testing.assert_close(logits(directory, prompt()), logits(checkpoint, prompt()))


def test_a_checkpoint_is_exported_from_a_file(tmp_path: Path) -> None:
    checkpoint, path = exported(tmp_path, "gemma3_text", query_pre_attn_scalar=8)
    export(str(path), "hf", tmp_path / "hf")
    torch.testing.assert_close(logits(tmp_path / "hf", prompt()), logits(checkpoint, prompt()))
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompt()).logits, logits(checkpoint, prompt()), atol=1e-4, rtol=0)


# Files that can't be read


def key(name: str, value: Any, kind: gguf.GGUFValueType = UINT32) -> dict[str, Any]:
    return {name: None if value is None else (value, kind)}


def ones(*shape: int, kind: Any = np.float32) -> Any:
    return np.ones(shape, kind)


BOOL, ARRAY = gguf.GGUFValueType.BOOL, gguf.GGUFValueType.ARRAY
UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (key("general.architecture", "mamba", STRING), "'mamba' is not supported; supported are llama"),
    "an adapter": (key("general.type", "adapter", STRING), "holds a GGUF adapter"),
    "no number of layers": (key("llama.block_count", None), "the metadata has no 'llama.block_count'"),
    "a number as text": (key("llama.block_count", "3", STRING), "'llama.block_count' of the metadata is '3'; it must be an"),
    "heads by layer": (key("llama.attention.head_count", [4, 4, 2], ARRAY), "'llama.attention.head_count' differs by layer"),
    "wide values": (key("llama.attention.value_length", 16), "values have 16 dimensions and keys 8"),
    "bidirectional": (key("llama.attention.causal", False, BOOL), "causal' is False, which is not supported"),
    "partly rotated": (key("llama.rope.dimension_count", 4), "partial_rotary_factor"),
    "scaling": (key("llama.rope.scaling.type", "ntk", STRING), "is 'ntk'; supported are none"),
    "no heads": (key("llama.attention.head_count", 0), "num_heads"),
    "more layers": (key("llama.block_count", 4), "tensor blk.3.attn_norm.weight is missing"),
    "fewer layers": (key("llama.block_count", 2), "tensor blk.2.attn_norm.weight is unexpected"),
    "another width": (key("llama.feed_forward_length", 40), r"shape \[48, 32\]; the metadata requires \[40, 32\]"),
    "no vocabulary": (key("tokenizer.ggml.tokens", None), "has no vocabulary"),
    "no embedding": ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
    "an unknown tensor": ({"blk.0.attn_sinks.weight": ones(4)}, "tensor blk.0.attn_sinks.weight is unexpected"),
    "some biases": ({"blk.0.attn_q.bias": ones(32)}, "only attn_q have biases"),
    "integers": ({"output_norm.weight": ones(32, kind=np.int32)}, "type I32, which can't be read as weights"),
    "factors": ({"rope_freqs.weight": ones(3)}, "has 3 factors; it must have 4"),
    "a small embedding": (
        {"token_embd.weight": ones(300, 32), "output.weight": ones(300, 32)}, "has 384 tokens and the embedding 300 rows",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = exported(tmp_path_factory.mktemp("llama"), "llama")[1]
    return path


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_reported_in_one_line(case: str, llama_file: Path, tmp_path: Path) -> None:
    changes, message = UNREADABLE[case]
    keys = {name: value for name, value in changes.items() if not name.endswith((".weight", ".bias"))}
    tensors = {name: value for name, value in changes.items() if name not in keys}
    path = copy(llama_file, tmp_path / "b.gguf", keys, tensors)
    with pytest.raises(UserError, match=message) as caught:
        gguf_directory(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UserError):  # nothing half-made remains
        gguf_directory(path)


def test_a_file_that_is_missing_or_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.gguf: No such file"):
        gguf_directory(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="is not a GGUF file"):
        gguf_directory(tmp_path / "text.gguf")
