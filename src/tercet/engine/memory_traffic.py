"""The memory traffic of decoding: the bytes that one token reads, and the bandwidth of this machine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ARRAY_BYTES = 1 << 28  # read to measure the bandwidth; more where the last-level cache is large
BANDWIDTH_SECONDS = 1.0  # the best reading within this time counts, of at least ten


@dataclass(frozen=True)
class Weights:
    """The size of a model.

    Attributes:
        parameters: the number of its parameters.
        nbytes: bytes of the weights in memory.
        read: bytes of the weights that decoding one token reads.
    """

    parameters: int
    nbytes: int
    read: int


def weights_of(backend: Any) -> Weights:
    """Return the size of a backend's weights. A backend without a torch module ``model`` reports it itself."""
    model = getattr(backend, "model", None)
    if model is None:
        return Weights(backend.parameters, backend.weight_bytes, backend.weight_bytes_per_token)
    tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in model.named_parameters()}
    heads = {
        module.weight.data_ptr()
        for module in model.modules()
        if type(module).__name__ != "Embedding" and hasattr(module, "weight") and module.weight is not None
    }
    # Only one row of an embedding is read, unless it is the output head as well.
    looked_up = {
        module.weight.data_ptr() for module in model.modules() if type(module).__name__ == "Embedding"
    } - heads
    total = read = 0.0
    share = _expert_share(model.config)
    for pointer, (name, tensor) in tensors.items():
        size = tensor.numel() * tensor.element_size()
        total += size
        if pointer not in looked_up:
            read += size * (share if ".experts." in name else 1)
    count = sum(tensor.numel() for _, tensor in tensors.values())
    return Weights(count, int(total), int(read))


def _expert_share(config: Any) -> float:
    """Return the share of the experts that a token uses; 1 without experts."""
    experts = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)
    used = getattr(config, "experts_per_token", 0) or getattr(config, "num_experts_per_tok", 0)
    return used / experts if experts and used else 1.0


def bytes_per_token(backend: Any, weights: Weights, length: float) -> float:
    """Return the bytes of weights, keys and values that decoding a token at this mean length reads."""
    per_position = getattr(backend, "cache_bytes_per_token", None)
    if per_position is not None:
        return weights.read + length * float(per_position)
    model = getattr(backend, "model", None)
    config = model.config if model is not None else backend.config
    item = model.dtype.itemsize if model is not None else 4
    layers = range(config.num_layers)
    seen = sum(min(length, config.window(layer) or length) for layer in layers)
    return float(weights.read + seen * 2 * config.num_kv_heads * config.head_dim * item)


def memory_bandwidth(threads: int) -> float:
    """Return the highest measured number of bytes per second that ``threads`` threads read from memory.

    As in STREAM (McCalpin 1995), an array much larger than the last-level cache is traversed in
    contiguous slices, one for each thread. It is only read, as weights are. The operation is numpy's
    bitwise or over 64-bit integers: of numpy's reductions the nearest to a compiled loop that only reads
    (within 3%; sums of floats and byte-wise operations wait for the arithmetic).
    """
    array = np.ones(max(ARRAY_BYTES, 4 * _cache_bytes()) // 8, np.int64)
    slices = np.array_split(array, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        until, reading = time.perf_counter() + BANDWIDTH_SECONDS, 0
        while reading < 10 or time.perf_counter() < until:
            begun = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, slices))
            best = min(best, time.perf_counter() - begun)
            reading += 1
    return array.nbytes / best


def _cache_bytes() -> int:
    """Return the size of a core's largest cache; 0 where the system does not report it (Linux does)."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError, KeyError):
            text = file.read_text().strip()
            largest = max(largest, int(text[:-1]) * units[text[-1]])
    return largest
