"""The models that Ollama has downloaded, found by their names and read in place.

Ollama keeps a manifest for each name and tag, and each layer of a model as a file named by its digest::

    manifests/registry.ollama.ai/library/llama3.2/1b    a manifest (JSON)
    manifests-v2/ollama.com/library/llama3.2/1b         newer versions write here, and look here first
    blobs/sha256-HEX                                    a layer: weights, template, system message, parameters

The weights are a GGUF file. Its own chat template is used, not the layer's, which is written in Go's template
language.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tercet.errors import UserError, nearest

TREES = ("manifests-v2", "manifests")
HOSTS = ("ollama.com", "registry.ollama.ai")
NAMESPACE, TAG = "library", "latest"
_MEDIA = "application/vnd.ollama.image."
_PART = re.compile(r"[A-Za-z0-9_][\w.-]*")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


@dataclass(frozen=True)
class OllamaModel:
    """A model in Ollama's store.

    Attributes:
        name: as Ollama shows it, with its tag.
        path: the GGUF file.
        parameters: of the model's ``params`` layer, such as ``temperature`` and ``stop``.
        system: the system message that Ollama gives the model by default.
        family: the architecture, as the manifest says.
        quantization: the type of the weights, as the manifest says.
    """

    name: str
    path: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    family: str = ""
    quantization: str = ""


def ollama_directories() -> list[Path]:
    """Return the directories that hold models: $OLLAMA_MODELS, or those of this user and of the Linux service."""
    if named := os.environ.get("OLLAMA_MODELS"):
        return [Path(named).expanduser()]
    places = [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]
    return [place for place in places if os.access(place, os.R_OK | os.X_OK)]


def ollama_model(name: str) -> OllamaModel:
    """Return the model of that name: ``llama3.2``, ``llama3.2:1b``, ``user/name:tag`` or ``host/user/name``.

    Raises:
        UserError: there is no such model, or it has no weights that Tercet can read.
    """
    if (full := _full_name(name)) is None:
        raise UserError(f"{name!r} is not a name of a model of Ollama, which has the form NAME:TAG")
    for directory in ollama_directories():
        # Ollama compares names without their case.
        manifests = {key.lower(): path for key, path in _manifests(directory).items()}
        if path := manifests.get(full.lower()):
            return _read(short_name(full), path, directory)
    names = [model for directory in ollama_directories() for model in map(short_name, _manifests(directory))]
    if not names:
        places = " or ".join(map(str, ollama_directories())) or "~/.ollama/models"
        raise UserError(
            f"Ollama has no models in {places}; set OLLAMA_MODELS to its directory, or: ollama pull {name}"
        )
    similar = nearest(name, names, limit=3) or sorted(names)[:3]
    raise UserError(
        f"Ollama has no model {name} here, but {', '.join(similar)}; fetch it with: ollama pull {name}"
    )


def ollama_models() -> list[OllamaModel]:
    """Return all models that can be read; others (of other formats, or incomplete) are left out."""
    models: dict[str, OllamaModel] = {}
    for directory in ollama_directories():
        for full, path in _manifests(directory).items():
            with contextlib.suppress(UserError):
                models.setdefault(full, _read(short_name(full), path, directory))
    return [models[full] for full in sorted(models)]


def _full_name(name: str) -> str | None:
    """Return ``HOST/NAMESPACE/MODEL:TAG``; None for what is no name. A host has a dot, as in hf.co."""
    path, _, tag = name.rpartition(":") if ":" in name.rsplit("/", 1)[-1] else (name, "", TAG)
    parts = path.split("/")
    if not all(_PART.fullmatch(part) for part in [*parts, tag]) or len(parts) > 3:
        return None
    parts = [HOSTS[0], NAMESPACE][: 3 - len(parts)] + parts
    return f"{_host(parts[0])}/{parts[1]}/{parts[2]}:{tag}"


def short_name(full: str) -> str:
    """Return a full name without the parts that Ollama fills in, but with the tag."""
    return full.removeprefix(f"{HOSTS[0]}/").removeprefix(f"{NAMESPACE}/")


def _host(host: str) -> str:
    return HOSTS[0] if host in HOSTS else host


def _manifests(directory: Path) -> dict[str, Path]:
    """Return the file of each manifest by the model's full name; the newer tree takes precedence."""
    manifests: dict[str, Path] = {}
    for tree in TREES:
        for path in _files(directory / tree, 4):
            host, namespace, model, tag = path.relative_to(directory / tree).parts
            manifests.setdefault(f"{_host(host)}/{namespace}/{model}:{tag}", path)
    return manifests


def _files(directory: Path, depth: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for path in sorted(directory.iterdir()):
            if path.name.startswith("."):
                continue
            if depth > 1:
                yield from _files(path, depth - 1)
            elif path.is_file():
                yield path


def _read(name: str, path: Path, directory: Path) -> OllamaModel:
    manifest = _json(path, f"the manifest of {name}")
    if isinstance(manifest.get("manifests"), list):  # the same model in several formats
        manifest = _gguf_manifest(name, manifest["manifests"], directory)
    layers: dict[str, list[str]] = {}
    for layer in manifest.get("layers") or ():
        kind = str(layer.get("mediaType", "")).removeprefix(_MEDIA)
        layers.setdefault(kind, []).append(str(layer.get("digest", "")))
    config = manifest.get("config") or {}
    about = _json(_blob(directory, config.get("digest")), f"the configuration of {name}") if config else {}
    weights = layers.get("model", [])
    if not weights:
        if about.get("remote_host") or about.get("remote_model"):
            raise UserError(f"ollama:{name} runs on Ollama's servers; its weights are not on this machine")
        raise UserError(f"ollama:{name} has no GGUF file (its layers: {', '.join(sorted(layers)) or 'none'})")
    for reason, present in (("an adapter layer", "adapter" in layers), ("several files", len(weights) > 1)):
        if present:
            raise UserError(f"ollama:{name} consists of a model and {reason}, which Tercet does not join")
    file = _blob(directory, weights[0])
    if not file.is_file():
        raise UserError(f"ollama:{name} is incomplete: {file} is missing; run: ollama pull {name}")
    parameters = [
        _json(_blob(directory, digest), f"the parameters of {name}") for digest in layers.get("params", [])
    ]
    system = [
        _text(_blob(directory, digest), f"the system message of {name}")
        for digest in layers.get("system", [])
    ]
    return OllamaModel(
        name,
        file,
        {key: value for values in parameters for key, value in values.items()},
        "".join(system).strip() or None,
        str(about.get("model_family") or ""),
        str(about.get("file_type") or ""),
    )


def _gguf_manifest(name: str, entries: list[Any], directory: Path) -> dict[str, Any]:
    """Return the manifest of the model as a GGUF file, of a list with one for each format."""
    formats = []
    for entry in entries:
        formats.append(str(entry.get("format") or entry.get("runner")))
        if formats[-1] == "gguf":
            return _json(_blob(directory, entry.get("digest")), f"the manifest of {name}")
    raise UserError(
        f"ollama:{name} is stored as {', '.join(formats) or 'nothing'} here, which is not a GGUF file"
    )


def _blob(directory: Path, digest: object) -> Path:
    match = _DIGEST.fullmatch(str(digest))
    if match is None:
        raise UserError(f"{directory}: a manifest of Ollama names {digest!r}, which is not a digest")
    return directory / "blobs" / f"sha256-{match[1]}"


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot read {what} of Ollama, {path}: {getattr(problem, 'strerror', problem)}"
        ) from problem


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(path, what))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise UserError(
            f"{what} of Ollama, {path}, is not a JSON object; fetch the model again with ollama pull"
        )
    return content
