"""From a directory on disk to an engine: a checkpoint, or an adapter on its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tercet.engine.engine import Engine
from tercet.errors import UserError
from tercet.model.adapter_config import CONFIG as ADAPTER_CONFIG
from tercet.model.adapter_config import AdapterConfig, is_adapter, read_adapter_config
from tercet.model.checkpoint import read_stop_ids
from tercet.model.hub import fetch
from tercet.model.reference import HUB_NAME
from tercet.model.tokenizer import TOKENIZER, Tokenizer

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def load_engine(directory: str | Path, dtype: str | None = None, device: str | None = None) -> Engine:
    """An engine for a checkpoint or adapter directory.

    dtype: "float32", "bfloat16" or "float16"; None: float32 on a CPU, where arithmetic in half
        precision can be many times slower, otherwise the type on disk.
    device: "cuda", "cuda:1", "mps" or "cpu"; None: the first of cuda, mps and cpu that is there.

    An adapter is merged into its base, which ``adapter_config.json`` names: a path, absolute or
    relative to the adapter or to the working directory, or a name on the Hub. Its tokenizer is used if it has one.

    Raises:
        UserError: the directory holds no model that can be loaded, or the device is not there.
    """
    from tercet.engine.torch_backend import TorchBackend
    from tercet.model.loading import load_model

    directory = Path(directory)
    where = _device(device)
    kind = _dtype(dtype, where)
    if not is_adapter(directory):
        model, base = load_model(directory, kind, where), directory
    else:
        from tercet.model.adapter import load_adapter, merge_lora

        base = _find_base(directory, read_adapter_config(directory))
        model = load_model(base, kind, where)
        load_adapter(model, directory)
        merge_lora(model)
    tokenizer = Tokenizer.load(directory if (directory / TOKENIZER).is_file() else base)
    return Engine(TorchBackend(model), tokenizer, _stop_ids(directory, base, tokenizer))


def _find_base(adapter: Path, config: AdapterConfig) -> Path:
    """The directory of an adapter's base model. Raises UserError when there is none."""
    name = config.base_model
    if not name:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: field 'base_model_name_or_path' is empty; write the base's path"
        )
    for path in (adapter / name, Path(name)):  # an absolute name stays itself
        if path.is_dir():
            return path
    if HUB_NAME.fullmatch(name):
        return fetch(name, config.revision)
    raise UserError(
        f"{adapter / ADAPTER_CONFIG}: the base model {name} is not a directory here; "
        "download it, or correct field 'base_model_name_or_path'"
    )


def _stop_ids(directory: Path, base: Path, tokenizer: Tokenizer) -> list[int]:
    """What the checkpoint names and the tokenizer's own: chat models often name one in each place."""
    own = (directory / "generation_config.json").is_file()
    named = read_stop_ids(directory if own else base)
    return list(named) if tokenizer.eos_id is None else [*named, tokenizer.eos_id]


def _device(name: str | None) -> torch.device:
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, available in there.items() if available))
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UserError(f"device {name!r} is unknown; use cuda, mps or cpu") from problem
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type) or (device.index or 0) >= count:
        have = ", ".join(kind for kind, available in there.items() if available)
        raise UserError(f"device {name!r} is not there; this machine has {have}")
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown; use {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found
