"""Which device a network is computed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tercet.errors import UserError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None = None) -> torch.device:
    """The device called ``name`` ("cuda", "cuda:1", "mps", "cpu"); None: the first of those that is there.

    Raises:
        UserError: there is no such device here.
    """
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
