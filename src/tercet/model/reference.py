"""Model references: the one grammar by which every command and function names a model.

==========================  ============================================================
``runs/mine/model``         a Hugging Face checkpoint directory
``runs/tuned/model``        an adapter directory (PEFT); its configuration names its base
``runs/mine``               a run directory of Tercet; the model is its ``model/``
``models/mine.gguf``        a GGUF file; of a split file any part
``builtin:smollm2``         a small chat model that Tercet fetches by itself
``org/name[@revision]``     a model on the Hugging Face Hub
``org/name:Q4_K_M``         a GGUF file of a repository on the Hub, by its quantisation;
                            ``org/name@revision:Q4_K_M`` at a revision
``org/name/FILE.gguf``      a GGUF file of a repository on the Hub, by its path
``ollama:NAME[:TAG]``       a model that Ollama has downloaded
``lmstudio:ORG/NAME``       a model that LM Studio has downloaded; ``/FILE.gguf`` may follow
``package:NAME``            the GGUF file in an installed Python package; ``/FILE.gguf``
                            may follow
``openai:NAME``             OPENAI_API_KEY, and OPENAI_BASE_URL if it is set
``anthropic:NAME``          ANTHROPIC_API_KEY
``http://host/v1#NAME``     any server that speaks OpenAI's protocol (``#NAME`` can be
                            omitted if it serves one model)
``transformers:REF``        a checkpoint directory or ``org/name``, run by the
                            transformers library: for architectures that Tercet's own
                            network lacks
==========================  ============================================================
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tercet.errors import UserError, nearest
from tercet.model.gguf_file import is_gguf

Kind = Literal[
    "checkpoint", "adapter", "gguf", "builtin", "hub", "openai", "anthropic", "http", "transformers"
]
Origin = Literal["", "package", "ollama", "lmstudio"]
GRAMMAR = (
    "a checkpoint or adapter directory, a GGUF file, builtin:smollm2, org/name or org/name:QUANTISATION on the "
    "Hub, ollama:NAME, lmstudio:ORG/NAME, package:NAME, openai:NAME, anthropic:NAME, http://HOST/v1#NAME or "
    "transformers:REF"
)
# Anthropic documents this endpoint for clients of OpenAI's protocol.
ANTHROPIC_URL = "https://api.anthropic.com/v1/"
OPENAI_URL = "https://api.openai.com/v1"

_REPOSITORY = r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^\s@:]+))?"
HUB_NAME = re.compile(_REPOSITORY)
# A quantisation after a colon, or the path of a file in the repository.
_HUB_FILE = re.compile(
    rf"{_REPOSITORY}(?::(?P<quantization>[\w.-]+)|/(?P<file>[^\s:@]+\.gguf))", re.IGNORECASE
)
_HUB_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^\s#?]+)")
SCHEMES = ("builtin", "ollama", "lmstudio", "package", "openai", "anthropic", "transformers", "http", "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """A parsed model reference. ``text`` is the user's own spelling, which every report shows."""

    kind: Kind
    text: str
    name: str = ""  # the model's name on its server, on the Hub, among the built-in models, in Ollama
    path: Path | None = None  # checkpoint, adapter, gguf (the file), transformers
    revision: str | None = None  # hub, transformers
    base_url: str = ""  # openai, anthropic, http
    quantization: str = ""  # hub: of a GGUF file, or the file's path in the repository
    origin: Origin = ""  # gguf: whose file it is; empty for one named by its path

    @property
    def is_local(self) -> bool:
        """Whether the model's weights run in this process."""
        return self.kind in ("checkpoint", "adapter", "gguf", "builtin", "hub", "transformers")


def directory_kind(directory: Path) -> Literal["checkpoint", "adapter"] | None:
    """Return the kind of model that a directory holds, by the configuration file in it."""
    if (directory / "adapter_config.json").is_file():
        return "adapter"
    return "checkpoint" if (directory / "config.json").is_file() else None


def models_under(root: str | Path, depth: int = 5) -> list[Path]:
    """Return every checkpoint and adapter directory under ``root``, newest first; hidden ones are skipped.

    A directory with a configuration but no weights is still being written and is skipped, too.
    """
    root = Path(root)
    models: list[tuple[int, Path]] = []
    for folder, directories, files in os.walk(root):
        directory = Path(folder)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        if len(directory.relative_to(root).parts) >= depth:
            directories.clear()
        weights = [name for name in files if name.endswith(".safetensors")]
        if directory_kind(directory) and weights:
            directories.clear()  # a checkpoint holds no other model
            models.append((max((directory / name).stat().st_mtime_ns for name in weights), directory))
    return [directory for _, directory in sorted(models, key=lambda item: (-item[0], str(item[1])))]


def parse_reference(text: str) -> Reference:
    """Parse a model reference. This looks at the disk, never at the network.

    Raises:
        UserError: there is no such model; the message says why and names the nearest that exist.
    """
    text = text.strip()
    if not text:
        raise UserError(f"the model reference is empty; a model is {GRAMMAR}")
    path = Path(text).expanduser()
    if path.exists():
        return _local(text, path)
    if on_site := _HUB_SITE.fullmatch(text):
        raise UserError(f"{text}: for a model on the Hub, write {_on_hub(on_site[1])}")
    if text.startswith(("http://", "https://")):
        return _server(text)
    if scheme := _SCHEME.fullmatch(text):
        return _provider(text, scheme.group(1), scheme.group(2).strip())
    if (reference := hub_reference(text)) is not None and not _mistyped_path(text, reference):
        return reference
    hint = _suggestions(text)
    if reference is None:
        raise UserError(f"no model at {text}: no such {_noun(text)}{hint}. A model is {GRAMMAR}")
    on_hub = f"{reference.name}@main" + text.removeprefix(reference.name)
    raise UserError(
        f"no model at {text}: no such {_noun(text)}{hint} (for a model on the Hub, write {on_hub})"
    )


def hub_reference(text: str) -> Reference | None:
    """Return the reference of a model on the Hub; None if ``text`` does not have that form."""
    if match := HUB_NAME.fullmatch(text):
        return Reference("hub", text, name=match["name"], revision=match["revision"])
    if match := _HUB_FILE.fullmatch(text):
        file = match["quantization"] or match["file"]
        return Reference("hub", text, name=match["name"], revision=match["revision"], quantization=file)
    return None


def _mistyped_path(text: str, reference: Reference) -> bool:
    """Whether a text that has the form of a Hub name is rather a local path: "runs/mien", "models/mine.gguf"."""
    if reference.revision:
        return False
    return Path(text.split("/")[0]).is_dir() or reference.name.lower().endswith(".gguf")


def _noun(text: str) -> str:
    return "file" if text.lower().endswith(".gguf") else "directory"


def _on_hub(path: str) -> str:
    """Return the reference of what a page of the Hub's site shows."""
    parts = path.strip("/").split("/")
    if len(parts) > 4 and parts[2] in ("blob", "resolve", "tree"):
        revision = "" if parts[3] == "main" else f"@{parts[3]}"
        return "/".join([*parts[:2]]) + revision + "/" + "/".join(parts[4:])
    return "/".join(parts[:3] if parts[-1].endswith(".gguf") else parts[:2])


def _local(text: str, path: Path) -> Reference:
    if path.is_file():
        if is_gguf(path):
            return Reference("gguf", text, name=path.stem, path=path)
        if path.suffix.lower() == ".gguf":
            raise UserError(
                f"{text} is not a GGUF file: it does not begin with the letters GGUF; download it again"
            )
        if directory_kind(path.parent):
            raise UserError(f"{text} is a file, not a model; name its directory, {path.parent}")
        raise UserError(f"{text} is a file, not a model; a model is {GRAMMAR}")
    for directory in (path, path / "model"):
        if kind := directory_kind(directory):
            return Reference(kind, text, name=text, path=directory)
    inside = [str(model) for model in models_under(path)[:3]] + [str(file) for file in _gguf_files(path)[:3]]
    hint = f"; models in it: {', '.join(inside)}" if inside else _suggestions(text)
    raise UserError(f"{text} holds no model: no config.json, adapter_config.json or model/ in it{hint}")


def _gguf_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.gguf")) if _readable(directory) else []


def _server(text: str) -> Reference:
    url, _, name = text.partition("#")
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number, an unclosed bracket
        valid = False
    if not valid:
        raise UserError(f"{text} is not the address of a server; write http://HOST:PORT/v1#NAME")
    return Reference("http", text, name=name, base_url=url.rstrip("/"))


def _provider(text: str, scheme: str, name: str) -> Reference:
    if scheme == "transformers":
        return _through_transformers(text, name)
    if scheme in ("builtin", "ollama", "lmstudio", "package"):
        if not name:
            raise UserError(f"{text} names no model; write {scheme}:NAME")
        return _stored(text, scheme, name)
    if scheme in ("openai", "anthropic"):
        if not name:
            raise UserError(f"{text} names no model; write {scheme}:NAME")
        if scheme == "anthropic":
            return Reference("anthropic", text, name=name, base_url=ANTHROPIC_URL)
        return Reference("openai", text, name=name, base_url=os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
    if similar := nearest(scheme.lower(), SCHEMES):
        meant = f"{similar[0]}://" if similar[0].startswith("http") else f"{similar[0]}:{name}"
        hint = f"; did you mean {meant}?"
    else:
        hint = _suggestions(text)
    if hint_of_ollama := _in_ollama(text):
        hint = hint_of_ollama
    raise UserError(f"{text}: {scheme}: is not a known scheme{hint}. A model is {GRAMMAR}")


def _stored(text: str, scheme: str, name: str) -> Reference:
    """Return the reference of a model that Tercet, another program or a package keeps."""
    if scheme == "builtin":
        from tercet.model.builtin import check_builtin

        check_builtin(name)
        return Reference("builtin", text, name=name)
    if scheme == "ollama":
        from tercet.model.ollama_store import ollama_model

        model = ollama_model(name)
        return Reference("gguf", text, name=model.name, path=model.path, origin="ollama")
    if scheme == "lmstudio":
        from tercet.model.lm_studio import lm_studio_file

        path = lm_studio_file(name)
        return Reference("gguf", text, name=path.stem, path=path, origin="lmstudio")
    from tercet.model.packages import package_file

    path = package_file(name)
    return Reference("gguf", text, name=path.stem, path=path, origin="package")


def _in_ollama(text: str) -> str:
    """Return a hint for the name of a model that Ollama has, such as llama3.2:1b."""
    from tercet.model.ollama_store import ollama_model

    try:
        ollama_model(text)
    except UserError:
        return ""
    return f"; did you mean ollama:{text}?"


def _through_transformers(text: str, name: str) -> Reference:
    if not name:
        raise UserError(f"{text} names no model; write transformers:DIRECTORY or transformers:org/name")
    model = parse_reference(name)
    if model.kind == "adapter":
        raise UserError(
            f"{text} is an adapter, which transformers: does not run; merge it first with tercet export"
        )
    if model.kind not in ("checkpoint", "hub") or model.quantization:
        raise UserError(f"{text}: transformers: runs a checkpoint directory or org/name, not {model.text}")
    return Reference("transformers", text, name=model.name, path=model.path, revision=model.revision)


def _suggestions(text: str) -> str:
    """Return ``; nearest: ...`` with the models beside the path that was meant and those under ./runs."""
    parent = Path(text).expanduser().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    beside = [entry for entry in sorted(parent.iterdir()) if _holds_model(entry)] if _readable(parent) else []
    beside += _gguf_files(parent)
    # A run is suggested by its short name: runs/mine rather than runs/mine/model.
    runs = [model.parent if model.name == "model" else model for model in models_under("runs")]
    candidates = list(dict.fromkeys(str(entry) for entry in [*beside, *runs]))
    similar = nearest(text.rstrip("/"), [*candidates, "builtin:smollm2"], limit=3) or candidates[:3]
    return f"; nearest: {', '.join(similar)}" if similar else ""


def _holds_model(entry: Path) -> bool:
    return entry.is_dir() and bool(directory_kind(entry) or directory_kind(entry / "model"))


def _readable(directory: Path) -> bool:
    return os.access(directory, os.R_OK | os.X_OK)
