"""Write a model as a checkpoint directory with nothing else in it; adapters are merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.files import atomic_directory, write_json
from tercet.model.checkpoint import read_generation_config, stream_tensors
from tercet.model.families import FAMILIES, config_to_hf
from tercet.model.reference import Reference
from tercet.model.safetensors_file import TensorSpec
from tercet.model.source import Source, directory_of, source_in
from tercet.model.tensor_names import TensorRule
from tercet.model.tokenizer import TOKENIZER, Tokenizer
from tercet.model.weights import Weights
from tercet.progress import Progress

_CHUNK = 1 << 22  # values rounded at once, so that intermediate arrays stay small
# `type` to the type's names in safetensors and in config.json.
HF_TYPES = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16")}


def short_type(dtype: str) -> str:
    """Return the short name of safetensors' ``dtype``; "f32" for a type that is not written."""
    return next((short for short, (name, _) in HF_TYPES.items() if name == dtype), "f32")


def find_source(reference: Reference) -> Source:
    """Return the files of a model that is on this machine or on the Hub.

    Raises:
        UserError: the model runs elsewhere, or it or its base cannot be found.
    """
    if not reference.is_local or reference.kind == "transformers":
        raise UserError(
            f"{reference.text} can't be exported; only checkpoints, adapters and GGUF files, here or on the Hub, can be"
        )
    return source_in(directory_of(reference))


def check_free(out: Path, format: str) -> None:
    """Raise UserError if ``out`` exists: nothing is overwritten but an empty directory."""
    if format != "hf" and out.is_dir():
        raise UserError(f"`out` {out} is a directory; name the file to write, such as {out / 'model.gguf'}")
    if format == "hf" and out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"`out` {out} exists already; remove it or choose another name")


# Checkpoint directories


def write_checkpoint(weights: Weights, source: Source, out: Path, type: str | None) -> list[str]:
    """Write a checkpoint directory with nothing else in it; return notes for the user.

    No more than one tensor is in memory at a time.

    Raises:
        UserError: a value does not fit ``type``, or the directory can't be written to.
    """
    config, notes = weights.config, list[str]()
    keep_types = type is None and source.adapter is None
    dtype, config_dtype = HF_TYPES[type or short_type(weights.dtype)]
    rules = FAMILIES[config.family].tensors(config)
    specs = [
        TensorSpec(rule.name, _stored_type(weights, rule) if keep_types else dtype, rule.shape)
        for rule in rules
    ]
    hf = config_to_hf(config, config_dtype)
    token_ids = {
        key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None
    }
    by_name = {rule.name: rule for rule in rules}
    with atomic_directory(out) as temporary, Progress("exporting", weights.parameters, "weights") as bar:

        def data(spec: TensorSpec) -> NDArray[np.uint8]:
            values = _joined(weights, by_name[spec.name])
            bar.advance(values.size)
            return encode(values, spec.dtype, spec.name)

        stream_tensors(temporary, specs, data)
        if (source.tokenizer / TOKENIZER).is_file():
            Tokenizer.load(source.tokenizer).save(temporary)
        else:
            notes.append(f"{source.tokenizer} has no {TOKENIZER}, so the copy has none either")
        write_json(
            temporary / "generation_config.json", {**token_ids, **read_generation_config(source.generation)}
        )
        write_json(temporary / "config.json", hf)
    return notes


def _stored_type(weights: Weights, rule: TensorRule) -> str:
    """Return the type that keeps the stored values of a tensor's parts."""
    types = {HF_TYPES[short_type(weights.dtype_of(part.name))][0] for part in rule.parts}
    return types.pop() if len(types) == 1 else "F32"


def _joined(weights: Weights, rule: TensorRule) -> NDArray[np.float32]:
    """Return the family's tensor made of our parts: the inverse of `split_rows` and of transposing."""
    parts = [weights(part.name) for part in rule.parts]
    joined = parts[0]
    if len(parts) > 1:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(rule.groups, -1, *rest) for part in parts]
        joined = np.concatenate(grouped, axis=1).reshape(-1, *rest)
    return joined.T if rule.transpose else joined


def encode(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[np.uint8]:
    """Return float32 values as bytes of safetensors' ``dtype``, rounded to nearest even.

    Raises:
        UserError: a finite value of the tensor ``name`` lies beyond float16's range.
    """
    flat: NDArray[np.float32] = np.ascontiguousarray(values, np.float32).reshape(-1)
    if dtype == "F32":
        return flat.view(np.uint8)
    half = np.empty(flat.size, np.float16 if dtype == "F16" else np.uint16)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        half[start : start + _CHUNK] = _float16(part, name) if dtype == "F16" else _bfloat16(part)
    return half.view(np.uint8)


def _float16(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (np.isinf(half) & np.isfinite(values)).any():
        raise UserError(f"tensor {name} holds values beyond float16's range; use `type=bf16` or `type=f32`")
    return half


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper half of each float32's bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # Rounding must not carry a NaN's bits over into the sign, nor cut all of them off.
    upper = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded) >> np.uint32(16)
    return upper.astype(np.uint16)
