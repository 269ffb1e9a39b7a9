"""Which type of blocks each matrix of a model is quantised to.

docs/experiments.md holds the measurements behind the choices.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from tercet.model.block_quantization import TYPES, Floats, quantize, type_bytes

Recipe = Literal["int8", "int4"]

OUTER = ("model.embed_tokens.weight", "lm_head.weight")

SAMPLED_ROWS = 16
# The squared error, relative to the squared values, of rounding what a type can hold exactly to bfloat16 is up to
# 2e-6; that of quantising other values to the finest type, Q8_0, is 2e-5 and more.
EXACT = 4e-6


def recipe_type(name: str, columns: int, recipe: Recipe) -> str | None:
    """Return the type that a recipe gives a matrix; None where no block divides its rows.

    "int8" is Q8_0. "int4" gives values 8 bits, since they are few and an error in them hurts most, queries, keys
    and the attention's output the fewest, and all others between 5 and 6.

    Args:
        name: The network's name of the weight (``....down_proj.weight``).
        columns: Weights in a row.
        recipe: The recipe.
    """
    if columns % 32:
        return None
    if recipe == "int8":
        return "Q8_0"
    if name.endswith("v_proj.weight"):
        return "Q8_0"
    if columns % 256:
        return "Q5_1"
    return "Q4_K" if name.endswith(("q_proj.weight", "k_proj.weight", "o_proj.weight")) else "Q5_K"


def keeps(name: str, recovered: str, recipe: Recipe) -> bool:
    """Return whether a recipe keeps a matrix in the type that `recovered_type` found for its values.

    "int8" always does. "int4" leaves 8 bits only to an embedding, a head and values, so that it stays small.
    """
    return recipe == "int8" or recovered != "Q8_0" or name in OUTER or name.endswith("v_proj.weight")


def recovered_type(values: Floats) -> str | None:
    """Return the smallest type that holds values exactly, up to their own rounding; None if there is none.

    Weights that were dequantised from a GGUF file, or trained for a grid, go back into that type without a second
    rounding. A few rows, evenly spread, decide.

    Args:
        values: float32 [rows, columns], finite.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.linspace(0, len(values) - 1, min(SAMPLED_ROWS, len(values))).astype(int)
    sample = np.ascontiguousarray(values[rows], np.float32)
    total = float(np.square(sample, dtype=np.float64).sum())
    if total == 0:
        return None
    fitting = [name for name, blocks in TYPES.items() if values.shape[1] % blocks.columns == 0]
    for name in sorted(fitting, key=lambda name: type_bytes(name, values.shape[1])):
        restored = dequantize(quantize(sample, name), GGMLQuantizationType[name])
        if float(np.square(restored.astype(np.float64) - sample).sum()) < EXACT * total:
            return name
    return None
