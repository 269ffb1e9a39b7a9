"""The files of a model: checkpoints, adapters with their bases, and hosted models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tercet.errors import UserError
from tercet.model import source as source_module
from tercet.model.adapter_config import read_adapter_config
from tercet.model.export import find_source
from tercet.model.reference import Reference, parse_reference
from tercet.model.source import (
    Source,
    base_directories,
    directory_of,
    is_base,
    lasting_name,
    source_in,
    tokenizer_directory_of,
)


def make_adapter(directory: Path, base: str | None, **fields: Any) -> Path:
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    return directory


def make_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def test_a_checkpoint_is_its_own_source(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    source = source_in(base)
    assert source == Source(base)
    assert source.tokenizer == source.generation == base


def test_an_adapters_own_files_take_precedence(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", "../base")
    source = source_in(adapter)
    assert source.base.resolve() == base and source.adapter == adapter
    assert source.tokenizer == source.generation == source.base
    (adapter / "tokenizer.json").write_text("{}")
    assert (source.tokenizer, source.generation) == (adapter, source.base)
    (adapter / "generation_config.json").write_text("{}")
    assert source.generation == adapter


def test_a_base_beside_the_adapter_comes_before_one_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", "base")
    assert source_in(adapter).base == Path("base")
    make_checkpoint(adapter / "base")
    assert source_in(adapter).base == adapter / "base"
    assert base_directories(adapter, read_adapter_config(adapter)) == [adapter / "base", Path("base")]


def test_an_adapter_without_a_base_name_has_no_base_directories(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", None)
    assert base_directories(adapter, read_adapter_config(adapter)) == []
    with pytest.raises(UserError, match="field 'base_model_name_or_path' is empty"):
        source_in(adapter)


def test_a_base_on_the_hub_is_fetched_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None = None) -> Path:
        fetched.append((name, revision))
        return tmp_path / "snapshot"

    monkeypatch.setattr(source_module, "fetch", fetch)
    adapter = make_adapter(tmp_path / "adapter", "org/base", revision="v2")
    assert source_in(adapter).base == tmp_path / "snapshot"
    assert directory_of(parse_reference("org/name@v1")) == tmp_path / "snapshot"
    assert fetched == [("org/base", "v2"), ("org/name", "v1")]


def test_the_hub_and_the_disk_agree_on_which_files_are_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier, a directory with both configurations ran as an adapter but was exported as a checkpoint."""
    make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "snapshot", "../base")
    (adapter / "config.json").write_text("{}")
    monkeypatch.setattr(source_module, "fetch", lambda name, revision=None: adapter)
    on_hub = find_source(Reference("hub", "org/name", name="org/name"))
    assert on_hub == find_source(parse_reference(str(adapter))) == source_in(adapter)
    assert on_hub.adapter == adapter


@pytest.mark.parametrize("find", [directory_of, tokenizer_directory_of])
@pytest.mark.parametrize("text", ["openai:gpt-9", "anthropic:claude", "http://localhost:1/v1#m"])
def test_a_hosted_model_has_no_files(find: Any, text: str) -> None:
    """Earlier, the tokenizer of a hosted model was looked up on the Hub under the model's name."""
    with pytest.raises(UserError, match="is a hosted model, so its files are not on this machine"):
        find(parse_reference(text))


def test_an_adapters_base_may_be_a_gguf_file_or_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models/mine.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    made = make_checkpoint(tmp_path / "cache")
    (made / "gguf.json").write_text(
        json.dumps({"files": [{"path": str(file), "size": 4, "mtime_ns": file.stat().st_mtime_ns}]})
    )
    read: list[Path] = []
    monkeypatch.setattr(source_module, "gguf_directory", lambda path: read.append(Path(path)) or made)
    # An adapter records the file, also where the directory that the cache holds for it was tuned.
    assert lasting_name(parse_reference(str(file))) == lasting_name(parse_reference(str(made))) == str(file)
    assert lasting_name(parse_reference("builtin:smollm2")) == "builtin:smollm2"
    assert lasting_name(parse_reference("org/name@v1:Q8_0")) == "org/name@v1:Q8_0"
    assert source_in(make_adapter(tmp_path / "one", str(file))).base == made
    assert source_in(make_adapter(tmp_path / "two", "../models/mine.gguf")).base == made
    assert [path.resolve() for path in read] == [file, file]
    monkeypatch.setattr("tercet.model.builtin.fetch_builtin", lambda name: file)
    adapter = make_adapter(tmp_path / "three", "builtin:smollm2")
    assert source_in(adapter).base == made
    fetched: list[Any] = []
    monkeypatch.setattr(source_module, "fetch_gguf", lambda *names: fetched.append(names) or file)
    assert source_in(make_adapter(tmp_path / "four", "org/name:Q8_0", revision="v2")).base == made
    assert fetched == [("org/name", "Q8_0", "v2")]
    with pytest.raises(UserError, match=r"adapter_config.json: the base model: no built-in model 'small'"):
        source_in(make_adapter(tmp_path / "five", "builtin:small"))
    with pytest.raises(UserError, match="the base model openai:gpt-4o is not a directory here"):
        source_in(make_adapter(tmp_path / "six", "openai:gpt-4o"))
    config = read_adapter_config(adapter)
    assert is_base(parse_reference("builtin:smollm2"), made, adapter, config)
    assert not is_base(parse_reference(str(file)), made, adapter, config)
    assert is_base(parse_reference(str(file)), made, tmp_path / "two", read_adapter_config(tmp_path / "two"))
