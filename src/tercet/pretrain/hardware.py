"""Accelerators that a run can be planned for, with the makers' peak rates for dense bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

UTILISATION = 0.4  # of the peak: nanochat reports 41 to 46% on H100s, torchtitan 33 to 39%


@dataclass(frozen=True)
class Hardware:
    """An accelerator."""

    name: str
    flops: float  # a second, dense bfloat16
    memory: float  # bytes

    def seconds(self, flops: float) -> float:
        """Return the training time of ``flops`` operations, in seconds."""
        return flops / (self.flops * UTILISATION)


# NVIDIA's data sheets: H100 SXM and H200, A100 SXM, L4, GeForce RTX 4090 (bfloat16 with float32 sums).
HARDWARE = {
    "h100": Hardware("H100", 989e12, 80e9),
    "h200": Hardware("H200", 989e12, 141e9),
    "a100": Hardware("A100 80 GB", 312e12, 80e9),
    "l4": Hardware("L4", 121e12, 24e9),
    "4090": Hardware("RTX 4090", 165e12, 24e9),
}
