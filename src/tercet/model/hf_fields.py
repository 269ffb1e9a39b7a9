"""Read and check single fields of Hugging Face's ``config.json``; every error names its field."""

from __future__ import annotations

import math
from typing import Any

from tercet.errors import UserError
from tercet.model.config import Activation, ModelConfig

HF = dict[str, Any]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def wrong(name: str, value: object, expected: str) -> UserError:
    """Return the error for a field with a wrong value."""
    return UserError(f"field {name!r} is {value!r}; it must be {expected}")


def integer(hf: HF, name: str, default: int | None = None) -> int:
    """Return an integer field; ``default`` if it is left out."""
    value = hf.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise wrong(name, value, "an integer below 2**31")
    return value


def optional_integer(hf: HF, name: str) -> int | None:
    """Return an integer field; None if it is null or left out."""
    return None if hf.get(name) is None else integer(hf, name)


def number(hf: HF, name: str) -> float:
    """Return a finite number."""
    value = hf.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(name, value, "a number")
    return float(value)


def optional_number(hf: HF, name: str) -> float | None:
    """Return a finite number; None if the field is null or left out."""
    return None if hf.get(name) is None else number(hf, name)


def positive(hf: HF, name: str) -> float | None:
    """Return a number above 0; None if the field is null or left out."""
    value = optional_number(hf, name)
    if value is not None and value <= 0:
        raise wrong(name, value, "above 0, or null")
    return value


def boolean(hf: HF, name: str, default: bool = False) -> bool:
    """Return a boolean field; ``default`` if it is left out."""
    value = hf.get(name, default)
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def refuse(hf: HF, name: str, neutral: object) -> None:
    """Raise UserError if a field that the network has no counterpart for has an effect on the result."""
    value = hf.get(name)
    if value is not None and value != neutral:
        raise UserError(f"field {name!r} is {value!r}, which is not supported; only {neutral!r} is")


def activation(hf: HF, name: str) -> Activation:
    """Return the activation function that a field names."""
    value = hf.get(name)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise wrong(name, value, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def eos_ids(hf: HF) -> tuple[int, ...]:
    """Return the ids of ``eos_token_id``, which may be one id, a list or null."""
    value = hf.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise wrong("eos_token_id", value, "an integer, a list of integers or null")
    return tuple(ids)


def head_size(hidden: int, heads: int, hidden_name: str, heads_name: str) -> int:
    """Return the dimensions of a head if the heads divide the hidden size among them."""
    if heads < 1 or hidden % heads:
        raise UserError(
            f"field {hidden_name!r} is {hidden}; it must be a multiple of {heads_name!r}, {heads}"
        )
    return hidden // heads


def layer_list(hf: HF, name: str, layers: int) -> list[Any] | None:
    """Return a list with an entry for each layer; None if the field is null or left out."""
    value = hf.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers:
        raise wrong(name, value, f"a list of {layers} entries, one for each layer")
    return value


def sliding_window(hf: HF) -> int | None:
    """Return ``sliding_window`` in tokens; None if it is null or left out."""
    size = optional_integer(hf, "sliding_window")
    if size is not None and size < 1:
        raise wrong("sliding_window", size, "at least 1, or null")
    return size


def same_windows(size: int | None, layers: int) -> tuple[int | None, ...]:
    """Return the windows of layers that all have the same one."""
    return (size,) * layers if size else ()


def windows_by_type(hf: HF, layers: int, size: int | None, default: list[bool]) -> tuple[int | None, ...]:
    """Return a window of ``size`` for each layer with sliding attention in ``layer_types``, or else ``default``."""
    names = ["sliding_attention" if sliding else "full_attention" for sliding in default]
    types = layer_list(hf, "layer_types", layers) or names
    for value in types:
        if value not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"field 'layer_types' contains {value!r}; supported are full_attention, sliding_attention"
            )
    if size is None and "sliding_attention" in types:
        raise UserError("field 'layer_types' contains sliding_attention, but no 'sliding_window' is in use")
    windows = tuple(size if value == "sliding_attention" else None for value in types)
    return windows if any(windows) else ()


# Writing


def token_ids(config: ModelConfig) -> HF:
    """Return the fields that name special tokens.

    A pad token without a row in the embedding is left out: transformers can't load a model that names one.
    """
    eos, pad = config.eos_token_ids, config.pad_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": None if pad is None or pad >= config.vocab_size else pad,
    }


def activation_name(config: ModelConfig, gelu_tanh: str = "gelu_pytorch_tanh") -> str:
    """Return Hugging Face's name of the activation; ``gelu_tanh`` is the family's name of that form."""
    return gelu_tanh if config.activation == "gelu_tanh" else config.activation


def window_size(config: ModelConfig) -> int | None:
    """Return the sliding window of the layers that have any; None if no layer has."""
    return next((size for size in config.windows if size), None)


def layer_types(config: ModelConfig) -> list[str]:
    """Return ``layer_types``: the kind of attention in each layer."""
    layers = range(config.num_layers)
    return ["sliding_attention" if config.window(layer) else "full_attention" for layer in layers]
