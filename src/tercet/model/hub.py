"""Downloads from the Hugging Face Hub: a model or data set as local files, from the cache when possible."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from tercet.errors import UserError
from tercet.model.quantization_names import choose_files, models_in, quantizations_in

# Weights, configuration and templates. Pickled weights and Python files are never fetched, nor are
# subdirectories (other formats of the same weights) and Mistral's second copy of its weights.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
EXCLUDED_FILES = ("*/*", "consolidated*")
LIST_SECONDS = 10.0  # in which the Hub must list a repository's files
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.jinja")


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the directory of the model ``name`` ("org/name"), downloaded if it is not in the cache.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured. If the Hub can't be reached,
    a complete snapshot in the cache is used.

    Args:
        name: the model's name on the Hub.
        revision: branch, tag or commit; None: the default branch.

    Raises:
        UserError: no such model or revision, no permission, no connection, no safetensors.
    """
    directory = _snapshot(name, revision, "model", MODEL_FILES, EXCLUDED_FILES)
    if not any(directory.glob("*.safetensors")):
        full_name, models = _with_revision(name, revision), dict[str, list[str]]()
        with contextlib.suppress(UserError):
            models = models_in(repository_files(name, revision))
        if models:
            raise UserError(
                f"{full_name} contains GGUF files, so add a quantisation to its name: "
                f"{quantizations_in(full_name, list(models))}"
            )
        raise UserError(
            f"{full_name} holds no .safetensors file; Tercet reads no other weights "
            "(never pickles), so choose a model that has one"
        )
    return directory


def fetch_gguf(name: str, quantization: str, revision: str | None = None) -> Path:
    """Return a GGUF file of the repository ``name`` ("org/name"), downloaded if it is not in the cache.

    If the Hub can't be reached, a file in the cache is used.

    Args:
        name: the repository's name on the Hub.
        quantization: ``Q4_K_M``, in any case, or the path of a file in the repository.
        revision: branch, tag or commit; None: the default branch.

    Returns:
        The file; of a split one the first part, beside the others.

    Raises:
        UserError: no such repository, revision or quantisation (the message lists those that there are), no
            permission, no connection.
    """
    full_name = _with_revision(name, revision)
    files = choose_files(full_name, repository_files(name, revision), quantization)
    directory = _snapshot(name, revision, "model", [glob.escape(file) for file in files], ())
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{full_name}: {missing[0]} is not in the cache, and the Hub cannot be reached")
    return directory / files[0]


def repository_files(name: str, revision: str | None = None) -> list[str]:
    """Return the paths of all files of a repository; of those in the cache where the Hub can't be reached.

    Raises:
        UserError: no such repository or revision, no permission, no connection and nothing in the cache.
    """
    from huggingface_hub import HfApi, constants, errors

    full_name = _with_revision(name, revision)
    with _explained(name, revision, "model"):
        try:
            siblings = HfApi().model_info(name, revision=revision, timeout=LIST_SECONDS).siblings or []
            return [sibling.rfilename for sibling in siblings]
        except errors.HFValidationError:
            raise
        except Exception as problem:  # httpx's errors of connections have no class in common with the others
            if getattr(getattr(problem, "response", None), "status_code", 500) < 500:
                raise
            reason = problem
    if (directory := cached_snapshot(name, revision)) is not None:
        return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    if constants.is_offline_mode():
        raise UserError(
            f"{full_name} is not in the cache, and HF_HUB_OFFLINE forbids downloading it"
        ) from reason
    raise UserError(
        f"{full_name} is not in the cache, and {constants.ENDPOINT} cannot be reached: {_line(reason)}"
    ) from reason


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the directory in the Hub's cache with what has been fetched of a model; None if nothing has.

    The network is not used.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except errors.IncompleteSnapshotError as problem:  # a part of its files, as is usual for GGUF files
        return Path(problem.snapshot_path)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError):
        return None


def fetch_tokenizer(name: str, revision: str | None = None) -> Path:
    """Return a directory with the tokenizer files of the model ``name``, as far as it has any.

    Raises:
        UserError: no such model or revision, no permission, no connection.
    """
    return _snapshot(name, revision, "model", TOKENIZER_FILES, EXCLUDED_FILES)


def fetch_dataset(name: str, revision: str | None, patterns: Sequence[str]) -> list[Path]:
    """Return the files of the data set ``name`` that match one of ``patterns``, sorted.

    Raises:
        UserError: no such data set or revision, no permission, no connection, no such file.
    """
    directory = _snapshot(name, revision, "dataset", patterns, ())
    # A snapshot in the cache may hold files that were fetched for other patterns.
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and any(fnmatch(path.relative_to(directory).as_posix(), pattern) for pattern in patterns)
    ]
    if not files:
        raise UserError(f"the data set {name} holds no file {' '.join(patterns)}")
    return files


def _with_revision(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _snapshot(
    name: str, revision: str | None, kind: str, patterns: Sequence[str], excluded: Sequence[str]
) -> Path:
    """Return the snapshot directory of a model or data set, with the files that match ``patterns``."""
    from huggingface_hub import snapshot_download

    with _explained(name, revision, kind):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                repo_type=kind,
                allow_patterns=list(patterns),
                ignore_patterns=list(excluded),
            )
        )


@contextlib.contextmanager
def _explained(name: str, revision: str | None, kind: str) -> Iterator[None]:
    """Raise UserError, in one line, for the errors of huggingface_hub."""
    from huggingface_hub import constants, errors

    full_name = _with_revision(name, revision)
    hub = constants.ENDPOINT
    page = name if kind == "model" else f"datasets/{name}"
    try:
        yield
    except errors.GatedRepoError as problem:
        raise UserError(
            f"{full_name} is gated: accept its terms at {hub}/{page}, then set HF_TOKEN to your token"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise UserError(f"{name} has no revision {revision!r} on {hub}") from problem
    except errors.RepositoryNotFoundError as problem:
        raise UserError(
            f"no {kind} {name} on {hub} (a private {kind} needs HF_TOKEN), and no such directory here"
        ) from problem
    except errors.HFValidationError as problem:
        raise UserError(f"{full_name} is not a valid name on the Hub: {_line(problem)}") from problem
    except errors.LocalEntryNotFoundError as problem:
        if constants.is_offline_mode():
            raise UserError(
                f"{full_name} is not in the cache, and HF_HUB_OFFLINE forbids downloading it"
            ) from problem
        cause = problem.__cause__ or problem
        if isinstance(cause, errors.RevisionNotFoundError):
            raise UserError(f"{name} has no revision {revision!r} on {hub}") from problem
        raise UserError(
            f"{full_name} is neither a directory here nor in the cache, and {hub} cannot be reached: {_line(cause)}"
        ) from problem
    except (errors.HfHubHTTPError, OSError) as problem:
        raise UserError(f"cannot fetch {full_name} from {hub}: {_line(problem)}") from problem


def _line(problem: BaseException) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 200 else text[:197] + "..."
