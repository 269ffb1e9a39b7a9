"""Loads an engine from a directory on disk: a checkpoint, or an adapter on its base."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tercet.engine.backend import Backend
from tercet.engine.cpu import QUANTIZATIONS, Quantization
from tercet.engine.engine import Engine
from tercet.engine.sampling_defaults import read_sampling_defaults
from tercet.errors import UserError
from tercet.model.adapter_config import is_adapter
from tercet.model.checkpoint import read_stop_ids
from tercet.model.device import find_device
from tercet.model.gguf_index import holds_gguf
from tercet.model.reference import Reference
from tercet.model.source import Source, source_in
from tercet.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
CPU_DTYPES: dict[str, Quantization] = {"float32": "none", "bfloat16": "bf16"}


def load_engine(
    directory: str | Path,
    dtype: str | None = None,
    device: str | None = None,
    *,
    quantize: str | None = None,
    threads: int | None = None,
    speculation: Literal["ngram"] | Engine | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> Engine:
    """Return an engine for a checkpoint or adapter directory.

    On a CPU Tercet's own kernels compute the network, without torch; on other devices PyTorch does.

    An adapter as ``directory`` is merged into its base, which ``adapter_config.json`` names: a path, absolute or
    relative to the adapter or to the working directory, or a name on the Hub. Its tokenizer is used if it has one.

    Args:
        directory: holds the checkpoint or the adapter.
        dtype: on a GPU "float32", "bfloat16" or "float16"; None for the type on disk. On a CPU "float32"
            keeps the weights as they are and "bfloat16" rounds them; results are float32 in either case.
        device: "cuda", "cuda:1", "mps" or "cpu"; None for the first available of cuda, mps and cpu.
        quantize: on a CPU "int8", "int4", "bf16" or "none". None, without ``dtype``, is "int8" for a checkpoint;
            a GGUF file is computed on its own bits.
        threads: on a CPU; None for one on each physical core.
        speculation: as in `Engine`.
        adapters: directories of adapters to load beside the weights, by the names that requests use.

    Raises:
        UserError: the directory holds no model that can be loaded, the device is not available, or an
            option does not fit it.
    """
    directory = Path(directory)
    if adapters and is_adapter(directory):
        raise UserError(
            f"{directory} is an adapter, merged into its base when it is loaded; name the base, and add this "
            "adapter beside the others"
        )
    source = source_in(directory)
    backend: Backend
    if (device or _device_without_torch()) == "cpu":
        from tercet.engine.cpu.load import load_cpu_backend
        from tercet.host import available_cores

        if threads is not None and not 1 <= threads <= available_cores():
            raise UserError(
                f"`threads` is {threads}; this machine has {available_cores()} cores for it to use"
            )
        backend = load_cpu_backend(
            source.base, source.adapter, _quantization(dtype, quantize, holds_gguf(source.base)), threads
        )
    else:
        for name, value in (("quantize", quantize), ("threads", threads)):
            if value is not None:
                raise UserError(
                    f"`{name}` is for models that run on a CPU; add `device=cpu`, or leave `{name}` out"
                )
        backend = _torch_backend(source.base, source.adapter, dtype, device)
    tokenizer = Tokenizer.load(source.tokenizer)
    engine = Engine(backend, tokenizer, _stop_ids(source, tokenizer), speculation=speculation)
    engine.sampling_defaults = _sampling_defaults(source)
    for name, path in (adapters or {}).items():
        engine.add_adapter(name, path)
    return engine


def load_reference(
    reference: Reference,
    directory: Path,
    dtype: str | None = None,
    device: str | None = None,
    *,
    quantize: str | None = None,
    threads: int | None = None,
    speculation: Literal["ngram"] | Engine | None = None,
) -> Engine:
    """Return an engine for a local model reference, whose files are in ``directory``.

    The other arguments are those of `load_engine`. The transformers library takes ``dtype`` and ``device`` only.

    Raises:
        UserError: as `load_engine` and `load_transformers_engine`; a setting that transformers does not take.
    """
    if reference.kind != "transformers":
        return load_engine(
            directory, dtype, device, quantize=quantize, threads=threads, speculation=speculation
        )
    for name, value in (("quantize", quantize), ("threads", threads), ("speculation", speculation)):
        if value is not None:
            raise UserError(f"`{name}` does nothing for {reference.text}: transformers runs it; leave it out")
    return load_transformers_engine(directory, dtype=dtype, device=device)


def load_transformers_engine(
    directory: str | Path, dtype: str | None = None, device: str | None = None
) -> Engine:
    """Return an engine that runs a checkpoint of any architecture through the transformers library.

    Raises:
        UserError: transformers is not installed or cannot load the directory, or it has no tokenizer.json.
    """
    from tercet.engine.transformers_backend import load_transformers

    directory = Path(directory)
    torch_device = find_device(device)
    backend = load_transformers(directory, _dtype(dtype, torch_device), torch_device)
    tokenizer = Tokenizer.load(directory)
    source = Source(directory)
    engine = Engine(backend, tokenizer, _stop_ids(source, tokenizer), reuse_prefixes=False)
    engine.sampling_defaults = _sampling_defaults(source)
    return engine


def _torch_backend(base: Path, adapter: Path | None, dtype: str | None, device: str | None) -> Backend:
    """Return a backend that computes the network with PyTorch."""
    from tercet.engine.torch_backend import TorchBackend
    from tercet.model.loading import load_model

    torch_device = find_device(device)
    model = load_model(base, _dtype(dtype, torch_device), torch_device)
    if adapter is not None:
        from tercet.model.adapter import load_adapter, merge_lora

        load_adapter(model, adapter)
        merge_lora(model)
    return TorchBackend(model)


def _quantization(dtype: str | None, quantize: str | None, gguf: bool) -> Quantization:
    """Return the form of the weights in memory on a CPU; ``gguf``: they come from a GGUF file."""
    if dtype is not None and quantize is not None:
        raise UserError("give `dtype` or `quantize`, not both: on a CPU each sets the form of the weights")
    if dtype is not None:
        _check_dtype(dtype)
        if dtype not in CPU_DTYPES:
            raise UserError(
                f"`dtype` is {dtype!r}, which is for GPUs; on a CPU use {' or '.join(CPU_DTYPES)}, or `quantize`"
            )
    if dtype is None and quantize is None and gguf:
        return "file"
    name = CPU_DTYPES[dtype] if dtype is not None else quantize or "int8"
    for quantization in QUANTIZATIONS:
        if name == quantization:
            return quantization
    raise UserError(f"`quantize` is {quantize!r}; it must be {', '.join(QUANTIZATIONS)}")


def _device_without_torch() -> str | None:
    """Return "cpu" where no GPU driver is installed, without importing torch, which takes a second or two."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple or sys.platform == "win32" or any(Path(path).exists() for path in drivers):
        return find_device().type
    return "cpu"


def _stop_ids(source: Source, tokenizer: Tokenizer) -> list[int]:
    """Return the stop tokens of checkpoint and tokenizer: chat models often name one in each place."""
    named = read_stop_ids(source.generation)
    return list(named) if tokenizer.eos_id is None else [*named, tokenizer.eos_id]


def _sampling_defaults(source: Source) -> dict[str, float]:
    """Return the published sampling settings: the adapter's where it has some, else the base's."""
    own = read_sampling_defaults(source.generation)
    return own or read_sampling_defaults(source.base)


def _dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """Return the torch dtype of that name. For None: float32 on a CPU, elsewhere None, the type on disk."""
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else None
    _check_dtype(name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_dtype(name: str) -> None:
    """Raise UserError for an unknown dtype."""
    if name not in DTYPES:
        raise UserError(f"`dtype` is {name!r}; it must be {', '.join(DTYPES)}")
