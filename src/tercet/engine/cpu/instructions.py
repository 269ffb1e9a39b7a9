"""The sets of instructions that products of bytes are compiled for."""

from __future__ import annotations

from typing import Literal

from tercet.host import has_vnni, host_features

Instructions = Literal["vnni", "avx2", "portable"]
INSTRUCTIONS: tuple[Instructions, ...] = ("vnni", "avx2", "portable")  # the fastest first


def available(instructions: Instructions) -> bool:
    """Return whether this processor has the instructions."""
    return {"vnni": has_vnni(), "avx2": "avx2" in host_features(), "portable": True}[instructions]
