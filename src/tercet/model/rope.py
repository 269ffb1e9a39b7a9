"""Frequencies of rotary positions (Su et al. 2021, arXiv:2104.09864) with each kind of `RopeScaling`.

They are computed in numpy, float32 as in transformers, so that every backend rotates queries and keys by
the same angles.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tercet.model.config import ModelConfig, RopeScaling

Frequencies = NDArray[np.float32]


def rope_frequencies(config: ModelConfig, length: int, local: bool = False) -> tuple[Frequencies, float]:
    """Return the frequency of each pair of dimensions, in radians per position, and the factor on cos and sin.

    Dimensions i and i + rotary / 2 of the first ``config.rotary`` dimensions of a head are a pair.

    Args:
        config: the network's configuration.
        length: tokens in the sequence; it matters only if ``config.rope_scaling.by_length``.
        local: use the base of layers where ``config.has_local_rope``, which is never stretched.

    Returns:
        Frequencies, float32 [rotary / 2], and the factor.
    """
    dim, scaling = config.rotary, config.rope_scaling
    theta = config.rope_theta
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    if scaling is None:
        return _plain(theta, dim), 1.0
    if scaling.kind == "linear":
        return _plain(theta, dim) / np.float32(scaling.factor), 1.0
    if scaling.kind == "dynamic":
        original = scaling.original_max_positions
        stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
        return _plain(theta * stretch ** (dim / (dim - 2)), dim), 1.0
    if scaling.kind == "llama3":
        return _llama3(scaling, _plain(theta, dim)), 1.0
    if scaling.kind == "yarn":
        return _yarn(scaling, theta, dim)
    return _longrope(scaling, _plain(theta, dim), length)


def _plain(theta: float, dim: int) -> Frequencies:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.float32(theta) ** exponents


def _llama3(scaling: RopeScaling, plain: Frequencies) -> Frequencies:
    original, factor = scaling.original_max_positions, np.float32(scaling.factor)
    wavelength = np.float32(2 * math.pi) / plain
    low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    width = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (np.float32(original) / wavelength - np.float32(scaling.low_freq_factor)) / np.float32(width)
    between = (1 - smooth) * plain / factor + smooth * plain
    stretched = np.where(wavelength > low, plain / factor, plain)
    return np.where((wavelength <= low) & (wavelength >= high), between, stretched)


def _yarn(scaling: RopeScaling, theta: float, dim: int) -> tuple[Frequencies, float]:
    def dimension(rotations: float) -> float:
        # The pair that rotates `rotations` times over the original context.
        ratio = scaling.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # never zero; negative, all of it extrapolated, for tiny contexts
    pairs: Frequencies = np.arange(dim // 2, dtype=np.float32)
    ramp: Frequencies = np.clip((pairs - np.float32(low)) / np.float32(width), 0, 1)
    plain = _plain(theta, dim)
    frequencies = plain / np.float32(scaling.factor) * ramp + plain * (1 - ramp)

    def magnitude(scale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return frequencies, magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return frequencies, magnitude(1.0)


def _longrope(scaling: RopeScaling, plain: Frequencies, length: int) -> tuple[Frequencies, float]:
    original = scaling.original_max_positions
    factors = scaling.long_factor if length > original else scaling.short_factor
    frequencies: Frequencies = np.divide(plain, np.array(factors, dtype=np.float32))
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    stretched = 1 + math.log(scaling.factor) / math.log(original) if scaling.factor > 1 else 1.0
    return frequencies, math.sqrt(stretched)
