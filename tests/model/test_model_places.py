"""Models of other programs and packages, found by their names: Ollama, LM Studio, installed packages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tercet.errors import UserError
from tercet.model.lm_studio import lm_studio_models
from tercet.model.ollama_store import ollama_model, ollama_models
from tercet.model.packages import package_file, package_models
from tercet.model.reference import parse_reference

IMAGE = "application/vnd.ollama.image."


class Ollama:
    """A store laid out as Ollama lays it out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs").mkdir(parents=True)

    def blob(self, content: bytes | str | dict[str, Any]) -> str:
        data = (
            content
            if isinstance(content, bytes)
            else (content.encode() if isinstance(content, str) else json.dumps(content).encode())
        )
        digest = hashlib.sha256(data).hexdigest()
        (self.directory / "blobs" / f"sha256-{digest}").write_bytes(data)
        return f"sha256:{digest}"

    def manifest(
        self, config: dict[str, Any] | None = None, **layers: bytes | str | dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": self.blob(config or {}),
            },
            "layers": [
                {"mediaType": IMAGE + kind, "digest": self.blob(content)} for kind, content in layers.items()
            ],
        }

    def add(self, path: str, manifest: dict[str, Any], tree: str = "manifests") -> None:
        file = self.directory / tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if tree == "manifests":
            file.write_text(json.dumps(manifest))
        else:  # newer versions write a link to a blob
            file.symlink_to(self.directory / "blobs" / self.blob(manifest).replace(":", "-"))


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ollama:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    return Ollama(tmp_path / "ollama")


def test_a_model_of_ollama_is_found_by_every_spelling_of_its_name(ollama: Ollama) -> None:
    config = {"model_family": "llama", "file_type": "Q8_0", "model_format": "gguf"}
    parameters = {"stop": ["<|eot|>"], "temperature": 0.5}
    manifest = ollama.manifest(
        config, model=b"GGUF one", params=parameters, system="Be brief.", license="MIT"
    )
    ollama.add("registry.ollama.ai/library/llama3.2/1b", manifest)
    ollama.add("registry.ollama.ai/someone/tiny/latest", ollama.manifest(model=b"GGUF two"))
    ollama.add("hf.co/org/name-GGUF/Q4_K_M", ollama.manifest(model=b"GGUF three"))
    model = ollama_model("llama3.2:1b")
    assert model.path.read_bytes() == b"GGUF one"
    assert (model.name, model.family, model.quantization) == ("llama3.2:1b", "llama", "Q8_0")
    assert (model.parameters, model.system) == (parameters, "Be brief.")
    for name in ("LLAMA3.2:1B", "library/llama3.2:1b", "registry.ollama.ai/library/llama3.2:1b"):
        assert ollama_model(name).path == model.path
    assert ollama_model("someone/tiny").path.read_bytes() == b"GGUF two"
    assert ollama_model("hf.co/org/name-GGUF:q4_k_m").path.read_bytes() == b"GGUF three"
    names = [model.name for model in ollama_models()]
    assert names == ["hf.co/org/name-GGUF:Q4_K_M", "llama3.2:1b", "someone/tiny:latest"]
    reference = parse_reference("ollama:llama3.2:1b")
    assert (reference.kind, reference.path, reference.is_local) == ("gguf", model.path, True)


def test_the_newer_tree_of_manifests_comes_first(ollama: Ollama) -> None:
    ollama.add("registry.ollama.ai/library/m/latest", ollama.manifest(model=b"GGUF old"))
    listed = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.ollama.manifest.list.v2+json",
        "manifests": [
            {"digest": ollama.blob(ollama.manifest(tensor=b"x")), "runner": "mlx", "format": "safetensors"},
            {"digest": ollama.blob(ollama.manifest(model=b"GGUF new")), "runner": "ollama", "format": "gguf"},
        ],
    }
    ollama.add("ollama.com/library/m/latest", listed, tree="manifests-v2")
    assert ollama_model("m").path.read_bytes() == b"GGUF new"
    assert len(ollama_models()) == 1


def test_what_ollama_does_not_have_is_one_line(ollama: Ollama) -> None:
    with pytest.raises(
        UserError, match=r"Ollama has no models in .*; set OLLAMA_MODELS to its directory, or: ollama pull"
    ):
        ollama_model("llama3.2")
    ollama.add("registry.ollama.ai/library/llama3.2/1b", ollama.manifest(model=b"GGUF"))
    cases: dict[str, dict[str, Any]] = {
        "cloud": ollama.manifest({"remote_host": "https://ollama.com"}),
        "vectors": ollama.manifest(tensor=b"x"),
        "adapted": ollama.manifest(model=b"GGUF", adapter=b"GGUF a"),
        "gone": ollama.manifest(model=b"GGUF gone"),
        "evil": {"layers": [{"mediaType": IMAGE + "model", "digest": "sha256:../../etc/passwd"}]},
    }
    for name, manifest in cases.items():
        ollama.add(f"registry.ollama.ai/library/{name}/latest", manifest)
    (ollama.directory / "blobs" / f"sha256-{hashlib.sha256(b'GGUF gone').hexdigest()}").unlink()
    (ollama.directory / "manifests/registry.ollama.ai/library/bad").mkdir()
    (ollama.directory / "manifests/registry.ollama.ai/library/bad/latest").write_text("{")
    for name, message in {
        "llama3.1": "Ollama has no model llama3.1 here, but llama3.2:1b; fetch it with: ollama pull llama3.1",
        "cloud": "runs on Ollama's servers",
        "vectors": r"has no GGUF file \(its layers: tensor\)",
        "adapted": "a model and an adapter layer, which Tercet does not join",
        "gone": "is incomplete: .* is missing; run: ollama pull gone",
        "evil": "which is not a digest",
        "bad": "the manifest of bad:latest of Ollama, .* is not a JSON object",
        "../../etc/passwd": "is not a name of a model of Ollama",
    }.items():
        with pytest.raises(UserError, match=message) as problem:
            ollama_model(name)
        assert "\n" not in str(problem.value)
    assert [model.name for model in ollama_models()] == ["llama3.2:1b"]
    with pytest.raises(UserError, match=r"did you mean ollama:llama3.2:1b\?"):
        parse_reference("llama3.2:1b")


def test_models_of_lm_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"LM Studio has no GGUF files in ~/.lmstudio/models"):
        parse_reference("lmstudio:org/name")
    folder, elsewhere = tmp_path / ".lmstudio/models/org/name-GGUF", tmp_path / "disk/org/two"
    for path in (folder, elsewhere):
        path.mkdir(parents=True)
    for file in ("name-Q8_0.gguf", "mmproj-name-F16.gguf"):
        (folder / file).write_bytes(b"GGUF")
    for file in ("two-Q4_0.gguf", "two-F16-00001-of-00002.gguf", "two-F16-00002-of-00002.gguf"):
        (elsewhere / file).write_bytes(b"GGUF")
    (tmp_path / ".lmstudio/settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "disk")}))
    assert [name for name, _ in lm_studio_models()] == [
        "lmstudio:org/name-GGUF",
        "lmstudio:org/two/two-F16-00001-of-00002.gguf",
        "lmstudio:org/two/two-Q4_0.gguf",
    ]
    assert parse_reference("lmstudio:org/name-GGUF").path == folder / "name-Q8_0.gguf"
    assert parse_reference("lmstudio:org/two/two-Q4_0.gguf").path == elsewhere / "two-Q4_0.gguf"
    with pytest.raises(
        UserError, match="LM Studio has 2 files of org/two; name one: lmstudio:org/two/two-F16"
    ):
        parse_reference("lmstudio:org/two")
    with pytest.raises(UserError, match="LM Studio has no model org/nam here, but lmstudio:org/name-GGUF"):
        parse_reference("lmstudio:org/nam")


def install(directory: Path, name: str, files: dict[str, bytes]) -> None:
    """Install a package into a directory; importing it would fail."""
    module = name.replace("-", "_")
    info = directory / f"{module}-1.0.dist-info"
    for path, content in {f"{module}/__init__.py": b"raise SystemExit", **files}.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def test_a_gguf_file_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "some-model", {"some_model/data/model-Q4_0.gguf": b"GGUF"})
    install(tmp_path, "two-models", {"two_models/a.gguf": b"GGUF", "two_models/b.gguf": b"GGUF"})
    install(tmp_path, "cut-model-part1", {"cut_model_part1/model.gguf.part00": b"GGUF"})
    install(tmp_path, "no-model", {"no_model/data.txt": b""})
    file = tmp_path / "some_model/data/model-Q4_0.gguf"
    for name in ("some-model", "some_model", "Some-Model", "some-model/model-Q4_0.gguf"):
        assert package_file(name) == file
    reference = parse_reference("package:some-model")
    assert (reference.kind, reference.path, reference.name) == ("gguf", file, "model-Q4_0")
    assert ("package:some-model", file) in package_models()
    assert ("package:two-models/a.gguf", tmp_path / "two_models/a.gguf") in package_models()
    assert package_file("two-models/b.gguf") == tmp_path / "two_models/b.gguf"
    for name, message in {
        "two-models": "contains 2 GGUF files; name one: package:two-models/a.gguf, package:two-models/b.gguf",
        "two-models/c.gguf": "contains no c.gguf, only package:two-models/a.gguf",
        "cut-model-part1": "contains no GGUF file, only model.gguf.part00, a piece of a file; pieces, which may lie",
        "no-model": "contains no GGUF file$",
        "some-modle": "no package some-modle is installed in this environment; with GGUF files are installed: some-",
    }.items():
        with pytest.raises(UserError, match=message):
            package_file(name)


def test_references_to_files_and_built_in_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mine.gguf").write_bytes(b"GGUF")
    (tmp_path / "models/page.gguf").write_bytes(b"<html>")
    assert parse_reference("models/mine.gguf").kind == "gguf"
    assert parse_reference("builtin:smollm2").kind == "builtin"
    hub = parse_reference("org/name-GGUF:Q4_K_M")
    assert (hub.kind, hub.name, hub.revision, hub.quantization) == ("hub", "org/name-GGUF", None, "Q4_K_M")
    hub = parse_reference("org/name@v1:Q4_K_M")
    assert (hub.name, hub.revision, hub.quantization) == ("org/name", "v1", "Q4_K_M")
    hub = parse_reference("org/name/UD-Q4/name-00001-of-00002.gguf")
    assert (hub.kind, hub.name, hub.quantization) == ("hub", "org/name", "UD-Q4/name-00001-of-00002.gguf")
    for text, message in {
        "models/mien.gguf": "no model at models/mien.gguf: no such file; nearest: models/mine.gguf",
        "models/page.gguf": "is not a GGUF file: it does not begin with the letters GGUF",
        "models": "models in it: models/mine.gguf",
        "other/mine.gguf": "no model at other/mine.gguf: no such file",
        "smollm2": "no such directory; nearest: builtin:smollm2",
        "builtin:smollm": "no built-in model 'smollm'; did you mean builtin:smollm2?",
        "builtin:": "names no model; write builtin:NAME",
        "buildin:smollm2": "did you mean builtin:smollm2?",
        "https://huggingface.co/org/name": "for a model on the Hub, write org/name$",
        "hf.co/org/name:Q4_K_M": "write org/name:Q4_K_M",
        "https://huggingface.co/org/name/blob/main/name-Q8_0.gguf": "write org/name/name-Q8_0.gguf",
        "transformers:org/name:Q4_K_M": "transformers: runs a checkpoint directory or org/name, not",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_reference(text)
