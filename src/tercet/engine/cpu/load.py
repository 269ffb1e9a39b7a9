"""Load a checkpoint directory into a CPU backend; quantised weights are cached in the user's cache directory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tercet.engine.cpu import Quantization
from tercet.engine.cpu.backend import CPUBackend
from tercet.engine.cpu.layout import layout
from tercet.engine.cpu.pack import Bytes, pack, read_packed
from tercet.engine.cpu.types import weight_types
from tercet.errors import UserError
from tercet.files import cache_directory, fingerprint, replaced_when_complete, write_json
from tercet.model.adapter_config import read_adapter_config
from tercet.model.checkpoint import weights_identity
from tercet.model.weights import Weights
from tercet.progress import say

FORMAT = 2  # change it whenever the layout of packed weights changes, so that old files are not read
MAX_CACHED = 8  # packed models in the cache; the least recently used is deleted first


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
    weights = Weights(directory, adapter)
    config = weights.config
    types = weight_types(config, quantization, weights)
    places = layout(config, types)
    cached = None
    if quantization != "none":
        cached = _cache_file(weights, directory, adapter, f"{quantization} {places.digest()}")
    memory = None if cached is None else read_packed(cached, places.size)
    if memory is None:
        places, memory = pack(config, types, weights, weights.blocks)
        if cached is not None:
            _store(cached, memory, [directory] if adapter is None else [directory, adapter])
    elif cached is not None:
        with contextlib.suppress(OSError):  # a read-only cache can still be read
            cached.touch()
    return CPUBackend(
        config, places, memory, quantization=quantization, parameters=weights.parameters, threads=threads
    )


def _cache_file(weights: Weights, directory: str | Path, adapter: str | Path | None, form: str) -> Path:
    """Return the file that caches these weights, packed in this form (quantisation and types)."""
    directories = [directory] if adapter is None else [directory, adapter]
    sources = [(str(Path(source).resolve()), weights_identity(source)) for source in directories]
    merged = None if adapter is None else asdict(read_adapter_config(adapter))
    name = fingerprint([FORMAT, form, sources, asdict(weights.config), merged])
    return cache_directory() / "packed" / f"{name}.bin"


def _store(path: Path, memory: Bytes, directories: Sequence[str | Path]) -> None:
    """Store a packed model in the cache; report a cache that can't be written to, which only costs time.

    A record beside it names the model's directories, so that it can be deleted with them.
    """
    try:
        record = {"directories": [str(Path(source).resolve()) for source in directories]}
        write_json(path.with_suffix(".json"), record)
        with replaced_when_complete(path) as temporary:
            memory.tofile(temporary)
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
