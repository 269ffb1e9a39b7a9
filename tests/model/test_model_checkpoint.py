"""Checkpoint directories: readable by other programs, and every fault reported in one line."""

from __future__ import annotations

import gc
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from tercet.errors import UserError
from tercet.model.checkpoint import open_tensors, read_config, read_stop_ids
from tercet.model.loading import load_model, save_model
from tercet.model.safetensors_file import write_safetensors
from tiny_checkpoints import Make, reload

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# Writing and reading back


@torch.no_grad()
def test_shards_are_read_by_transformers_and_by_us(make: Make, tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs, directory = make("llama")
    save_model(load_model(directory), tmp_path / "ours", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in theirs.parameters())
    assert set(index["weight_map"]) == set(theirs.state_dict())
    for model in (reload(tmp_path / "ours"), load_model(tmp_path / "ours")):
        logits = getattr(model(tokens), "logits", model(tokens))
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_shards_of_transformers_are_read(make: Make, tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs, _ = make("gpt2")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX).is_file()
    ours = load_model(tmp_path / "sharded")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_bfloat16_is_kept_bit_for_bit(make: Make, tmp_path: Path) -> None:
    theirs, _ = make("qwen3", head_dim=8, tie_word_embeddings=True)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.dtype == torch.bfloat16
    assert load_model(tmp_path / "theirs", dtype=torch.float32).dtype == torch.float32
    save_model(ours, tmp_path / "ours")
    expected = safetensors.torch.load_file(tmp_path / "theirs" / WEIGHTS)
    written = safetensors.torch.load_file(tmp_path / "ours" / WEIGHTS)
    assert "lm_head.weight" not in written and written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "bfloat16"
    save_model(ours, tmp_path / "wide", dtype=torch.float32)
    assert reload(tmp_path / "wide").dtype == torch.float32


def test_saving_again_leaves_nothing_of_the_old_shards(make: Make, tmp_path: Path) -> None:
    _, directory = make("llama")
    model = load_model(directory, trainable=True)
    for limit in (20_000, 10**9, 30_000):
        save_model(model, tmp_path / "ours", max_shard_bytes=limit)
        names = {path.name for path in (tmp_path / "ours").iterdir()} - {
            "config.json",
            "generation_config.json",
        }
        if limit == 10**9:
            assert names == {WEIGHTS}
        else:
            listed = json.loads((tmp_path / "ours" / INDEX).read_text())["weight_map"].values()
            assert names == {INDEX, *listed}


def test_the_file_is_what_the_safetensors_library_expects(make: Make, tmp_path: Path) -> None:
    _, directory = make("llama")
    save_model(load_model(directory), tmp_path)
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_stop_id_is_written_and_read(make: Make, tmp_path: Path) -> None:
    _, directory = make("llama", eos_token_id=[2, 7])
    model = load_model(directory)
    save_model(model, tmp_path / "a")
    assert json.loads((tmp_path / "a/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
    }
    assert read_stop_ids(tmp_path / "a") == (2, 7)
    save_model(model, tmp_path / "b", generation={"eos_token_id": [2, 7, 9], "temperature": 0.6})
    assert read_stop_ids(tmp_path / "b") == (2, 7, 9)
    assert reload(tmp_path / "b").generation_config.temperature == 0.6


@pytest.mark.parametrize("trainable", [False, True])
def test_weights_are_mapped_unless_they_are_to_be_trained(trainable: bool, make: Make) -> None:
    _, directory = make("llama")
    before = (directory / WEIGHTS).read_bytes()
    model = load_model(directory, trainable=trainable)
    maps = Path("/proc/self/maps")
    if maps.exists():
        gc.collect()
        assert (str(directory / WEIGHTS) in maps.read_text()) is not trainable
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    assert (directory / WEIGHTS).read_bytes() == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "family", ["gpt2", "phi3", "gpt_neox"]
)  # a stored tensor holds three of the network's
def test_trainable_weights_share_no_memory(family: str, make: Make) -> None:
    _, directory = make(family)
    model = load_model(directory, trainable=True)
    places = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(places)) == len(places)


# What other tools leave in checkpoints


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi3", "gpt_neox", "mixtral"])
def test_a_bare_decoder_without_the_prefix_is_read(
    family: str, make: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    theirs, _ = make(family, tie_word_embeddings=True)
    theirs.base_model.save_pretrained(tmp_path / "bare")
    assert not any(
        name.startswith(("transformer.", "model.", "gpt_neox.")) for name in open_tensors(tmp_path / "bare")
    )
    torch.testing.assert_close(
        load_model(tmp_path / "bare")(tokens), theirs(tokens).logits, atol=1e-4, rtol=0
    )


def test_buffers_and_a_repeated_tied_head_are_accepted(make: Make) -> None:
    theirs, directory = make("gpt2")
    state = safetensors.torch.load_file(directory / WEIGHTS)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
    safetensors.torch.save_file(state, directory / WEIGHTS)
    load_model(directory)
    state["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(state, directory / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        load_model(directory)
    _, directory = make("llama")
    state = safetensors.torch.load_file(directory / WEIGHTS)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.torch.save_file(state, directory / WEIGHTS)
    load_model(directory)


# Broken checkpoints


def _rewrite(directory: Path, change: Any) -> None:
    state = safetensors.torch.load_file(directory / WEIGHTS)
    change(state)
    safetensors.torch.save_file(state, directory / WEIGHTS)


def _header(directory: Path, change: Any) -> None:
    content = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _only_pickle(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def _index(directory: Path, weight_map: Any) -> None:
    (directory / WEIGHTS).rename(directory / "model-00001-of-00002.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _cut(directory: Path, end: int) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:end])


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Any, str]] = {
    "missing tensor": (lambda d: _rewrite(d, lambda s: s.pop(NORM)), NORM),
    "missing head": (lambda d: _rewrite(d, lambda s: s.pop("lm_head.weight")), "lm_head.weight is missing"),
    "extra tensor": (lambda d: _rewrite(d, lambda s: s.update({"model.more": torch.ones(2)})), "model.more"),
    "extra layer": (
        lambda d: _rewrite(d, lambda s: s.update({"model.layers.3.mlp.up_proj.bias": torch.ones(2)})),
        "model.layers.3.mlp.up_proj.bias",
    ),
    "wrong shape": (lambda d: _rewrite(d, lambda s: s.update({NORM: torch.ones(31)})), f"{NORM} has shape [31]"),
    "integer weights": (
        lambda d: _rewrite(d, lambda s: s.update({NORM: torch.ones(32, dtype=torch.int8)})), f"{NORM} has dtype I8",
    ),
    "truncated": (lambda d: _cut(d, -100), "truncated"),
    "truncated header": (lambda d: _cut(d, 500), "truncated"),
    "empty file": (lambda d: _cut(d, 0), "truncated: it has 0 bytes"),
    "garbage": (lambda d: (d / WEIGHTS).write_bytes(b"\x10" * 500), "does not begin with a header"),
    "header not JSON": (
        lambda d: (d / WEIGHTS).write_bytes((40).to_bytes(8, "little") + b"{" * 40), "its header is not JSON",
    ),
    "header a list": (
        lambda d: (d / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]"), "does not begin with a header",
    ),
    "tensor twice": (
        lambda d: (d / WEIGHTS).write_bytes((16).to_bytes(8, "little") + b'{"a": 1, "a": 2}'), "contains 'a' twice",
    ),
    "unknown dtype": (lambda d: _header(d, lambda h: h[NORM].update(dtype="F3")), f"'dtype' of tensor {NORM} is 'F3'"),
    "negative shape": (lambda d: _header(d, lambda h: h[NORM].update(shape=[-32])), f"'shape' of tensor {NORM} is [-32]"),
    "size and shape disagree": (lambda d: _header(d, lambda h: h[NORM].update(shape=[33])), f"tensor {NORM}"),
    "entry not an object": (lambda d: _header(d, lambda h: h.update({NORM: 3})), f"entry for tensor {NORM} is 3"),
    "a gap": (lambda d: _header(d, lambda h: h.pop("model.layers.1.input_layernorm.weight")), "begins at byte"),
    "bytes left over": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes() + b"more"), "4 bytes after the last tensor",
    ),
    "only a pickle": (_only_pickle, "pytorch_model.bin"),
    "a pickle by another name": (lambda d: (d / WEIGHTS).write_bytes(pickle.dumps({"a": 1})), "PyTorch pickle"),
    "a zip by another name": (lambda d: torch.save({"a": torch.ones(2)}, d / WEIGHTS), "PyTorch pickle"),
    "a git-lfs pointer": (
        lambda d: (d / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"it has neither {WEIGHTS}"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json:1:2"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list"),
    "index names a missing shard": (
        lambda d: _index(d, {NORM: "model-00002-of-00002.safetensors"}), "model-00002-of-00002.safetensors",
    ),
    "index leaves a tensor out": (
        lambda d: _index(d, {NORM: "model-00001-of-00002.safetensors"}), "does not list",
    ),
    "index names a tensor that is nowhere": (
        lambda d: _index(d, dict.fromkeys([*open_tensors(d), "x"], "model-00001-of-00002.safetensors")), "tensor x",
    ),
    "index leads out of the directory": (lambda d: _index(d, {NORM: "../x.safetensors"}), "'../x.safetensors'"),
    "index without a map": (lambda d: _index(d, None), "'weight_map'"),
    "an adapter": (
        lambda d: (d / "config.json").rename(d / "adapter_config.json"), "holds an adapter",
    ),
    "generation config not an object": (
        lambda d: (d / "generation_config.json").write_text("3"), "generation_config.json holds a int",
    ),
    "stop id a word": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "</s>"}'), "'eos_token_id' is '</s>'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_gets_one_clear_line(fault: str, make: Make) -> None:
    _, directory = make("llama", num_hidden_layers=2)
    break_it, named = BROKEN[fault]
    break_it(directory)
    with pytest.raises(UserError) as caught:
        read_stop_ids(directory)
        load_model(directory)
    assert (
        named in str(caught.value) and str(directory) in str(caught.value) and "\n" not in str(caught.value)
    )


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"checkpoint directory .*nowhere does not exist"):
        open_tensors(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [("x", "F32", (2,), np.arange(8, dtype=np.uint8))])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tensor x has 8 bytes; its shape and dtype need 12"):
        write_safetensors(path, [("x", "F32", (3,), np.arange(8, dtype=np.uint8))])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert safetensors.torch.load_file(path)["x"].numpy().tobytes() == bytes(range(8))
