"""Write a checkpoint as one GGUF file, for llama.cpp and programs built on it.

The ``gguf`` package writes the file: metadata first, then one tensor after another, so that no more
than one of them is in memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.model.block_quantization import quantize
from tercet.model.config import ModelConfig
from tercet.model.gguf_architecture import (
    Architecture,
    Rope,
    Target,
    architecture_of,
    context_length,
    rope_of,
    targets,
)
from tercet.model.gguf_mix import FLOAT_TYPES, Choice, block_columns, type_of
from tercet.model.gguf_tokenizer import GGUFTokenizer, gguf_tokenizer
from tercet.model.tokenizer import Tokenizer
from tercet.model.weights import Floats, Weights
from tercet.progress import Progress

# `type` to the name of the file type in the ``gguf`` package.
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
_CHUNK = 1 << 22  # values converted at once, so that intermediate arrays stay small


@dataclass(frozen=True)
class Written:
    """A summary of the written file.

    Attributes:
        architecture: llama.cpp's name of the graph.
        tensors: number of tensors.
        types: number of tensors by GGML type.
        context_length: tokens up to which llama.cpp computes the same.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer.
        notes: what differs from the model or from what the type's name says, a line each.
    """

    architecture: str
    tensors: int
    types: dict[str, int]
    context_length: int
    pre_tokenizer: str
    notes: tuple[str, ...]


def write_gguf(
    weights: Weights,
    tokenizer: Tokenizer,
    stop_ids: tuple[int, ...],
    path: Path,
    type_name: str,
    name: str,
    importance: Mapping[str, Floats] | None = None,
) -> Written:
    """Write a GGUF file.

    Args:
        weights: the checkpoint, with its adapter merged if it has one.
        tokenizer: the model's tokenizer.
        stop_ids: every token that ends a generation.
        path: the file to write; a caller that needs the whole file or none writes to a temporary name.
        type_name: type of matrices, one of `tercet.model.gguf_mix.TYPES`; norms, biases and routers are
            always float32.
        name: ``general.name``, which programs show.
        importance: the weight of each column's squared error, by the network's name of a matrix; None, or
            a matrix without an entry: all columns alike.

    Raises:
        UserError: llama.cpp can't compute this model or can't encode as its tokenizer does, or a value
            does not fit the type.
        OSError: the disk refuses.
    """
    import gguf

    config = weights.config
    graph = architecture_of(config)
    vocabulary = gguf_tokenizer(tokenizer, config.vocab_size, stop_ids, "tokenizer.json")
    context, notes = context_length(config, graph)
    rope = rope_of(config, graph)
    plan = [
        (target, type_of(target, config, graph, type_name, importance is not None))
        for target in targets(config, graph)
    ]
    writer = gguf.GGUFWriter(path, graph.name)
    try:
        _add_model(writer, config, graph, rope, context, type_name, _loadable(name, vocabulary))
        _add_tokenizer(writer, vocabulary)
        _write_tensors(writer, weights, plan, rope, importance or {})
    finally:
        writer.close()
    types = Counter(choice.type for _, choice in plan)
    return Written(
        architecture=graph.name,
        tensors=len(plan) + len(rope.tensors),
        types=dict(types.most_common()),
        context_length=context,
        pre_tokenizer=vocabulary.pre,
        notes=(
            *notes,
            *_activation_notes(config, graph),
            *vocabulary.notes,
            *_fallback_notes(plan),
            *_transformers_notes(config, graph),
        ),
    )


def _fallback_notes(plan: list[tuple[Target, Choice]]) -> list[str]:
    """Return a note for each type whose blocks do not divide the columns of some tensors."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for target, choice in plan:
        if choice.is_fallback:
            groups.setdefault((choice.preferred, choice.type, target.shape[-1]), []).append(target.name)
    notes = []
    for (preferred, kind, columns), names in groups.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        notes.append(
            f"{count} stored as {kind}, because blocks of {block_columns(preferred)} ({preferred}) do not divide "
            f"their {columns} columns: {shown}"
        )
    return notes


def _activation_notes(config: ModelConfig, graph: Architecture) -> list[str]:
    if config.activation != "gelu":
        return []
    return [f"llama.cpp's {graph.name} computes gelu in its tanh form, which differs in the fourth digit"]


def _transformers_notes(config: ModelConfig, graph: Architecture) -> list[str]:
    """Return a note if transformers can't load the file, or computes something else (docs/compatibility.md)."""
    instead = "`format=hf` writes a directory that it loads"
    notes = []
    if graph.name == "qwen3" and config.head_dim != 128:
        notes.append(
            f"transformers takes heads of 128 for every qwen3 file, so it can't load this one, whose heads are of "
            f"{config.head_dim}; {instead}"
        )
    if graph.name == "qwen3moe" and config.moe_intermediate_size != 768:
        notes.append(
            f"transformers takes experts of width 768 for every qwen3moe file, so it can't load this one, whose "
            f"experts are of {config.moe_intermediate_size}; {instead}"
        )
    if config.rope_scaling is not None and config.rope_scaling.kind in ("linear", "llama3"):
        notes.append(
            f"transformers ignores the {config.rope_scaling.kind} scaling of rotary positions in GGUF files and "
            f"computes other results; {instead}"
        )
    return notes


# Metadata

# llama.cpp 0.3.36 looks these tokens up in every model that is named so, and can't load one without them.
_PHI3, _PHI3_TOKENS = re.compile("phi-?3", re.IGNORECASE), {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def _loadable(name: str, vocabulary: GGUFTokenizer) -> str:
    """Return the model's name, or "model" if llama.cpp could not load a model of that name."""
    misleading = _PHI3.search(name) and not set(vocabulary.tokens) >= _PHI3_TOKENS
    return "model" if misleading else name


def _add_model(
    writer: Any,
    config: ModelConfig,
    graph: Architecture,
    rope: Rope,
    context: int,
    type_name: str,
    name: str,
) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[_FILE_TYPES[type_name]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    # Learned positions are a table with this many rows.
    writer.add_context_length(config.max_positions if config.positions == "learned" else context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if graph.name == "gptneox":
        writer.add_parallel_residual(config.parallel_residual)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    _add_windows(writer, config, graph)
    if config.positions == "rope":
        _add_rope(writer, config, rope)


def _add_windows(writer: Any, config: ModelConfig, graph: Architecture) -> None:
    size = next((window for window in config.windows if window is not None), None)
    if size is None or not graph.windows:
        return
    writer.add_sliding_window(size)
    every = {"gemma2": 2, "gemma3": 6}[graph.name]
    pattern = [config.window(layer) is not None for layer in range(config.num_layers)]
    # Without the list llama.cpp assumes this pattern; older versions don't read the list.
    if pattern != [(layer + 1) % every != 0 for layer in range(config.num_layers)]:
        writer.add_sliding_window_pattern(pattern)


def _add_rope(writer: Any, config: ModelConfig, rope: Rope) -> None:
    from gguf import RopeScalingType

    writer.add_rope_dimension_count(config.rotary)
    writer.add_rope_freq_base(config.rope_theta)
    if config.local_rope_theta is not None:
        writer.add_rope_freq_base_swa(config.local_rope_theta)
    if rope.kind is not None:
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
    if rope.factor is not None:
        writer.add_rope_scaling_factor(rope.factor)
    if rope.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    if rope.attention_factor != 1:
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if rope.beta_fast is not None and rope.beta_slow is not None:
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _add_tokenizer(writer: Any, vocabulary: GGUFTokenizer) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    for add, index in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
        vocabulary.ends,
        strict=False,
    ):
        add(index)
    if vocabulary.pad_id is not None:
        writer.add_pad_token_id(vocabulary.pad_id)
    if vocabulary.unk_id is not None:
        writer.add_unk_token_id(vocabulary.unk_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.templates:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in vocabulary.templates.items()]
        )


# Tensors


def _write_tensors(
    writer: Any,
    weights: Weights,
    plan: list[tuple[Target, Choice]],
    rope: Rope,
    importance: Mapping[str, Floats],
) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    total = 0
    for name, factors in rope.tensors.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for target, choice in plan:
        stored = GGMLQuantizationType[choice.type]
        shape = quant_shape_to_byte_shape(target.shape, stored)
        size = math.prod(shape)
        total += size
        writer.add_tensor_info(target.name, shape, np.dtype(np.uint8), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in rope.tensors.values():
        writer.write_tensor_data(factors)
    with Progress("exporting", total, "bytes") as bar:
        for target, choice in plan:
            data = np.empty(
                quant_shape_to_byte_shape(target.shape, GGMLQuantizationType[choice.type]), np.uint8
            )
            flat, done = data.reshape(-1), 0
            for part, values in zip(target.parts, target.read(weights), strict=True):
                size = values.size * flat.size // math.prod(target.shape)  # a part's share of the bytes
                _encode(values, choice.type, flat[done : done + size], target.name, importance.get(part))
                done += size
            writer.write_tensor_data(data)
            bar.advance(data.nbytes)


def _encode(
    values: Floats, kind: str, into: NDArray[np.uint8], name: str, importance: Floats | None = None
) -> None:
    """Write float32 values [..., columns] to ``into`` as bytes of a GGML type, a few rows at a time."""
    rows = values.reshape(-1, values.shape[-1])
    encoded_rows = into.reshape(len(rows), -1)
    step = max(1, _CHUNK // rows.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if not np.isfinite(part).all():
            raise UserError(
                f"tensor {name} holds NaN or infinity, as after training that diverged; export an earlier checkpoint"
            )
        if kind in FLOAT_TYPES.values():
            encoded_rows[start : start + step] = _floats(part, kind, name)
        else:
            encoded_rows[start : start + step] = quantize(part, kind, importance)


def _floats(values: Floats, kind: str, name: str) -> NDArray[np.uint8]:
    """Return rows of values as bytes of a float type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as rounded

    with np.errstate(over="ignore"):
        encoded = rounded(values, GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(encoded).all():
        raise UserError(f"tensor {name} holds values beyond float16's range; use `type=bf16` or `type=f32`")
    return np.ascontiguousarray(encoded).view(np.uint8)
