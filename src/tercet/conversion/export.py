"""Export a model: as a GGUF file, as a GGUF adapter, or as a checkpoint directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.errors import UserError
from tercet.files import replaced_when_complete
from tercet.model.checkpoint import read_stop_ids
from tercet.model.export import HF_TYPES, check_free, find_source, short_type, write_checkpoint
from tercet.model.families import FAMILIES
from tercet.model.gguf import write_gguf
from tercet.model.gguf_lora import TYPES as LORA_TYPES
from tercet.model.gguf_lora import write_gguf_lora
from tercet.model.gguf_mix import MAIN_TYPES
from tercet.model.gguf_mix import TYPES as GGUF_TYPES
from tercet.model.reference import Reference, parse_reference
from tercet.model.source import Source
from tercet.model.tokenizer import TOKENIZER, Tokenizer
from tercet.model.weights import Weights
from tercet.progress import say

if TYPE_CHECKING:
    from tercet.conversion.calibration import Calibration
    from tercet.conversion.check import Check

FORMATS = ("hf", "gguf", "gguf-lora")
_ALLOWED = {"hf": tuple(HF_TYPES), "gguf": GGUF_TYPES, "gguf-lora": LORA_TYPES}
_CHECK_TEXT = "the docstrings of Python's standard library"


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        format: "hf", "gguf" or "gguf-lora".
        path: the directory or file.
        type: type of the matrices.
        bytes: size of all files.
        seconds: the time that the export took, with its check.
        family: the model's family.
        architecture: llama.cpp's name, or the class in transformers.
        parameters: number of weights; of an adapter its own.
        tensors: number of tensors.
        types: gguf: number of tensors by GGML type.
        context_length: in tokens; None for an adapter.
        tokenizer: gguf: llama.cpp's name of the pre-tokenizer; hf: tokenizer.json, or None.
        merged: the adapter's directory, if one was merged.
        calibration_tokens: number of tokens on which columns were weighted; None: they were not.
        check: the comparison with the checkpoint; None if there was none.
        notes: what differs from the model or from what a name promises, a line each.
    """

    format: str
    path: str
    type: str
    bytes: int
    seconds: float
    family: str
    architecture: str
    parameters: int
    tensors: int
    types: dict[str, int] | None
    context_length: int | None
    tokenizer: str | None
    merged: str | None
    calibration_tokens: int | None
    check: Check | None
    notes: list[str]


def export(
    reference: str,
    format: str,
    out: str | Path,
    type: str | None = None,
    *,
    calibrate: str | Path | None = None,
    check: bool = True,
) -> Exported:
    """Write a model in another program's format.

    A GGUF file is read again after it is written, and compared with the checkpoint: the values of every tensor,
    the predictions on 2,000 tokens, and the tokens of some texts.

    Args:
        reference: a checkpoint or adapter, local or on the Hub, or a GGUF file.
        format: "gguf" for one file, "gguf-lora" for one of an adapter alone, "hf" for a checkpoint directory.
        out: the directory or file to write; it must not exist yet (an empty directory may).
        type: type of the matrices. gguf: one of `tercet.model.gguf_mix.TYPES`; None is "f16". gguf-lora: "f32"
            or "f16"; None is "f32". hf: "f32", "bf16" or "f16" for every tensor; None keeps the stored type
            of each, or means "f32" if an adapter is merged.
        calibrate: gguf: a file of text; a column's error counts by the mean squared activation that the column
            multiplies while the model reads this text.
        check: whether a GGUF file is compared with the checkpoint.

    Raises:
        CheckFailed: the file is further from the checkpoint than its type explains; it is removed.
        UserError: there is no such model, it is hosted elsewhere, the format can't hold it, ``out``
            exists, or it can't be written to.
    """
    started = time.monotonic()
    if format not in FORMATS:
        raise UserError(f"`format` is {format!r}; it must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    chosen = None if type is None else type.lower()
    if chosen is not None and chosen not in _ALLOWED[format]:
        raise UserError(
            f"`type` is {type!r}; for `format={format}` it must be one of {', '.join(_ALLOWED[format])}"
        )
    if calibrate is not None and (format != "gguf" or chosen not in MAIN_TYPES):
        raise UserError(
            "`calibrate` weighs the errors of quantisation; use it with `format=gguf` and a quantised `type`"
        )
    out = Path(out)
    model = parse_reference(reference)
    check_free(out, format)
    source = find_source(model)
    if format == "gguf":
        exported = _export_gguf(model, source, out, chosen or "f16", calibrate, check)
    elif format == "gguf-lora":
        exported = _export_adapter(model, source, out, chosen or "f32", check)
    else:
        exported = _export_directory(source, out, chosen)
    return replace(exported, seconds=time.monotonic() - started)


def _export_gguf(
    model: Reference, source: Source, out: Path, type: str, calibrate: str | Path | None, check: bool
) -> Exported:
    weights, tokenizer = Weights(source.base, source.adapter), Tokenizer.load(source.tokenizer)
    calibration = None if calibrate is None else _calibration(weights, tokenizer, Path(calibrate))
    with replaced_when_complete(out) as temporary:
        written = write_gguf(
            weights,
            tokenizer,
            read_stop_ids(source.generation),
            temporary,
            type,
            _name(model),
            None if calibration is None else calibration.importance,
        )
        notes, checked = list(written.notes), None
        if check:
            checked = _checked(temporary, weights, tokenizer, type, calibration, written.context_length)
    return Exported(
        format="gguf",
        path=str(out),
        type=type,
        bytes=out.stat().st_size,
        seconds=0,
        family=weights.config.family,
        architecture=written.architecture,
        parameters=weights.parameters,
        tensors=written.tensors,
        types=written.types,
        context_length=written.context_length,
        tokenizer=written.pre_tokenizer,
        merged=None if source.adapter is None else str(source.adapter),
        calibration_tokens=None if calibration is None else calibration.tokens,
        check=checked,
        notes=notes + _calibration_notes(calibration) + _source_notes(weights),
    )


def _calibration(weights: Weights, tokenizer: Tokenizer, path: Path) -> Calibration:
    from tercet.conversion.calibration import calibrate
    from tercet.data.measured_text import texts_of

    calibration = calibrate(weights, tokenizer, texts_of(path))
    say(f"measured activations on {calibration.tokens:,} tokens of {path}")
    return calibration


def _calibration_notes(calibration: Calibration | None) -> list[str]:
    if calibration is None or not calibration.unseen_experts:
        return []
    return [
        f"{calibration.unseen_experts} matrices of experts to which the text sends hardly any token have the mean "
        "importance of their layer's experts"
    ]


def _source_notes(weights: Weights) -> list[str]:
    """Return a note if the source's weights are rounded already."""
    blocks = weights.blocks("model.layers.0.mlp.down_proj.weight")
    if blocks is None:
        return []
    return [
        f"the source is quantised already ({blocks.type}): what it has lost stays lost, and this file is compared "
        "with the source, not with the original model"
    ]


def _checked(
    path: Path,
    weights: Weights,
    tokenizer: Tokenizer,
    type: str,
    calibration: Calibration | None,
    context: int,
) -> Check:
    from tercet.conversion.check import KL_LIMITS, STRINGS, TOKENS, check_predictions, check_tokenizer
    from tercet.conversion.gguf_network import GGUFNetwork
    from tercet.data.measured_text import docstrings, token_rows

    file = GGUFNetwork(path)
    strings = check_tokenizer(file.tokenizer(), tokenizer, (*STRINGS, *docstrings()))
    if calibration is not None and calibration.held_out is not None:
        tokens, text = calibration.held_out, "the part of the calibration text that was not measured"
        tokens = tokens[:, :context]
    else:
        size = min(context, weights.config.max_positions)
        tokens = token_rows(tokenizer, docstrings(), TOKENS, size, weights.config.vocab_size)
        text = _CHECK_TEXT
    return check_predictions(file, weights, tokens, text, KL_LIMITS[type], strings)


def _export_adapter(model: Reference, source: Source, out: Path, type: str, check: bool) -> Exported:
    if source.adapter is None:
        raise UserError(
            f"{model.text} is no adapter, so it can't be exported as one; use `format=gguf` for a whole model"
        )
    base = Weights(source.base)
    with replaced_when_complete(out) as temporary:
        written = write_gguf_lora(source.adapter, base.config, temporary, type, _name(model))
        checked = _adapter_checked(temporary, base, source, type) if check else None
    return Exported(
        format="gguf-lora",
        path=str(out),
        type=type,
        bytes=out.stat().st_size,
        seconds=0,
        family=base.config.family,
        architecture=written.architecture,
        parameters=written.parameters,
        tensors=written.tensors,
        types=None,
        context_length=None,
        tokenizer=None,
        merged=None,
        calibration_tokens=None,
        check=checked,
        notes=list(written.notes),
    )


def _adapter_checked(path: Path, base: Weights, source: Source, type: str) -> Check:
    from tercet.conversion.check import KL_LIMITS, TOKENS, check_predictions
    from tercet.conversion.gguf_network import WithAdapter
    from tercet.data.measured_text import docstrings, token_rows

    tokenizer = Tokenizer.load(source.tokenizer)
    config = base.config
    tokens = token_rows(tokenizer, docstrings(), TOKENS, config.max_positions, config.vocab_size)
    merged = Weights(source.base, source.adapter)
    return check_predictions(WithAdapter(base, path), merged, tokens, _CHECK_TEXT, KL_LIMITS[type], 0)


def _export_directory(source: Source, out: Path, type: str | None) -> Exported:
    weights = Weights(source.base, source.adapter)
    family = FAMILIES[weights.config.family]
    notes = write_checkpoint(weights, source, out, type)
    return Exported(
        format="hf",
        path=str(out),
        type=type or short_type(weights.dtype),
        bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        seconds=0,
        family=family.name,
        architecture=family.architecture,
        parameters=weights.parameters,
        tensors=len(family.tensors(weights.config)),
        types=None,
        context_length=weights.config.max_positions,
        tokenizer=TOKENIZER if (out / TOKENIZER).is_file() else None,
        merged=None if source.adapter is None else str(source.adapter),
        calibration_tokens=None,
        check=None,
        notes=notes,
    )


def _name(reference: Reference) -> str:
    """Return the model's name for other programs to show: "mine" for runs/mine/model."""
    if reference.path is None or reference.kind == "gguf":
        return reference.name
    parts: Sequence[str] = [
        part for part in Path(reference.text).resolve().parts if part not in ("/", "model")
    ]
    return parts[-1] if parts else "model"
