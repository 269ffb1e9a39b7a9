"""From a checkpoint directory to a CPU backend; quantised weights are kept in the user's cache."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

from tercet.engine.cpu import Quantization
from tercet.engine.cpu.backend import CPUBackend
from tercet.engine.cpu.layout import layout
from tercet.engine.cpu.pack import Bytes, pack, read_packed
from tercet.errors import UserError
from tercet.files import cache_directory, fingerprint, replaced_when_complete
from tercet.model.adapter_config import read_adapter_config
from tercet.model.checkpoint import weights_identity
from tercet.model.weights import Weights
from tercet.progress import say

FORMAT = 1  # changes whenever packed weights would not be read rightly any more
KEPT = 8  # packed models in the cache; the one used longest ago goes first


def load_cpu_backend(
    directory: str | Path,
    adapter: str | Path | None = None,
    quantization: Quantization = "int8",
    threads: int | None = None,
) -> CPUBackend:
    """A checkpoint, with an adapter merged or without, for the compiled kernels.

    Raises:
        UserError: the directory holds no model that can be loaded.
    """
    weights = Weights(directory, adapter)
    config = weights.config
    kept = None if quantization == "none" else _kept_in(weights, directory, adapter, quantization)
    places = layout(config, quantization, weights.dtype)
    memory = None if kept is None else read_packed(kept, places.size)
    if memory is None:
        places, memory = pack(config, quantization, weights.dtype, weights)
        if kept is not None:
            _keep(kept, memory)
    elif kept is not None:
        with contextlib.suppress(OSError):  # a cache that may only be read still serves
            kept.touch()
    return CPUBackend(
        config, places, memory, quantization=quantization, parameters=weights.parameters, threads=threads
    )


def _kept_in(
    weights: Weights, directory: str | Path, adapter: str | Path | None, quantization: Quantization
) -> Path:
    """The file for these weights in this form."""
    sources = [
        (str(Path(one).resolve()), weights_identity(one)) for one in (directory, adapter) if one is not None
    ]
    merged = None if adapter is None else asdict(read_adapter_config(adapter))
    name = fingerprint([FORMAT, quantization, sources, asdict(weights.config), merged])
    return cache_directory() / "packed" / f"{name}.bin"


def _keep(path: Path, memory: Bytes) -> None:
    """Store a packed model. A cache that can't be written to only costs time: it is said."""
    try:
        with replaced_when_complete(path) as temporary:
            memory.tofile(temporary)
    except (OSError, UserError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        say(
            f"The quantised weights could not be kept in {path.parent} ({reason}); they are made again next time."
        )
        return
    with contextlib.suppress(OSError):  # another process may be tidying too
        others = sorted(path.parent.glob("*.bin"), key=lambda file: file.stat().st_mtime)
        for old in others[:-KEPT]:
            old.unlink()
