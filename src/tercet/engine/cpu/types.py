"""The type in which each weight is kept in memory: by the user's choice, or as the model's file has it."""

from __future__ import annotations

import functools

import numpy as np

from tercet.engine.cpu import Quantization
from tercet.engine.cpu.formats import FLOATS, FORMATS
from tercet.engine.cpu.layout import Shape, Types
from tercet.model.block_quantization import quantize
from tercet.model.config import ModelConfig
from tercet.model.quantization_recipes import EXACT, Recipe, keeps, recipe_type, recovered_type
from tercet.model.weights import Floats, Weights

ROWS_AT_ONCE = 4096


def weight_types(config: ModelConfig, quantization: Quantization, weights: Weights) -> Types:
    """Return the function that gives each weight's type, by the network's name of it.

    Args:
        config: The network.
        quantization: "file" keeps the bits of a GGUF file, "none" its values or those of a checkpoint.
        weights: The model's weights.
    """
    if quantization == "file":
        return lambda name: _kept(config, name, weights.type_of(name))
    if quantization == "bf16":
        return lambda name: "BF16"
    if quantization == "none":
        stored = weights.dtype if weights.dtype in FLOATS else "F32"
        return lambda name: stored
    recipe: Recipe = quantization
    return functools.cache(lambda name: _chosen(config, name, recipe, weights(name)))


def _columns(config: ModelConfig, name: str) -> tuple[int, int]:
    """Return the number of columns of a weight, and of the matrix in memory that holds it."""
    shape = Shape.of(config)
    if name.endswith("o_proj.weight"):
        return config.num_heads * config.head_dim, shape.attention
    if name.endswith("down_proj.weight"):
        expert = ".experts." in name
        return config.moe_intermediate_size if expert else config.intermediate_size, shape.inner
    return config.hidden_size, shape.hidden


def _chosen(config: ModelConfig, name: str, recipe: Recipe, values: Floats) -> str:
    """Return the type that a recipe gives a weight, or the type that holds its values exactly, where the recipe keeps it."""
    columns, padded = _columns(config, name)
    chosen = recipe_type(name, padded, recipe)
    assert chosen is not None  # columns are padded to 64
    exact = recovered_type(values) if columns % 32 == 0 else None
    if exact is None or padded % FORMATS[exact].block or not keeps(name, exact, recipe):
        return chosen
    return exact if _holds(exact, values) else chosen


def is_rounded(config: ModelConfig, name: str, types: Types) -> bool:
    """Return whether "int4" rounds a weight to the few bits of its recipe: its type is not one that was recovered."""
    chosen = recipe_type(name, _columns(config, name)[1], "int4")
    return chosen != "Q8_0" and types(name) == chosen


def _holds(type_name: str, values: Floats) -> bool:
    """Return whether a type holds every row exactly, up to the rounding of the values themselves."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for begin in range(0, len(values), ROWS_AT_ONCE):
        part = values[begin : begin + ROWS_AT_ONCE]
        restored = dequantize(quantize(part, type_name), GGMLQuantizationType[type_name])
        error = np.square(restored - part, dtype=np.float64).sum(-1)
        if not (error <= EXACT * np.square(part, dtype=np.float64).sum(-1)).all():
            return False
    return True


def _kept(config: ModelConfig, name: str, stored: str | None) -> str:
    """Return the type for a weight that a file stores in type ``stored``; None: an adapter changed it."""
    if stored in FLOATS:
        return stored
    if stored is None or stored not in FORMATS:
        return "Q8_0"  # rounded to 8 bits
    if name.endswith("o_proj.weight") and Shape.of(config).dim != config.head_dim:
        return "F32"  # zeros would stand inside of blocks
    whole = all(count % FORMATS[stored].block == 0 for count in _columns(config, name))
    return stored if whole else "F32"
