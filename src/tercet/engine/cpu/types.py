"""The type in which each weight is kept in memory: by the user's choice, or as the model's file has it."""

from __future__ import annotations

from tercet.engine.cpu import Quantization
from tercet.engine.cpu.formats import FLOATS, FORMATS
from tercet.engine.cpu.layout import Shape, Types
from tercet.model.config import ModelConfig
from tercet.model.weights import Weights

OUTER = ("model.embed_tokens.weight", "lm_head.weight")


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
    return lambda name: "Q8_0" if quantization == "int8" or name in OUTER else "Q4_1"


def _kept(config: ModelConfig, name: str, stored: str | None) -> str:
    """Return the type for a weight that a file stores in type ``stored``; None: an adapter changed it."""
    if stored in FLOATS:
        return stored
    if stored is None or stored not in FORMATS:
        return "Q8_0"  # rounded to 8 bits
    shape = Shape.of(config)
    if name.endswith("o_proj.weight"):
        columns, padded = config.num_heads * config.head_dim, shape.attention
        if shape.dim != config.head_dim:
            return "F32"  # zeros would stand inside of blocks
    elif name.endswith("down_proj.weight"):
        columns, padded = config.intermediate_size, shape.inner
        if ".experts." in name:
            columns = config.moe_intermediate_size
    else:
        columns, padded = config.hidden_size, shape.hidden
    whole = columns % FORMATS[stored].block == 0 and padded % FORMATS[stored].block == 0
    return stored if whole else "F32"
