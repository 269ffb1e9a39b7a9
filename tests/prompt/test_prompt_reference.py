from __future__ import annotations

import os
from pathlib import Path

import pytest

from tercet.errors import UserError
from tercet.model.reference import models_under, parse_reference


def checkpoint(directory: Path, age: int = 0) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    weights = directory / "model.safetensors"
    weights.write_bytes(b"")
    os.utime(weights, (1_000_000 - age, 1_000_000 - age))
    return directory


def adapter(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_checkpoint_directory() -> None:
    checkpoint(Path("mine"))
    reference = parse_reference("mine")
    assert (reference.kind, reference.path, reference.is_local) == ("checkpoint", Path("mine"), True)


def test_a_run_directory_stands_for_the_model_in_it() -> None:
    checkpoint(Path("runs/mine/model"))
    adapter(Path("runs/tuned/model"))
    assert parse_reference("runs/mine").path == Path("runs/mine/model")
    assert parse_reference("runs/mine").text == "runs/mine"
    assert parse_reference("runs/tuned/").kind == "adapter"


def test_a_name_on_the_hub_with_and_without_revision() -> None:
    plain, pinned = parse_reference("org/name-1.5B"), parse_reference("org/name@refs/pr/1")
    assert (plain.kind, plain.name, plain.revision) == ("hub", "org/name-1.5B", None)
    assert (pinned.kind, pinned.name, pinned.revision) == ("hub", "org/name", "refs/pr/1")


def test_a_directory_that_exists_comes_before_the_hub() -> None:
    checkpoint(Path("org/name"))
    assert parse_reference("org/name").kind == "checkpoint"


def test_hosted_models(monkeypatch: pytest.MonkeyPatch) -> None:
    openai = parse_reference("openai:small-1")
    assert (openai.kind, openai.name, openai.base_url) == ("openai", "small-1", "https://api.openai.com/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://proxy/v1")
    assert parse_reference("openai:small-1").base_url == "http://proxy/v1"
    anthropic = parse_reference("anthropic:big")
    assert (anthropic.kind, anthropic.base_url) == ("anthropic", "https://api.anthropic.com/v1/")
    served = parse_reference("http://127.0.0.1:8000/v1/#org/name:tag")
    assert (served.kind, served.name, served.base_url) == ("http", "org/name:tag", "http://127.0.0.1:8000/v1")
    assert parse_reference("https://host/v1").name == ""


def test_a_model_through_the_transformers_library() -> None:
    checkpoint(Path("runs/mine/model"))
    adapter(Path("tuned"))
    local, hub = parse_reference("transformers:runs/mine"), parse_reference("transformers:org/name@main")
    assert (local.kind, local.path, local.text) == (
        "transformers",
        Path("runs/mine/model"),
        "transformers:runs/mine",
    )
    assert (hub.kind, hub.path, hub.name, hub.revision) == ("transformers", None, "org/name", "main")
    assert local.is_local and hub.is_local
    with pytest.raises(UserError, match="is an adapter"):
        parse_reference("transformers:tuned")


def test_a_mistyped_run_names_the_nearest() -> None:
    checkpoint(Path("runs/mine/model"))
    checkpoint(Path("runs/other/model"))
    with pytest.raises(UserError) as caught:
        parse_reference("runs/mien")
    assert "nearest: runs/mine" in str(caught.value)
    assert "runs/mien@main" in str(caught.value)  # the form that means the Hub


def test_a_mistyped_path_names_its_neighbours() -> None:
    checkpoint(Path("models/llama"))
    Path("models/notes").mkdir()
    with pytest.raises(UserError, match=r"nearest: models/llama\b"):
        parse_reference("./models/lama")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("opnai:small", "did you mean openai:small?"),
        ("htp://host/v1", "did you mean http://?"),
        ("openai:", "write openai:NAME"),
        ("http://", "http://HOST:PORT/v1#NAME"),
        ("http://host:port/v1", "http://HOST:PORT/v1#NAME"),
        ("transformers:", "write transformers:DIRECTORY or transformers:org/name"),
        ("transformers:openai:small", "runs a checkpoint directory or org/name, not openai:small"),
        ("transformers:no-such", "no model at no-such"),
        ("transfromers:org/name", "did you mean transformers:org/name?"),
        ("no/such/path", "no such directory"),
        ("just-a-word", "no such directory"),
    ],
)
def test_a_wrong_reference_gets_one_line_that_says_what_is_right(text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_reference(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_model_but_its_directory_may_be() -> None:
    checkpoint(Path("mine"))
    with pytest.raises(UserError, match="name its directory, mine"):
        parse_reference("mine/model.safetensors")


def test_a_directory_without_a_model_names_those_inside() -> None:
    checkpoint(Path("work/climb/base/model"))
    with pytest.raises(UserError, match=r"work holds no model.*models in it: work/climb/base/model"):
        parse_reference("work")


def test_models_are_found_newest_first_without_hidden_and_half_written_ones() -> None:
    checkpoint(Path("runs/old/model"), age=50)
    checkpoint(Path("runs/new/model"), age=10)
    checkpoint(Path("runs/.new.tmp/model"))
    Path("runs/begun/model").mkdir(parents=True)
    Path("runs/begun/model/config.json").write_text("{}")
    assert models_under("runs") == [Path("runs/new/model"), Path("runs/old/model")]
    assert models_under("nowhere") == []
