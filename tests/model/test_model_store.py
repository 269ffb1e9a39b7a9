"""Built-in models and the list of models: fetched once, listed by name, removed with what was made of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fake_hub import Hub
from tercet.cli.main import main
from tercet.errors import UserError
from tercet.model import builtin, wheels
from tercet.model.builtin import Builtin, builtin_directory, fetch_builtin
from tercet.model.reference import parse_reference
from tercet.model.store import clean_caches, models, prepare_removal
from tercet.model.wheels import Member, Wheel


def write_gguf(path: Path) -> Path:
    """Write a GGUF file with an architecture and a tensor, which no network has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    blocks = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory, without models of anybody."""
    for name in ("OLLAMA_MODELS", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("tercet.model.store.package_models", list)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def tiny(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in model "tiny", which no Hub answers for; a copying command takes the place of pip."""
    file = write_gguf(home / "index/tiny_model/tiny-Q4_1.gguf")
    data = file.read_bytes()
    model = Builtin(
        "org/tiny",
        Member(Wheel("tiny-model==1.0", "0" * 64, len(data)), "tiny_model/tiny-Q4_1.gguf"),
        "tiny-Q4_1.gguf",
        hashlib.sha256(data).hexdigest(),
        len(data),
        "a tiny model",
    )
    monkeypatch.setitem(builtin.BUILTINS, "tiny", model)
    monkeypatch.setattr(builtin, "_answers", lambda repository: False)
    monkeypatch.setattr(wheels, "_command", lambda files, _: ["cp", "-r", str(home / "index"), str(files)])
    return file


def test_a_built_in_model_is_taken_out_of_its_package_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch_builtin("tiny")
    assert path.read_bytes() == tiny.read_bytes()
    assert "the Hub does not answer here; taking tiny-Q4_1.gguf" in capsys.readouterr().err
    monkeypatch.setattr(wheels, "_command", lambda *_: pytest.fail("downloaded again"))
    assert fetch_builtin("tiny") == path
    assert capsys.readouterr().err == ""
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "tiny-Q4_1.gguf"]


def test_a_download_that_fails_leaves_nothing_and_is_tried_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = wheels._command
    script = "import sys; sys.exit('ERROR: [Errno 28] No space left on device')"
    monkeypatch.setattr(wheels, "_command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(
        UserError, match=r"cannot fetch builtin:tiny: .* the disk is full: tiny-model==1.0 needs"
    ):
        fetch_builtin("tiny")
    assert [file.name for file in builtin_directory("tiny").iterdir()] == [".lock"]
    monkeypatch.setattr(wheels, "_command", command)
    tiny.write_bytes(b"GGUF, cut short")
    with pytest.raises(UserError, match="has another SHA-256 than expected"):
        fetch_builtin("tiny")
    assert [file.name for file in builtin_directory("tiny").iterdir()] == [".lock"]
    # What a killed process left behind is deleted.
    (builtin_directory("tiny") / ".tiny-Q4_1.gguf.wheels.tmp/old").mkdir(parents=True)
    write_gguf(tiny)
    assert fetch_builtin("tiny").is_file()
    assert not list(builtin_directory("tiny").glob(".*.tmp"))


def test_a_built_in_model_comes_from_the_hub_where_that_answers(tmp_path: Path) -> None:
    hub = Hub()
    hub.files["HuggingFaceTB/SmolLM2-135M-Instruct"] = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
    }
    code = "from tercet.model.builtin import fetch_builtin; print(fetch_builtin('smollm2'))"

    def run(**more: str) -> tuple[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**ours, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PIP_NO_INDEX": "1", **more}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.strip(), done.stderr

    directory, said = run()
    assert sorted(path.name for path in Path(directory).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert said.startswith("builtin:smollm2: taking HuggingFaceTB/SmolLM2-135M-Instruct from the Hub")
    hub.close()
    assert run(HF_HUB_OFFLINE="1") == (directory, "")


def test_models_are_listed_by_the_names_that_commands_take(
    tiny: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().err.startswith("no models here yet; fetch a small one: tercet pull builtin:")
    fetch_builtin("tiny")
    write_gguf(home / ".lmstudio/models/org/name/name-Q8_0.gguf")
    write_gguf(Path("mine.gguf"))
    run = Path("runs/mine/model")
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "bfloat16"}))
    (run / "model.safetensors").write_bytes(b"x" * 1000)
    snapshot = home / "hub/models--org--name/snapshots/abc"
    for name in ("name-Q6_K.gguf", "name-Q8_0.gguf"):
        write_gguf(snapshot / name)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("abc")
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["models"]
    about: list[tuple[Any, ...]] = [
        (model["name"], model["family"], model["type"], model["origin"]) for model in listed
    ]
    assert about == [
        ("builtin:tiny", "llama", "Q4_1", "Tercet's cache"),
        ("org/name:Q6_K", "llama", "Q6_K", "Hub cache"),
        ("org/name:Q8_0", "llama", "Q8_0", "Hub cache"),
        ("lmstudio:org/name", "llama", "Q8_0", "LM Studio"),
        ("runs/mine", "qwen3", "BF16", "runs"),
        ("mine.gguf", "llama", "Q4_1", "this directory"),
    ]
    for name, *_ in about:
        parse_reference(name)
    assert main(["models"]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "SIZE", "FAMILY", "TYPE", "FROM", "LAST", "USED"]
    assert first.startswith("builtin:tiny") and first.endswith("today")


def test_only_what_was_downloaded_is_removed(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch_builtin("tiny")
    packed = home / "cache/tercet/packed"
    packed.mkdir()
    made = home / "cache/tercet/gguf/tiny"
    made.mkdir(parents=True)
    status = path.stat()
    source = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    (made / "gguf.json").write_text(json.dumps({"files": [source], "tensors": {}}))
    for name, directory in (("of-tiny", made), ("of-another", home)):
        (packed / f"{name}.bin").write_bytes(b"weights")
        (packed / f"{name}.json").write_text(json.dumps({"directories": [str(directory)]}))
    assert clean_caches() == 0
    capsys.readouterr()
    assert main(["rm", "builtin:tiny"]) == 2
    assert "needs a confirmation; add --yes" in capsys.readouterr().err
    assert main(["rm", "builtin:tiny", "--yes"]) == 0
    assert capsys.readouterr().err.startswith("removed builtin:tiny: ")
    assert not path.exists() and not made.exists()
    assert sorted(file.name for file in packed.iterdir()) == ["of-another.bin", "of-another.json"]
    assert models() == []

    write_gguf(Path("mine.gguf"))
    Path("mine").mkdir()
    Path("mine/config.json").write_text("{}")
    for name, message in {
        "builtin:tiny": "is not in the cache; nothing to remove",
        "org/name": "is not in the Hub's cache; nothing to remove",
        "ollama:llama3.2:1b": "belongs to Ollama; remove it with: ollama rm llama3.2:1b",
        "lmstudio:org/name": "belongs to LM Studio",
        "package:some-model": "remove it with: pip uninstall some-model",
        "mine.gguf": "is a file of yours",
        "mine": "is a directory of yours",
        "openai:gpt-4o": "is a hosted model",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare_removal(name)
    assert Path("mine.gguf").exists() and Path("mine/config.json").exists()


def test_a_model_of_the_hub_is_removed_from_its_cache(home: Path) -> None:
    repository = home / "hub/models--org--name"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (repository / "blobs").mkdir()
    for name in ("name-Q6_K.gguf", "name-Q8_0.gguf"):
        write_gguf(repository / "blobs" / name)
        (snapshot / name).symlink_to(repository / "blobs" / name)
    removal = prepare_removal("org/name:q8_0")
    assert removal.shared and removal.paths == [snapshot / "name-Q8_0.gguf"]
    assert removal.bytes == (repository / "blobs/name-Q8_0.gguf").stat().st_size
    removal.execute()
    assert [path.name for path in (repository / "blobs").iterdir()] == ["name-Q6_K.gguf"]
    prepare_removal("org/name").execute()
    assert not repository.exists()
