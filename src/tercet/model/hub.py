"""A model on the Hugging Face Hub as a local directory: downloaded once, then from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from tercet.errors import UserError

# Weights, configuration and templates. Pickled weights and Python files are never fetched, nor
# subdirectories (other formats of the same weights) and Mistral's second copy of its weights.
WANTED = ("*.safetensors", "*.json", "*.jinja")
UNWANTED = ("*/*", "consolidated*")


def fetch(name: str, revision: str | None = None) -> Path:
    """The directory of ``name`` ("org/name") at ``revision`` (branch, tag or commit).

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured. When the Hub can't be reached,
    a complete snapshot in the cache is used.

    Raises:
        UserError: no such model or revision, no permission, no connection, no safetensors.
    """
    directory = _snapshot(name, revision, "model", WANTED, UNWANTED)
    if not any(directory.glob("*.safetensors")):
        called = name if revision is None else f"{name}@{revision}"
        raise UserError(f"{called} holds no .safetensors; Tercet reads no other weights (never pickles)")
    return directory


def fetch_tokenizer(name: str, revision: str | None = None) -> Path:
    """The directory of the model ``name`` with its tokenizer's files.

    Raises:
        UserError: as `fetch`; no tokenizer is told by who reads it.
    """
    return _snapshot(name, revision, "model", ("tokenizer*", "special_tokens_map.json", "*.jinja"), UNWANTED)


def fetch_dataset(name: str, revision: str | None, patterns: Sequence[str]) -> list[Path]:
    """The files of the data set ``name`` at ``revision`` that match one of ``patterns``, sorted.

    Raises:
        UserError: no such data set or revision, no permission, no connection, no such file.
    """
    directory = _snapshot(name, revision, "dataset", patterns, ())
    # A snapshot in the cache may hold files that were fetched for other patterns.
    found = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and any(fnmatch(path.relative_to(directory).as_posix(), pattern) for pattern in patterns)
    ]
    if not found:
        raise UserError(f"the data set {name} holds no file {' '.join(patterns)}")
    return found


def _snapshot(
    name: str, revision: str | None, kind: str, wanted: Sequence[str], unwanted: Sequence[str]
) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    called = name if revision is None else f"{name}@{revision}"
    hub = constants.ENDPOINT
    page = name if kind == "model" else f"datasets/{name}"
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                repo_type=kind,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
            )
        )
    except errors.GatedRepoError as problem:
        raise UserError(
            f"{called} is gated: accept its terms at {hub}/{page}, then set HF_TOKEN to your token"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise UserError(f"{name} has no revision {revision!r} on {hub}") from problem
    except errors.RepositoryNotFoundError as problem:
        raise UserError(
            f"no {kind} {name} on {hub} (a private one needs HF_TOKEN), and no such directory here"
        ) from problem
    except errors.HFValidationError as problem:
        raise UserError(f"{called} is not a name the Hub can have: {_line(problem)}") from problem
    except errors.LocalEntryNotFoundError as problem:
        if constants.is_offline_mode():
            raise UserError(
                f"{called} is not in the cache, and HF_HUB_OFFLINE forbids fetching it"
            ) from problem
        cause = problem.__cause__ or problem
        if isinstance(cause, errors.RevisionNotFoundError):
            raise UserError(f"{name} has no revision {revision!r} on {hub}") from problem
        raise UserError(
            f"{called} is no directory here, not in the cache, and {hub} cannot be reached: {_line(cause)}"
        ) from problem
    except (errors.HfHubHTTPError, OSError) as problem:
        raise UserError(f"cannot fetch {called} from {hub}: {_line(problem)}") from problem


def _line(problem: BaseException) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 200 else text[:197] + "..."
