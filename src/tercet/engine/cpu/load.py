"""Load a checkpoint directory into a CPU backend; quantised weights are cached in the user's cache directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.engine.cpu import Quantization
from tercet.engine.cpu.backend import CPUBackend
from tercet.engine.cpu.layout import Layout, Types, layout
from tercet.engine.cpu.pack import Bytes, pack, read_packed
from tercet.errors import UserError
from tercet.files import cache_directory, fingerprint, replaced_when_complete, write_json
from tercet.model.adapter_config import read_adapter_config
from tercet.model.checkpoint import read_config, weights_identity
from tercet.model.config import ModelConfig
from tercet.progress import say

if TYPE_CHECKING:
    from tercet.model.weights import Floats, Weights

FORMAT = 4  # change it whenever the layout of packed weights changes, so that old files are not read
IMPORTANCE_TOKENS = 512  # docs/experiments.md
MAX_CACHED = 8  # packed models in the cache; the least recently used is deleted first
SIZE_BYTES = 8  # at the end of a cached file: the size of the description before it


def load_cpu_backend(
    directory: str | Path,
    adapter: str | Path | None = None,
    quantization: Quantization = "int8",
    threads: int | None = None,
) -> CPUBackend:
    """Load a checkpoint for the compiled kernels.

    Args:
        directory: The checkpoint directory.
        adapter: Directory of a LoRA adapter, which is merged into the weights.
        quantization: How the weights are packed.
        threads: Number of threads; None: one for each physical core.

    Raises:
        UserError: The directory holds no model that can be loaded.
    """
    config = read_config(directory)
    cached = None
    if quantization != "none":
        cached = _cache_file(config, directory, adapter, quantization)
    packed = None if cached is None else _read(cached, config)
    if packed is None:
        packed = _pack(config, directory, adapter, quantization, cached)
    elif cached is not None:
        with contextlib.suppress(OSError):  # a read-only cache can still be read
            cached.touch()
    places, memory, parameters = packed
    return CPUBackend(
        config, places, memory, quantization=quantization, parameters=parameters, threads=threads
    )


def _pack(
    config: ModelConfig,
    directory: str | Path,
    adapter: str | Path | None,
    quantization: Quantization,
    cached: Path | None,
) -> tuple[Layout, Bytes, int]:
    """Pack the weights and store them at ``cached``; return their places, the memory and their number."""
    from tercet.engine.cpu.types import weight_types
    from tercet.model.weights import Weights

    weights = Weights(directory, adapter)
    types = weight_types(config, quantization, weights)
    importance = _importance(config, directory, weights, types) if quantization == "int4" else {}
    places, memory = pack(config, types, weights, weights.blocks, importance)
    if cached is not None:
        description = {"types": places.types, "parameters": weights.parameters}
        _store(cached, memory, description, [directory] if adapter is None else [directory, adapter])
    return places, memory, weights.parameters


def _importance(
    config: ModelConfig, directory: str | Path, weights: Weights, types: Types
) -> dict[str, Floats]:
    """Return the importance of columns, measured on documentation of Python's standard library.

    It is empty if no matrix is rounded to few bits, or if the model has no tokenizer. The network that measures
    it is torch's, which takes a few seconds; later starts read the packed weights.
    """
    from tercet.engine.cpu.types import is_rounded
    from tercet.model.tensor_names import network_tensors

    if not any(
        is_rounded(config, part.name, types) for part in network_tensors(config) if len(part.shape) == 2
    ):
        return {}
    from tercet.data.measured_text import docstrings, token_rows
    from tercet.model.importance import column_importance
    from tercet.model.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(directory)
        rows = token_rows(tokenizer, docstrings(), IMPORTANCE_TOKENS, config.max_positions, config.vocab_size)
    except UserError:
        return {}
    return column_importance(weights, rows)[0]


def _cache_file(
    config: ModelConfig, directory: str | Path, adapter: str | Path | None, quantization: Quantization
) -> Path:
    """Return the file that caches these weights, packed in this form."""
    directories = [directory] if adapter is None else [directory, adapter]
    sources = [(str(Path(source).resolve()), weights_identity(source)) for source in directories]
    merged = None if adapter is None else asdict(read_adapter_config(adapter))
    name = fingerprint([FORMAT, quantization, sources, asdict(config), merged])
    return cache_directory() / "packed" / f"{name}.bin"


def _read(path: Path, config: ModelConfig) -> tuple[Layout, Bytes, int] | None:
    """Read a packed model from the cache; None if it is missing or damaged."""
    try:
        with path.open("rb") as stream:
            stream.seek(-SIZE_BYTES, 2)
            end = stream.tell()
            size = int.from_bytes(stream.read(), "little")
            stream.seek(end - size)
            description = json.loads(stream.read(size))
        types: dict[str, str] = description["types"]
        places = layout(config, _lookup(types))
        memory = read_packed(path, places.size, places.size + size + SIZE_BYTES)
        return None if memory is None else (places, memory, int(description["parameters"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lookup(types: dict[str, str]) -> Callable[[str], str]:
    return lambda name: types[name]


def _store(path: Path, memory: Bytes, description: dict[str, Any], directories: Sequence[str | Path]) -> None:
    """Store a packed model in the cache; report a cache that can't be written to, which only costs time.

    A record beside it names the model's directories, so that it can be deleted with them.
    """
    text = json.dumps(description).encode()
    try:
        record = {"directories": [str(Path(source).resolve()) for source in directories]}
        write_json(path.with_suffix(".json"), record)
        with replaced_when_complete(path) as temporary, temporary.open("wb") as stream:
            memory.tofile(stream)
            stream.write(text + len(text).to_bytes(SIZE_BYTES, "little"))
    except (OSError, UserError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        say(
            f"Could not store the quantised weights in {path.parent} ({reason}); the next start quantises again."
        )
        return
    with contextlib.suppress(OSError):  # another process may be deleting old files too
        files = sorted(path.parent.glob("*.bin"), key=lambda file: file.stat().st_mtime)
        for file in files[:-MAX_CACHED]:
            file.unlink()
            file.with_suffix(".json").unlink(missing_ok=True)
