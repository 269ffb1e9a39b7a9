"""The type of each tensor in a GGUF file of a named quantisation, as llama.cpp's ``llama-quantize`` chooses it.

The rule is llama.cpp's (``llama_tensor_get_type`` in ``src/llama-quant.cpp``), so that a file here has the size
and the types that its name promises. The tests compare every type with ``llama_model_quantize``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tercet.model.config import ModelConfig
from tercet.model.gguf_architecture import Architecture, Target

# `type` to GGML's name of the type that most matrices have.
FLOAT_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
MAIN_TYPES = {
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q5_1": "Q5_1",
    "q5_0": "Q5_0",
    "q4_k_m": "Q4_K",
    "q4_1": "Q4_1",
    "q4_0": "Q4_0",
}
TYPES = (*FLOAT_TYPES, *MAIN_TYPES)
MIXES = ("q4_k_m", "q5_k_m")
BLOCK_COLUMNS = {"F32": 1, "F16": 1, "BF16": 1, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}  # others: 32
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where 256 columns do not divide a row


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and the type that it would have if its columns fitted the blocks."""

    type: str
    preferred: str

    @property
    def is_fallback(self) -> bool:
        """Whether the columns do not fit the preferred type."""
        return self.type != self.preferred


def block_columns(kind: str) -> int:
    """Return the number of weights in a block of a GGML type."""
    return BLOCK_COLUMNS.get(kind, 32)


def type_of(
    target: Target, config: ModelConfig, graph: Architecture, type_name: str, calibrated: bool = False
) -> Choice:
    """Return the type of a tensor.

    Args:
        target: the tensor.
        config: the model's configuration.
        graph: llama.cpp's graph.
        type_name: the file's type, one of `TYPES`.
        calibrated: whether there is an importance matrix.
    """
    if target.exact:
        return Choice("F32", "F32")
    if type_name in FLOAT_TYPES:
        return Choice(FLOAT_TYPES[type_name], FLOAT_TYPES[type_name])
    preferred = _preferred(target, config, graph, type_name, calibrated)
    columns = target.shape[-1]
    if columns % block_columns(preferred) == 0:
        return Choice(preferred, preferred)
    fallback = FALLBACKS.get(preferred, preferred)
    return Choice(fallback if columns % block_columns(fallback) == 0 else "F16", preferred)


def _preferred(
    target: Target, config: ModelConfig, graph: Architecture, type_name: str, calibrated: bool
) -> str:
    kind = MAIN_TYPES[type_name]
    tied = config.tie_embeddings and not graph.own_head
    if target.name == "output.weight" or (tied and target.name == "token_embd.weight"):
        if target.shape[-1] % block_columns(kind):
            return "Q8_0"
        return kind if kind == "Q8_0" else "Q6_K"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", target.name)
    if match is None:
        return kind
    layer, name = int(match[1]), match[2]
    more = type_name in MIXES and _gets_more_bits(layer, config.num_layers)
    if name in ("attn_v", "attn_qkv"):
        kind = "Q6_K" if more else kind
        if kind == "Q4_K" and _is_70b(config, graph):
            kind = "Q5_K"
        return "Q8_0" if config.num_experts == 8 else kind
    if name == "attn_k":
        return "Q8_0" if config.num_experts == 8 else kind
    if name in ("ffn_down", "ffn_down_exps"):
        # Without a minimum in each block these types lose much in the first layers, weighted by importance.
        if calibrated and type_name in ("q4_0", "q5_0") and layer < config.num_layers // 8:
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[type_name]
        return "Q6_K" if more else kind
    if name == "attn_output" and config.num_experts == 8 and type_name == "q4_k_m":
        return "Q5_K"
    return kind


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Return whether a layer is in the first or last eighth, or is every third one between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _is_70b(config: ModelConfig, graph: Architecture) -> bool:
    """Return whether llama.cpp takes a model for one of 70B, by its number of layers."""
    if config.num_layers != 80:
        return False
    return graph.name == "qwen2" or (graph.name == "llama" and config.num_heads != config.num_kv_heads)
