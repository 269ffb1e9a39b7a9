"""Names of quantisations in the names of GGUF files, and the choice of a repository's files by them.

Publishers name a file by its quantisation, in any case and after any separator: ``Model-Q4_K_M.gguf``,
``model.q8_0.gguf``, ``BF16/Model-BF16-00001-of-00002.gguf``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tercet.errors import UserError, nearest

_NAME = (
    r"(?:UD[-_])?(?:I?Q[1-8]_(?:K_(?:XXL|XL|XS|S|M|L|P)|K|XXS|XS|S|M|NL|0_\d_\d|0|1)"
    r"|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)"
)
_IN_FILE = re.compile(rf"(?<![A-Za-z0-9])({_NAME})(?![A-Za-z0-9_])", re.IGNORECASE)
QUANTIZATION = re.compile(_NAME, re.IGNORECASE)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.IGNORECASE)
# What lies beside models: projectors of images, adapters, importance matrices, drafters.
_OTHER = re.compile(r"(^|[^a-z])(mmproj|lora|adapter|imatrix)([^a-z]|$)", re.IGNORECASE)


def is_model_file(file: str) -> bool:
    """Return whether a file of a repository is a GGUF file of a model, or a part of one."""
    return file.lower().endswith(".gguf") and not _OTHER.search(file.rsplit("/", 1)[-1])


def quantization_of(file: str) -> str:
    """Return the quantisation in a file's name, or in its folder's, in capitals; empty if there is none."""
    for part in reversed(file.split("/")):
        if names := _IN_FILE.findall(part):
            return _normal(names[-1])
    return ""


def _normal(name: str) -> str:
    return re.sub(r"^FP(?=16|32)", "F", name.upper().replace("UD_", "UD-"))


def models_in(files: Iterable[str]) -> dict[str, list[str]]:
    """Return the GGUF files of a repository by model: the first file's name, and all its parts in order."""
    groups: dict[str, list[str]] = {}
    for file in sorted(filter(is_model_file, files)):
        match = _PART.fullmatch(file)
        key = file if match is None else f"{match[1]}-00001-of-{match[3]}.gguf"
        groups.setdefault(key, []).append(file)
    return groups


def choose_files(repository: str, files: Iterable[str], quantization: str) -> list[str]:
    """Return the files of the model with a quantisation, compared without case; the parts of a split one in order.

    Args:
        repository: the name that messages show.
        files: all files of the repository.
        quantization: the name of a quantisation, or a file.

    Raises:
        UserError: there is no such model, or there are several; the message lists what there is.
    """
    models = models_in(files)
    if not models:
        raise UserError(f"{repository} contains no GGUF files, so it has no quantisations to choose from")
    if quantization.lower().endswith(".gguf"):
        matching = [key for key, parts in models.items() if quantization in (key, *parts)]
    else:
        name = _normal(quantization)
        # A dynamic quantisation (UD-Q4_K_XL) answers to its plain name where there is no other.
        matching = [key for key in models if quantization_of(key) == name] or [
            key for key in models if quantization_of(key) == f"UD-{name}"
        ]
    if len(matching) == 1:
        return models[matching[0]]
    if matching:
        names = ", ".join(f"{repository}/{key}" for key in matching[:6])
        raise UserError(f"{repository} has {len(matching)} models as {quantization}; name one: {names}")
    raise UserError(
        f"{repository} has no {quantization}; {quantizations_in(repository, list(models), quantization)}"
    )


def quantizations_in(repository: str, models: Sequence[str], near: str = "") -> str:
    """Return the references of a repository's GGUF files, for a message."""
    names = list(dict.fromkeys(quantization_of(key) or key for key in models))
    shown = nearest(near.upper(), names) + names if near else names
    shown = list(dict.fromkeys(shown))
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    example = shown[0] if near or "Q4_K_M" not in shown else "Q4_K_M"
    separator = "/" if example.lower().endswith(".gguf") else ":"
    return f"it has {', '.join(shown[:12])}{more}; write, for example, {repository}{separator}{example}"
