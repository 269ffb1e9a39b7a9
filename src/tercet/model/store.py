"""The models on this machine: what ``tercet models`` lists, and what ``tercet rm`` may remove.

Only what Tercet or huggingface_hub has downloaded is removed. The files of other programs, of packages, of run
directories and of the user stay.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tercet.errors import UserError
from tercet.files import cache_directory, directory_size, read_json
from tercet.model.adapter_config import read_adapter_config
from tercet.model.builtin import BUILTINS, builtin_directory, cached_builtin
from tercet.model.gguf_file import GGUFFile
from tercet.model.gguf_index import holds_gguf, source_files
from tercet.model.hub_cache import hub_models, prepare_deletion
from tercet.model.lm_studio import lm_studio_models
from tercet.model.ollama_store import ollama_models
from tercet.model.packages import package_models
from tercet.model.quantization_names import quantization_of
from tercet.model.reference import Reference, directory_kind, models_under, parse_reference
from tercet.model.source import directory_of, files_of, source_in

PACKED = "packed"  # directory of the cache with weights in the form that the CPU kernels read
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class StoredModel:
    """A model on this machine.

    Attributes:
        name: the reference, as a command takes it.
        bytes: size of its files.
        family: the architecture ("llama", "gemma3"), or "adapter".
        type: the quantisation or the type of its weights ("Q4_K_M", "BF16"); empty if its files do not say.
        origin: whose it is: Tercet's cache, the Hub's cache, Ollama, LM Studio, a package, runs, this directory.
        path: its file or directory.
        used: when its weights were last read, in seconds since 1970, as far as the file system records it.
    """

    name: str
    bytes: int
    family: str
    type: str
    origin: str
    path: str
    used: float


@dataclass(frozen=True)
class Removal:
    """A removal that has been prepared but not done.

    Attributes:
        name: the model.
        bytes: what it frees, without packed weights.
        paths: what is deleted.
        execute: deletes it, and the caches made of it.
        shared: whether other programs use the files too.
    """

    name: str
    bytes: int
    paths: list[Path]
    execute: Callable[[], None]
    shared: bool


def models(runs: str | Path = "runs") -> list[StoredModel]:
    """Return the models on this machine, those that Tercet fetched first.

    Args:
        runs: the directory of run directories to look into.
    """
    stored = [
        _described(f"builtin:{name}", path, "Tercet's cache" if path.is_file() else "Hub cache")
        for name in BUILTINS
        if (path := cached_builtin(name)) is not None
    ]
    stored += [
        _described(model.name, model.path, "Hub cache", model.bytes, model.used) for model in hub_models()
    ]
    for entry in ollama_models():
        status = entry.path.stat()
        name = f"ollama:{entry.name}"
        stored.append(
            StoredModel(
                name,
                status.st_size,
                entry.family,
                entry.quantization,
                "Ollama",
                str(entry.path),
                status.st_atime,
            )
        )
    stored += [_described(name, path, "LM Studio") for name, path in lm_studio_models()]
    stored += [_described(name, path, "package") for name, path in package_models()]
    for directory in models_under(runs):
        short = directory.parent if directory.name == "model" else directory
        stored.append(_described(str(short), directory, "runs"))
    stored += [_described(path.name, path, "this directory") for path in sorted(Path().glob("*.gguf"))]
    return stored


def _described(
    name: str, path: Path, origin: str, size: int | None = None, used: float | None = None
) -> StoredModel:
    """Return a model with what its own files say."""
    family, type = _about_file(path) if path.is_file() else _about_directory(path)
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    if size is None:
        size = path.stat().st_size if path.is_file() else directory_size(path)
    if used is None:
        used = max((file.stat().st_atime for file in files), default=0.0)
    return StoredModel(name, size, family, type, origin, str(path.absolute()), used)


def _about_file(path: Path) -> tuple[str, str]:
    """Return the architecture and the type of most of a GGUF file's weights, or the type that its name says."""
    with contextlib.suppress(UserError):
        file = GGUFFile(path)
        sizes: dict[str, int] = {}
        for tensor in file.tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        type = quantization_of(path.name) or max(sizes, key=sizes.__getitem__, default="")
        return file.text("general.architecture", ""), type
    return "", quantization_of(path.name)


def _about_directory(path: Path) -> tuple[str, str]:
    """Return the family and the type of a checkpoint or adapter directory."""
    with contextlib.suppress(UserError):
        if directory_kind(path) == "adapter":
            return "adapter", f"rank {read_adapter_config(path).r}"
        config = read_json(path / "config.json")
        dtype = config.get("dtype") or config.get("torch_dtype") or ""
        return str(config.get("model_type") or ""), _DTYPES.get(str(dtype), str(dtype))
    return "", ""


def fetch_model(reference: Reference) -> StoredModel:
    """Return a local model, downloaded if it is not here; of an adapter its base is downloaded, too.

    Raises:
        UserError: the model is hosted, can't be fetched, or its files can't be read.
    """
    if not reference.is_local:
        raise UserError(f"{reference.text} is a hosted model; there is nothing to fetch")
    source_in(directory_of(reference))
    path = files_of(reference)
    origin = "this machine" if reference.path is not None else "Hub cache"
    if reference.kind == "builtin" and path.is_file():
        origin = "Tercet's cache"
    return _described(reference.text, path, origin)


# Removal


def prepare_removal(name: str) -> Removal:
    """Return what would remove the model of that name.

    Raises:
        UserError: it is not here, or it belongs to another program or to the user.
    """
    if name.startswith("ollama:"):
        raise UserError(f"{name} belongs to Ollama; remove it with: ollama rm {name.removeprefix('ollama:')}")
    if name.startswith("lmstudio:"):
        raise UserError(f"{name} belongs to LM Studio; remove it there, under My Models")
    if name.startswith("package:"):
        package = name.removeprefix("package:").split("/")[0]
        raise UserError(f"{name} belongs to an installed package; remove it with: pip uninstall {package}")
    reference = parse_reference(name)
    if reference.kind == "builtin":
        return _removal_of_builtin(reference)
    if reference.kind == "hub":
        deletion = prepare_deletion(reference)
        return Removal(name, deletion.bytes, deletion.paths, _then_clean(deletion.execute), shared=True)
    if reference.path is not None:
        where = reference.path.absolute()
        if reference.kind == "gguf":
            raise UserError(
                f"{name} is a file of yours, {where}, not of the cache; delete it as any other file"
            )
        raise UserError(f"{name} is a directory of yours, {where}, not of the cache; delete it as any other")
    raise UserError(f"{name} is a hosted model; there is nothing of it on this machine")


def _removal_of_builtin(reference: Reference) -> Removal:
    path = cached_builtin(reference.name)
    if path is None:
        raise UserError(f"{reference.text} is not in the cache; nothing to remove")
    own = builtin_directory(reference.name)
    if path.is_file():
        remove = _then_clean(lambda: shutil.rmtree(own))
        return Removal(reference.text, path.stat().st_size, [path], remove, shared=False)
    deletion = prepare_deletion(Reference("hub", reference.text, name=BUILTINS[reference.name].repository))

    def both() -> None:
        deletion.execute()
        shutil.rmtree(own)

    return Removal(reference.text, deletion.bytes, deletion.paths, _then_clean(both), shared=True)


def _then_clean(delete: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            delete()
        except OSError as problem:
            raise UserError(f"cannot delete {problem.filename}: {problem.strerror or problem}") from problem
        clean_caches()

    return run


def clean_caches() -> int:
    """Delete what the cache holds of models that no longer exist; return the bytes that this freed."""
    freed = 0
    for path in _orphans():
        freed += directory_size(path) if path.is_dir() else path.stat().st_size
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return freed


def _orphans() -> Iterator[Path]:
    cache = cache_directory()
    # Hidden directories are being written.
    for directory in [*(cache / "gguf").glob("[!.]*"), *(cache / "ollama").glob("[!.]*")]:
        if not holds_gguf(directory) or not _is_current(directory):
            yield directory
    for record in (cache / PACKED).glob("[!.]*.json"):
        weights = record.with_suffix(".bin")
        with contextlib.suppress(UserError, TypeError, KeyError):
            sources = [Path(source) for source in read_json(record)["directories"]]
            if weights.is_file() and all(map(_exists, sources)):
                continue
        yield from (path for path in (record, weights) if path.is_file())


def _exists(directory: Path) -> bool:
    return directory.is_dir() and (not holds_gguf(directory) or _is_current(directory))


def _is_current(directory: Path) -> bool:
    try:
        return bool(source_files(directory))
    except UserError:
        return False
