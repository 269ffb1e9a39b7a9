"""From a directory on disk to an engine: a checkpoint, or an adapter on its base."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tercet.engine.backend import Backend
from tercet.engine.cpu import QUANTIZATIONS, Quantization
from tercet.engine.engine import Engine
from tercet.errors import UserError
from tercet.model.adapter_config import is_adapter
from tercet.model.checkpoint import read_stop_ids
from tercet.model.device import find_device
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
    """An engine for a checkpoint or adapter directory.

    On a CPU Tercet's own kernels compute the network, without torch; elsewhere PyTorch does.

    dtype: "float32", "bfloat16" or "float16" on a GPU, None: the type on disk. On a CPU "float32"
        means weights as they are, "bfloat16" rounded to that; results are float32 in either case.
    device: "cuda", "cuda:1", "mps" or "cpu"; None: the first of cuda, mps and cpu that is there.
    quantize: on a CPU "int8" (what None means unless there is a dtype), "int4", "bf16" or "none".
    threads: on a CPU; None: its physical cores.
    speculation: see `Engine`.
    adapters: directories of adapters to keep beside the weights, by the names that requests choose them by.

    An adapter as ``directory`` is merged into its base, which ``adapter_config.json`` names: a path, absolute or
    relative to the adapter or to the working directory, or a name on the Hub. Its tokenizer is used if it has one.

    Raises:
        UserError: the directory holds no model that can be loaded, the device is not there, or an
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
            raise UserError(f"threads is {threads}; this machine has {available_cores()} cores for it to use")
        backend = load_cpu_backend(source.base, source.adapter, _quantization(dtype, quantize), threads)
    else:
        for name, value in (("quantize", quantize), ("threads", threads)):
            if value is not None:
                raise UserError(
                    f"{name} is for models that run on a CPU; add device='cpu', or leave {name} out"
                )
        backend = _torch_backend(source.base, source.adapter, dtype, device)
    tokenizer = Tokenizer.load(source.tokenizer)
    engine = Engine(backend, tokenizer, _stop_ids(source, tokenizer), speculation=speculation)
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
    """An engine that runs a checkpoint through the transformers library, whatever its architecture.

    Raises:
        UserError: transformers is not installed or cannot load the directory, or it has no tokenizer.json.
    """
    from tercet.engine.transformers_backend import load_transformers

    directory = Path(directory)
    where = find_device(device)
    backend = load_transformers(directory, _dtype(dtype, where), where)
    tokenizer = Tokenizer.load(directory)
    return Engine(backend, tokenizer, _stop_ids(Source(directory), tokenizer), reuse_prefixes=False)


def _torch_backend(base: Path, adapter: Path | None, dtype: str | None, device: str | None) -> Backend:
    from tercet.engine.torch_backend import TorchBackend
    from tercet.model.loading import load_model

    where = find_device(device)
    model = load_model(base, _dtype(dtype, where), where)
    if adapter is not None:
        from tercet.model.adapter import load_adapter, merge_lora

        load_adapter(model, adapter)
        merge_lora(model)
    return TorchBackend(model)


def _quantization(dtype: str | None, quantize: str | None) -> Quantization:
    if dtype is not None and quantize is not None:
        raise UserError("give dtype or quantize, not both: on a CPU each says how the weights are kept")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    if dtype is not None and dtype not in CPU_DTYPES:
        raise UserError(f"dtype {dtype} is for GPUs; on a CPU use {' or '.join(CPU_DTYPES)}, or quantize")
    wanted = CPU_DTYPES[dtype] if dtype is not None else quantize or "int8"
    for known in QUANTIZATIONS:
        if wanted == known:
            return known
    raise UserError(f"quantization {quantize!r} is unknown; use {', '.join(QUANTIZATIONS)}")


def _device_without_torch() -> str | None:
    """ "cpu" where no driver of a GPU is installed: importing torch to ask takes a second or two."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple or sys.platform == "win32" or any(Path(path).exists() for path in drivers):
        return find_device().type
    return "cpu"


def _stop_ids(source: Source, tokenizer: Tokenizer) -> list[int]:
    """What the checkpoint names and the tokenizer's own: chat models often name one in each place."""
    named = read_stop_ids(source.generation)
    return list(named) if tokenizer.eos_id is None else [*named, tokenizer.eos_id]


def _dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown; use {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found
