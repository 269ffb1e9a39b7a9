"""How a model is named, everywhere in Tercet: one grammar, read here.

=========================  =============================================================
``runs/mine/model``        a Hugging Face checkpoint directory
``runs/tuned/model``       an adapter directory (PEFT); its base is found from its config
``runs/mine``              a run directory of ours: the ``model/`` inside
``org/name[@revision]``    a model on the Hugging Face Hub
``openai:NAME``            OPENAI_API_KEY, and OPENAI_BASE_URL where it is set
``anthropic:NAME``         ANTHROPIC_API_KEY
``http://host/v1#NAME``    any server that speaks OpenAI's protocol (``#NAME`` may be left
                           out when it serves one model)
``transformers:REF``       a checkpoint directory or ``org/name`` through the transformers
                           library: architectures that our own network does not cover
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

Kind = Literal["checkpoint", "adapter", "hub", "openai", "anthropic", "http", "transformers"]
GRAMMAR = (
    "a checkpoint or adapter directory, org/name on the Hub, openai:NAME, anthropic:NAME, "
    "http://HOST/v1#NAME or transformers:REF"
)
# Anthropic's documented endpoint for clients of OpenAI's protocol.
ANTHROPIC_URL = "https://api.anthropic.com/v1/"
OPENAI_URL = "https://api.openai.com/v1"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^\s@]+)?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """One model, named. ``text`` is what the user wrote and what every report shows."""

    kind: Kind
    text: str
    name: str = ""  # the model's name on its server or on the Hub
    path: Path | None = None  # checkpoint, adapter, transformers
    revision: str | None = None  # hub, transformers
    base_url: str = ""  # openai, anthropic, http

    @property
    def is_local(self) -> bool:
        """Its weights run in this process."""
        return self.kind in ("checkpoint", "adapter", "hub", "transformers")


def directory_kind(directory: Path) -> Literal["checkpoint", "adapter"] | None:
    """What a directory holds, by the configuration file in it."""
    if (directory / "adapter_config.json").is_file():
        return "adapter"
    return "checkpoint" if (directory / "config.json").is_file() else None


def models_under(root: str | Path, depth: int = 5) -> list[Path]:
    """Every checkpoint and adapter directory under ``root``, newest first; hidden ones are left out.

    A directory that holds a configuration but no weights is one that is still being written.
    """
    root = Path(root)
    found: list[tuple[int, Path]] = []
    for folder, directories, files in os.walk(root):
        directory = Path(folder)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        if len(directory.relative_to(root).parts) >= depth:
            directories.clear()
        weights = [name for name in files if name.endswith(".safetensors")]
        if directory_kind(directory) and weights:
            directories.clear()  # a checkpoint holds no other model
            found.append((max((directory / name).stat().st_mtime_ns for name in weights), directory))
    return [directory for _, directory in sorted(found, key=lambda item: (-item[0], str(item[1])))]


def parse_reference(text: str) -> Reference:
    """Read a model reference. Looks at the disk, never at the network.

    Raises:
        UserError: nothing of that name; the line says why and names the nearest that exist.
    """
    text = text.strip()
    if not text:
        raise UserError(f"the model reference is empty; it is {GRAMMAR}")
    path = Path(text).expanduser()
    if path.exists():
        return _local(text, path)
    if text.startswith(("http://", "https://")):
        return _server(text)
    if scheme := _SCHEME.fullmatch(text):
        return _provider(text, scheme.group(1), scheme.group(2).strip())
    if HUB_NAME.fullmatch(text):
        name, _, revision = text.partition("@")
        # "runs/mien" has the form of a Hub name. Where its first part is a directory here, it is a
        # local path with a mistake in it, unless a revision says otherwise.
        if revision or not Path(name.split("/")[0]).is_dir():
            return Reference("hub", text, name=name, revision=revision or None)
        raise UserError(f"no model at {text}: no such directory{_nearest(text)} (for the Hub: {text}@main)")
    raise UserError(f"no model at {text}: no such directory{_nearest(text)}. A model is {GRAMMAR}")


def _local(text: str, path: Path) -> Reference:
    if path.is_file():
        holder = path.parent
        way = f"name its directory, {holder}" if directory_kind(holder) else f"a model is {GRAMMAR}"
        raise UserError(f"{text} is a file, not a model; {way}")
    for directory in (path, path / "model"):
        if kind := directory_kind(directory):
            return Reference(kind, text, name=text, path=directory)
    inside = [str(found) for found in models_under(path)[:3]]
    way = f"; models in it: {', '.join(inside)}" if inside else _nearest(text)
    raise UserError(f"{text} holds no model: no config.json, adapter_config.json or model/ in it{way}")


def _server(text: str) -> Reference:
    url, _, name = text.partition("#")
    try:
        parts = urlsplit(url)
        good = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number, an unclosed bracket
        good = False
    if not good:
        raise UserError(f"{text} is not a server's address; write http://HOST:PORT/v1#NAME")
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
    near = nearest(scheme.lower(), ["openai", "anthropic", "transformers", "http", "https"])
    meant = ""
    if near:
        meant = (
            f"; did you mean {near[0]}://?"
            if near[0] in ("http", "https")
            else f"; did you mean {near[0]}:{name}?"
        )
    raise UserError(f"{text}: no scheme is called {scheme}:{meant or _nearest(text)}. A model is {GRAMMAR}")


def _through_transformers(text: str, name: str) -> Reference:
    if not name:
        raise UserError(f"{text} names no model; write transformers:DIRECTORY or transformers:org/name")
    found = parse_reference(name)
    if found.kind == "adapter":
        raise UserError(
            f"{text} is an adapter, which transformers: does not run; merge it first (tercet tune --merge)"
        )
    if found.kind not in ("checkpoint", "hub"):
        raise UserError(f"{text}: transformers: runs a checkpoint directory or org/name, not {found.text}")
    return Reference("transformers", text, name=found.name, path=found.path, revision=found.revision)


def _nearest(text: str) -> str:
    """``; nearest: ...``: the models beside the path that was meant, and those under ./runs."""
    parent = Path(text).expanduser().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    beside = [entry for entry in sorted(parent.iterdir()) if _holds_model(entry)] if _readable(parent) else []
    # A run is offered by its own short name: runs/mine rather than runs/mine/model.
    runs = [found.parent if found.name == "model" else found for found in models_under("runs")]
    candidates = list(dict.fromkeys(str(entry) for entry in [*beside, *runs]))
    near = nearest(text.rstrip("/"), candidates, limit=3) or candidates[:3]
    return f"; nearest: {', '.join(near)}" if near else ""


def _holds_model(entry: Path) -> bool:
    return entry.is_dir() and bool(directory_kind(entry) or directory_kind(entry / "model"))


def _readable(directory: Path) -> bool:
    return os.access(directory, os.R_OK | os.X_OK)
