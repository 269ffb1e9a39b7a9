"""The models in the Hub's cache, which huggingface_hub keeps for all programs: listed and removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.errors import UserError
from tercet.model.quantization_names import choose_files, models_in, quantization_of
from tercet.model.reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo, HFCacheInfo


@dataclass(frozen=True)
class HubModel:
    """A model in the Hub's cache.

    Attributes:
        name: the reference: ``org/name``, ``org/name@revision`` or ``org/name:QUANTISATION``.
        path: the directory of a checkpoint, or the (first) GGUF file.
        bytes: size of its files.
        used: when a file was last read, in seconds since 1970.
    """

    name: str
    path: Path
    bytes: int
    used: float


@dataclass(frozen=True)
class HubDeletion:
    """A removal from the Hub's cache that has been prepared: what it would remove, and the function that does it."""

    paths: list[Path]
    bytes: int
    execute: Callable[[], None]


def hub_models() -> list[HubModel]:
    """Return the checkpoints and GGUF files in the Hub's cache, by name."""
    models = []
    for repository in _scan().repos if _present() else ():
        if repository.repo_type == "model":
            for revision in repository.revisions:
                models += _models(repository, revision)
    return sorted(models, key=lambda model: model.name)


def prepare_deletion(reference: Reference) -> HubDeletion:
    """Return what would remove a model of the Hub: a repository, a revision of it, or the files of a quantisation.

    Raises:
        UserError: it is not in the cache.
    """
    missing = UserError(f"{reference.text} is not in the Hub's cache; nothing to remove")
    if not _present():
        raise missing
    cache = _scan()
    revisions = [
        revision
        for repository in cache.repos
        if repository.repo_id == reference.name and repository.repo_type == "model"
        for revision in repository.revisions
        if reference.revision is None
        or reference.revision in revision.refs
        or revision.commit_hash.startswith(reference.revision)
    ]
    files: list[CachedFileInfo] = []
    if reference.quantization:
        for revision in revisions:
            by_path = _by_path(revision)
            with contextlib.suppress(UserError):
                files += [
                    by_path[file] for file in choose_files(reference.name, by_path, reference.quantization)
                ]
        strategy = cache.delete_files(*files)
        paths = [file.file_path for file in files]
    else:
        strategy = cache.delete_revisions(*(revision.commit_hash for revision in revisions))
        paths = sorted([*strategy.repos, *strategy.snapshots])
    if not paths:
        raise missing
    return HubDeletion(paths, strategy.expected_freed_size, strategy.execute)


def _present() -> bool:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).is_dir()


def _scan() -> HFCacheInfo:
    from huggingface_hub import constants, scan_cache_dir

    return scan_cache_dir(constants.HF_HUB_CACHE)


def _by_path(revision: CachedRevisionInfo) -> dict[str, CachedFileInfo]:
    return {file.file_path.relative_to(revision.snapshot_path).as_posix(): file for file in revision.files}


def _models(repository: CachedRepoInfo, revision: CachedRevisionInfo) -> list[HubModel]:
    name, files = repository.repo_id, _by_path(revision)
    if not revision.refs:
        name += f"@{revision.commit_hash}"
    elif "main" not in revision.refs:
        name += f"@{min(revision.refs)}"

    def model(reference: str, path: Path, names: Sequence[str]) -> HubModel:
        own = [files[file] for file in names]
        used = max(file.blob_last_accessed for file in own)
        return HubModel(reference, path, sum(file.size_on_disk for file in own), used)

    models = []
    top = [file for file in files if "/" not in file]
    if "config.json" in top and any(file.endswith(".safetensors") for file in top):
        checkpoint = [file for file in top if not file.lower().endswith(".gguf")]
        models.append(model(name, revision.snapshot_path, checkpoint))
    groups = models_in(files)
    labels = [quantization_of(file) for file in groups]
    for label, (first, parts) in zip(labels, groups.items(), strict=True):
        unique = label and labels.count(label) == 1
        models.append(
            model(f"{name}:{label}" if unique else f"{name}/{first}", files[parts[0]].file_path, parts)
        )
    return models
