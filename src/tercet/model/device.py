"""The device that computes a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tercet.errors import UserError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None = None) -> torch.device:
    """Return the device called ``name`` ("cuda", "cuda:1", "mps", "cpu"); None: the first available one.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, usable in available.items() if usable))
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UserError(f"`device` is {name!r}; it must be cuda, mps or cpu") from problem
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available.get(device.type) or (device.index or 0) >= count:
        kinds = ", ".join(kind for kind, usable in available.items() if usable)
        raise UserError(f"`device` is {name!r}, but this machine only has {kinds}")
    return device
