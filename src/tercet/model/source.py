"""Find a model's files: the directory behind a reference, and the base model of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.errors import UserError
from tercet.model.adapter_config import CONFIG as ADAPTER_CONFIG
from tercet.model.adapter_config import AdapterConfig, is_adapter, read_adapter_config
from tercet.model.gguf_directory import gguf_directory
from tercet.model.hub import fetch, fetch_tokenizer
from tercet.model.reference import HUB_NAME, Reference
from tercet.model.tokenizer import TOKENIZER

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Source:
    """The directories of one model: ``adapter`` is merged into the weights of ``base``.

    An adapter's own tokenizer and generation settings take precedence over the base's.
    """

    base: Path
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The directory whose tokenizer the model uses."""
        return self._directory_with(TOKENIZER)

    @property
    def generation(self) -> Path:
        """The directory whose generation_config.json the model uses."""
        return self._directory_with(GENERATION_CONFIG)

    def _directory_with(self, name: str) -> Path:
        if self.adapter is not None and (self.adapter / name).is_file():
            return self.adapter
        return self.base


def source_in(directory: str | Path) -> Source:
    """Return the files of the checkpoint or adapter in ``directory``.

    Raises:
        UserError: ``directory`` holds an adapter whose base model cannot be found.
    """
    directory = Path(directory)
    if is_adapter(directory):
        return Source(find_base(directory), directory)
    return Source(directory)


def directory_of(reference: Reference) -> Path:
    """Return the directory of a local model, downloaded from the Hub if needed.

    Raises:
        UserError: the model is hosted elsewhere, or the Hub does not provide it.
    """
    if not reference.is_local:
        raise _hosted(reference)
    if reference.kind == "gguf" and reference.path is not None:
        return gguf_directory(reference.path)
    return reference.path if reference.path is not None else fetch(reference.name, reference.revision)


def tokenizer_directory_of(reference: Reference) -> Path:
    """Return a directory that holds a model's tokenizer; nothing else is downloaded.

    Raises:
        UserError: the model is hosted elsewhere, or the Hub does not provide it.
    """
    if not reference.is_local:
        raise _hosted(reference)
    if reference.kind == "gguf":
        return directory_of(reference)
    return (
        reference.path if reference.path is not None else fetch_tokenizer(reference.name, reference.revision)
    )


def _hosted(reference: Reference) -> UserError:
    return UserError(
        f"{reference.text} is a hosted model, so its files are not on this machine; name a local one"
    )


def find_base(adapter: Path) -> Path:
    """Return the directory of an adapter's base model, downloaded from the Hub if needed.

    Raises:
        UserError: the adapter's configuration is wrong or names no base model that can be found.
    """
    config = read_adapter_config(adapter)
    name = config.base_model
    if not name:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: field 'base_model_name_or_path' is empty; write the base's path"
        )
    if directories := base_directories(adapter, config):
        return directories[0]
    if HUB_NAME.fullmatch(name):
        return fetch(name, config.revision)
    raise UserError(
        f"{adapter / ADAPTER_CONFIG}: the base model {name} is not a directory here; "
        "download it, or correct field 'base_model_name_or_path'"
    )


def base_directories(adapter: Path, config: AdapterConfig) -> list[Path]:
    """Return the local directories that the base's name may mean: beside the adapter, then from here."""
    if not config.base_model:
        return []
    # Joining an absolute path to a directory gives the absolute path itself.
    return [path for path in (adapter / config.base_model, Path(config.base_model)) if path.is_dir()]
