"""Write a LoRA adapter as a GGUF file that llama.cpp applies to a GGUF file of its base.

For a tensor NAME of the base the file holds NAME.lora_a [r, in] and NAME.lora_b [out, r]. llama.cpp computes
W + alpha / r * B A, with one alpha for the file and r as stored; what that can't say (rank-stabilised scaling,
patterns of alpha, a joint tensor whose parts have different adapters) is folded into B.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.gguf_architecture import Target, architecture_of, interleave, targets
from tercet.model.tensor_names import network_tensors
from tercet.model.weights import Floats, Update, read_adapter

TYPES = ("f32", "f16")


@dataclass(frozen=True)
class WrittenAdapter:
    """A summary of the written file: llama.cpp's graph, the number of tensors, of weights, and notes."""

    architecture: str
    tensors: int
    parameters: int
    notes: tuple[str, ...]


def write_gguf_lora(
    adapter: Path, config: ModelConfig, path: Path, type_name: str, name: str
) -> WrittenAdapter:
    """Write the adapter in a directory as a GGUF file.

    Args:
        adapter: the adapter's directory.
        config: the base model's configuration.
        path: the file to write.
        type_name: "f32" or "f16".
        name: ``general.name``.

    Raises:
        UserError: the adapter is damaged or not of this base, or llama.cpp has no graph for the base.
        OSError: the disk refuses.
    """
    import gguf

    graph = architecture_of(config)
    read, updates = read_adapter(adapter, config)
    heights = {part.name: part.shape[0] for part in network_tensors(config)}
    alpha = float(read.whole_alpha)
    writer = gguf.GGUFWriter(path, graph.name)
    tensors = parameters = folded = 0
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(name)
        for target in targets(config, graph):
            joint = _joint(target, updates, heights)
            if joint is None:
                continue
            a, b = joint
            factor = len(a) / alpha  # of llama.cpp's scaling, alpha / r
            if any(not np.isclose(updates[part].scaling * factor, 1) for part in _modules(target, updates)):
                folded += 1
            for suffix, values in (("lora_a", a), ("lora_b", b * np.float32(factor))):
                writer.add_tensor(f"{target.name}.{suffix}", _stored(values, type_name, target.name))
                tensors, parameters = tensors + 1, parameters + values.size
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    notes = (
        [f"the scaling of {folded} tensors is folded into B, because the file has one alpha for all"]
        if folded
        else []
    )
    return WrittenAdapter(graph.name, tensors, parameters, tuple(notes))


def _modules(target: Target, updates: dict[str, Update]) -> list[str]:
    names = (part.removesuffix(".weight") for part in target.parts)
    return [name for name in names if name in updates]


def _joint(
    target: Target, updates: dict[str, Update], heights: dict[str, int]
) -> tuple[Floats, Floats] | None:
    """Return A and B of a tensor of the file, with the scaling in B; None if it is not adapted.

    Parts with the same A share it. Otherwise the parts' A are stacked, and B has a block for each part.
    """
    adapted = _modules(target, updates)
    if not adapted or not target.name.endswith(".weight"):
        return None
    inputs = [updates[name].a for name in adapted]
    shared = all(np.array_equal(a, inputs[0]) for a in inputs)
    a = inputs[0] if shared else np.concatenate(inputs)
    rows, column = [], 0
    for number, part in enumerate(target.parts):
        update = updates.get(part.removesuffix(".weight"))
        b = np.zeros((heights[part], len(a)), np.float32)
        if update is not None:
            rank = update.b.shape[1]
            b[:, column : column + rank] = update.b * np.float32(update.scaling * target.scale)
            column += 0 if shared else rank
        rows.append(interleave(b, target.heads[number]) if target.heads and target.heads[number] else b)
    return a, np.concatenate(rows)


def _stored(values: Floats, type_name: str, name: str) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise UserError(f"the adapter of {name} holds NaN or infinity; use an earlier checkpoint")
    if type_name == "f32":
        return np.ascontiguousarray(values, np.float32)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"the adapter of {name} holds values beyond float16's range; use `type=f32`")
    return np.ascontiguousarray(half)
