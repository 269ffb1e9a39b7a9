"""Rotary positions in Hugging Face's ``config.json``: base, scaling and the number of rotated dimensions.

Two layouts are read: that of transformers 5 (``rope_parameters``) and the older one (``rope_theta``
and ``rope_scaling``). Both are written, so that old and new readers agree.
"""

from __future__ import annotations

import math
from typing import Any

from tercet.errors import UserError
from tercet.model.config import ModelConfig, RopeKind, RopeScaling
from tercet.model.hf_fields import HF, boolean, integer, number, optional_number, wrong

ROPE_KINDS: tuple[RopeKind, ...] = ("linear", "dynamic", "llama3", "yarn", "longrope")


def rope_object(hf: HF) -> tuple[str, HF]:
    """Return the name and content of the object with the scaling; ``rope_scaling`` first, as transformers 5."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        raise wrong(name, rope, "an object")
    return name, rope


def read_rope(hf: HF, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Return the rotary base and scaling, which are the same for every layer."""
    name, rope = rope_object(hf)
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(f"field {name!r} differs by layer type ({', '.join(nested)}), which is not supported")
    theta = optional_number(rope if rope.get("rope_theta") is not None else hf, "rope_theta")
    return 10_000.0 if theta is None else theta, read_scaling(hf, rope, name, max_positions)


def read_rotary_dim(hf: HF, head_dim: int) -> int | None:
    """Return the number of dimensions that ``partial_rotary_factor`` rotates; None for all."""
    _, rope = rope_object(hf)
    source = rope if rope.get("partial_rotary_factor") is not None else hf
    factor = optional_number(source, "partial_rotary_factor")
    dim = head_dim if factor is None else int(head_dim * factor)
    return None if dim == head_dim else dim


def read_scaling(hf: HF, rope: HF, name: str, max_positions: int) -> RopeScaling | None:
    """Return the scaling that the object ``rope`` describes; ``name`` is its name in errors."""
    kind = rope_kind(rope)
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        raise UserError(f"{name}: 'rope_type' is {kind!r}; supported are default, {', '.join(ROPE_KINDS)}")
    try:
        scaling = _scaling(hf, rope, kind, max_positions)
        if scaling.factor <= 0 or scaling.original_max_positions < 1:
            raise UserError("'factor' and 'original_max_position_embeddings' must be above 0")
        return scaling
    except UserError as problem:
        raise UserError(f"{name}: {problem}") from problem


def rope_kind(rope: HF) -> Any:
    """Return the kind of scaling, under its new or old name."""
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(hf: HF, rope: HF, kind: RopeKind, max_positions: int) -> RopeScaling:
    if kind in ("linear", "dynamic"):  # both always start from max_position_embeddings
        return RopeScaling(kind, number(rope, "factor"), max_positions)
    source = hf if hf.get("original_max_position_embeddings") is not None else rope
    original = integer(source, "original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if low == high:
            raise UserError(
                f"'low_freq_factor' and 'high_freq_factor' are both {low}; the second must be larger"
            )
        return RopeScaling(kind, number(rope, "factor"), original, low_freq_factor=low, high_freq_factor=high)
    factor = optional_number(rope, "factor")
    if factor is None:
        factor = max_positions / max(original, 1)
    if kind == "longrope":
        return RopeScaling(
            kind,
            factor,
            original,
            attention_factor=optional_number(rope, "attention_factor"),
            short_factor=_numbers(rope, "short_factor"),
            long_factor=_numbers(rope, "long_factor"),
        )
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=optional_number(rope, "beta_fast") or 32.0,
        beta_slow=optional_number(rope, "beta_slow") or 1.0,
        attention_factor=optional_number(rope, "attention_factor"),
        mscale=optional_number(rope, "mscale"),
        mscale_all_dim=optional_number(rope, "mscale_all_dim"),
        truncate=boolean(rope, "truncate", True),
    )


def _numbers(rope: HF, name: str) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or not values:
        raise wrong(name, values, "a list of numbers")
    return tuple(number({name: value}, name) for value in values)


# Writing


def scaling_object(scaling: RopeScaling | None) -> HF | None:
    """Return ``rope_scaling`` with the names of transformers 4.45 and later; None without scaling."""
    if scaling is None:
        return None
    rope: HF = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    return rope | {key: value for key in optional if (value := getattr(scaling, key)) is not None}


def write_rope(config: ModelConfig) -> HF:
    """Return the fields of both layouts: ``rope_parameters`` for transformers 5, the others for older readers."""
    scaling = scaling_object(config.rope_scaling)
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    }


def partial_factor(config: ModelConfig) -> float:
    """Return the ``partial_rotary_factor`` that gives ``config.rotary`` dimensions."""
    factor = config.rotary / config.head_dim
    # Readers round down, so a quotient that was itself rounded down would lose a dimension.
    return factor if int(config.head_dim * factor) == config.rotary else math.nextafter(factor, 1)
