"""Model references: the one grammar by which every command and function names a model.

=========================  =============================================================
``runs/mine/model``        a Hugging Face checkpoint directory
``runs/tuned/model``       an adapter directory (PEFT); its configuration names its base
``runs/mine``              a run directory of Tercet; the model is its ``model/``
``models/mine.gguf``       a GGUF file; of a split file any part
``org/name[@revision]``    a model on the Hugging Face Hub
``openai:NAME``            OPENAI_API_KEY, and OPENAI_BASE_URL if it is set
``anthropic:NAME``         ANTHROPIC_API_KEY
``http://host/v1#NAME``    any server that speaks OpenAI's protocol (``#NAME`` can be omitted
                           if it serves one model)
``transformers:REF``       a checkpoint directory or ``org/name``, run by the transformers
                           library: for architectures that Tercet's own network lacks
=========================  =============================================================
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

Kind = Literal["checkpoint", "adapter", "gguf", "hub", "openai", "anthropic", "http", "transformers"]
GRAMMAR = (
    "a checkpoint or adapter directory, a GGUF file, org/name on the Hub, openai:NAME, anthropic:NAME, "
    "http://HOST/v1#NAME or transformers:REF"
)
# Anthropic documents this endpoint for clients of OpenAI's protocol.
ANTHROPIC_URL = "https://api.anthropic.com/v1/"
OPENAI_URL = "https://api.openai.com/v1"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^\s@]+)?")
SCHEMES = ("openai", "anthropic", "transformers", "http", "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """A parsed model reference. ``text`` is the user's own spelling, which every report shows."""

    kind: Kind
    text: str
    name: str = ""  # the model's name on its server or on the Hub
    path: Path | None = None  # checkpoint, adapter, gguf (the file), transformers
    revision: str | None = None  # hub, transformers
    base_url: str = ""  # openai, anthropic, http

    @property
    def is_local(self) -> bool:
        """Whether the model's weights run in this process."""
        return self.kind in ("checkpoint", "adapter", "gguf", "hub", "transformers")


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
    if text.startswith(("http://", "https://")):
        return _server(text)
    if scheme := _SCHEME.fullmatch(text):
        return _provider(text, scheme.group(1), scheme.group(2).strip())
    if HUB_NAME.fullmatch(text):
        name, _, revision = text.partition("@")
        # "runs/mien" has the form of a Hub name. If its first part is a directory here, it is a
        # mistyped local path, unless it has a revision.
        if revision or not Path(name.split("/")[0]).is_dir():
            return Reference("hub", text, name=name, revision=revision or None)
        raise UserError(
            f"no model at {text}: no such directory{_suggestions(text)} (for a model on the Hub, write {text}@main)"
        )
    raise UserError(f"no model at {text}: no such directory{_suggestions(text)}. A model is {GRAMMAR}")


def _local(text: str, path: Path) -> Reference:
    if path.is_file():
        if is_gguf(path):
            return Reference("gguf", text, name=text, path=path)
        if directory_kind(path.parent):
            raise UserError(f"{text} is a file, not a model; name its directory, {path.parent}")
        raise UserError(f"{text} is a file, not a model; a model is {GRAMMAR}")
    for directory in (path, path / "model"):
        if kind := directory_kind(directory):
            return Reference(kind, text, name=text, path=directory)
    inside = [str(model) for model in models_under(path)[:3]]
    hint = f"; models in it: {', '.join(inside)}" if inside else _suggestions(text)
    raise UserError(f"{text} holds no model: no config.json, adapter_config.json or model/ in it{hint}")


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
    raise UserError(f"{text}: {scheme}: is not a known scheme{hint}. A model is {GRAMMAR}")


def _through_transformers(text: str, name: str) -> Reference:
    if not name:
        raise UserError(f"{text} names no model; write transformers:DIRECTORY or transformers:org/name")
    model = parse_reference(name)
    if model.kind == "adapter":
        raise UserError(
            f"{text} is an adapter, which transformers: does not run; merge it first with tercet export"
        )
    if model.kind not in ("checkpoint", "hub"):
        raise UserError(f"{text}: transformers: runs a checkpoint directory or org/name, not {model.text}")
    return Reference("transformers", text, name=model.name, path=model.path, revision=model.revision)


def _suggestions(text: str) -> str:
    """Return ``; nearest: ...`` with the models beside the path that was meant and those under ./runs."""
    parent = Path(text).expanduser().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    beside = [entry for entry in sorted(parent.iterdir()) if _holds_model(entry)] if _readable(parent) else []
    # A run is suggested by its short name: runs/mine rather than runs/mine/model.
    runs = [model.parent if model.name == "model" else model for model in models_under("runs")]
    candidates = list(dict.fromkeys(str(entry) for entry in [*beside, *runs]))
    similar = nearest(text.rstrip("/"), candidates, limit=3) or candidates[:3]
    return f"; nearest: {', '.join(similar)}" if similar else ""


def _holds_model(entry: Path) -> bool:
    return entry.is_dir() and bool(directory_kind(entry) or directory_kind(entry / "model"))


def _readable(directory: Path) -> bool:
    return os.access(directory, os.R_OK | os.X_OK)
