"""A model out of Tercet: as one GGUF file, or as a clean checkpoint directory, adapters merged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.files import atomic_directory, write_json
from tercet.model.checkpoint import read_generation_config, read_stop_ids
from tercet.model.families import FAMILIES, config_to_hf
from tercet.model.gguf import TYPES as GGUF_TYPES
from tercet.model.gguf import write_gguf
from tercet.model.reference import Reference, parse_reference
from tercet.model.source import Source, directory_of, source_in
from tercet.model.stream import Spec, stream_tensors
from tercet.model.tensor_names import TensorRule
from tercet.model.tokenizer import TOKENIZER, Tokenizer
from tercet.model.weights import Weights, matched_tensors
from tercet.progress import Progress

FORMATS = ("hf", "gguf")
_CHUNK = 1 << 22  # values rounded at once, so that what lies between stays small
# --type to safetensors' name and config.json's.
HF_TYPES = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16")}


@dataclass(frozen=True)
class Exported:
    """What was written; ``bytes`` is the size of all files, ``seconds`` the time it took."""

    format: str
    path: str
    type: str
    bytes: int
    seconds: float
    family: str
    architecture: str  # llama.cpp's name, or the class in transformers
    parameters: int
    tensors: int
    context_length: int
    tokenizer: str | None  # llama.cpp's name of how words are split; hf: tokenizer.json, or None
    merged: str | None  # the adapter
    notes: list[str]


def export(reference: str, format: str, out: str | Path, type: str | None = None) -> Exported:
    """Write the model ``reference`` as ``format`` ("hf" or "gguf") to ``out``: a directory or a file.

    type: of the matrices. gguf: "f16" (the default), "q8_0", "f32" or "bf16". hf: "f32", "bf16" or
        "f16" for every tensor; None keeps the type that each is stored in, and is "f32" where an
        adapter is merged.

    Raises:
        UserError: there is no such model, it runs elsewhere, the format can't hold it, there is
            something at ``out``, or the disk refuses.
    """
    started = time.monotonic()
    if format not in FORMATS:
        raise UserError(f"--format is {format!r}; it must be hf or gguf")
    allowed = tuple(HF_TYPES) if format == "hf" else GGUF_TYPES
    if type is not None and type not in allowed:
        raise UserError(f"--type is {type!r}; {format} has {', '.join(allowed)}")
    out, tokenizer = Path(out), None
    found = parse_reference(reference)
    check_free(out, format)
    source = find_source(found)
    weights = Weights(source.base, source.adapter)
    family = FAMILIES[weights.config.family]
    if format == "gguf":
        type = type or "f16"
        written = write_gguf(
            weights,
            Tokenizer.load(source.tokenizer),
            read_stop_ids(source.generation),
            out,
            type,
            _name(reference, found),
        )
        size, architecture, tokenizer = out.stat().st_size, written.architecture, written.pre_tokenizer
        tensors, context = written.tensors, written.context_length
        notes = [*written.notes, *_kept_note(written.kept_f16)]
    else:
        notes = write_checkpoint(weights, source, out, type)
        type = type or _short(weights.dtype)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        architecture, context = family.architecture, weights.config.max_positions
        tensors = len(family.tensors(weights.config))
        tokenizer = TOKENIZER if (out / TOKENIZER).is_file() else None
    return Exported(
        format=format,
        path=str(out),
        type=type,
        bytes=size,
        seconds=time.monotonic() - started,
        family=family.name,
        architecture=architecture,
        parameters=weights.parameters,
        tensors=tensors,
        context_length=context,
        tokenizer=tokenizer,
        merged=None if source.adapter is None else str(source.adapter),
        notes=notes,
    )


def _kept_note(kept: Sequence[str]) -> list[str]:
    if not kept:
        return []
    some = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
    return [f"{len(kept)} tensors stay F16, their columns being no multiple of 32: {some}"]


def _name(text: str, found: Reference) -> str:
    """What the model is called: runs/mine/model is "mine"."""
    if found.path is None:
        return found.name
    parts = [part for part in Path(text).resolve().parts if part not in ("/", "model")]
    return parts[-1] if parts else "model"


def _short(dtype: str) -> str:
    return next((short for short, (name, _) in HF_TYPES.items() if name == dtype), "f32")


def find_source(reference: Reference) -> Source:
    """Return the files of a model that is on this machine or on the Hub.

    Raises:
        UserError: the model is not a checkpoint or adapter, or it or its base cannot be found.
    """
    if reference.kind not in ("checkpoint", "adapter", "hub"):
        raise UserError(
            f"{reference.text} can't be exported: only checkpoints and adapters that are files can"
        )
    return source_in(directory_of(reference))


def check_free(out: Path, format: str) -> None:
    """UserError where something is at ``out``: nothing is overwritten but an empty directory."""
    if format == "gguf" and out.is_dir():
        raise UserError(f"--out {out} is a directory; name the file to write, such as {out / 'model.gguf'}")
    if format == "hf" and out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists already; remove it or choose another name")


# Checkpoint directories


def write_checkpoint(weights: Weights, source: Source, out: Path, type: str | None) -> list[str]:
    """A checkpoint directory with nothing else in it; notes for the user.

    No more than one tensor is in memory.

    Raises:
        UserError: a value does not fit ``type``, or the disk refuses.
    """
    config, notes = weights.config, list[str]()
    stored = {rule.name: tensor.dtype for rule, tensor in matched_tensors(config, source.base)}
    keep = type is None and source.adapter is None
    whole = HF_TYPES[type or _short(weights.dtype)]
    rules = FAMILIES[config.family].tensors(config)
    specs = [
        Spec(rule.name, HF_TYPES[_short(stored[rule.name])][0] if keep else whole[0], rule.shape)
        for rule in rules
    ]
    hf = config_to_hf(config, whole[1])
    token_ids = {
        key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None
    }
    by_name = {rule.name: rule for rule in rules}
    with atomic_directory(out) as temporary, Progress("exporting", weights.parameters, "weights") as bar:

        def data(spec: Spec) -> NDArray[np.uint8]:
            values = _whole(weights, by_name[spec.name])
            bar.advance(values.size)
            return encode(values, spec.dtype, spec.name)

        stream_tensors(temporary, specs, data)
        if (source.tokenizer / TOKENIZER).is_file():
            Tokenizer.load(source.tokenizer).save(temporary)
        else:
            notes.append(f"{source.tokenizer} has no {TOKENIZER}, so neither has the copy")
        write_json(
            temporary / "generation_config.json", {**token_ids, **read_generation_config(source.generation)}
        )
        write_json(temporary / "config.json", hf)
    return notes


def _whole(weights: Weights, rule: TensorRule) -> NDArray[np.float32]:
    """The family's tensor of our parts: the inverse of `split_rows` and of transposing."""
    parts = [weights(part.name) for part in rule.parts]
    whole = parts[0]
    if len(parts) > 1:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(rule.groups, -1, *rest) for part in parts]
        whole = np.concatenate(grouped, axis=1).reshape(-1, *rest)
    return whole.T if rule.transpose else whole


def encode(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[np.uint8]:
    """Float32 values as bytes of safetensors' ``dtype``, rounded to nearest even."""
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
        raise UserError(f"tensor {name} holds values beyond float16's range; use --type bf16 or f32")
    return half


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32's bits, rounded."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # Rounding must not carry a NaN's bits over into the sign, nor cut all of them off.
    upper = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded) >> np.uint32(16)
    return upper.astype(np.uint16)
