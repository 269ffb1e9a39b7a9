"""Single fields of Hugging Face's ``config.json``, read and checked; each fault names its field."""

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


def wrong(name: str, value: object, wanted: str) -> UserError:
    return UserError(f"field {name!r} is {value!r}; it must be {wanted}")


def integer(hf: HF, name: str, default: int | None = None) -> int:
    value = hf.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise wrong(name, value, "an integer below 2**31")
    return value


def optional_integer(hf: HF, name: str) -> int | None:
    return None if hf.get(name) is None else integer(hf, name)


def number(hf: HF, name: str) -> float:
    value = hf.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(name, value, "a number")
    return float(value)


def optional_number(hf: HF, name: str) -> float | None:
    return None if hf.get(name) is None else number(hf, name)


def positive(hf: HF, name: str) -> float | None:
    """A number above 0, or null."""
    value = optional_number(hf, name)
    if value is not None and value <= 0:
        raise wrong(name, value, "above 0, or null")
    return value


def boolean(hf: HF, name: str, default: bool = False) -> bool:
    value = hf.get(name, default)
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def refuse(hf: HF, name: str, neutral: object) -> None:
    """A field that changes the result and that the network has no counterpart for."""
    value = hf.get(name)
    if value is not None and value != neutral:
        raise UserError(f"field {name!r} is {value!r}, which is not supported; only {neutral!r} is")


def activation(hf: HF, name: str) -> Activation:
    value = hf.get(name)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(f"field {name!r} is {value!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def eos_ids(hf: HF) -> tuple[int, ...]:
    value = hf.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise wrong("eos_token_id", value, "an integer, a list of integers or null")
    return tuple(ids)


def head_size(hidden: int, heads: int, hidden_name: str, heads_name: str) -> int:
    """Dimensions of a head where heads divide the hidden size among them."""
    if heads < 1 or hidden % heads:
        raise UserError(f"{hidden_name} {hidden} is not a multiple of {heads_name} {heads}")
    return hidden // heads


def layer_list(hf: HF, name: str, layers: int) -> list[Any] | None:
    """A list with one entry a layer; None where the field is left out."""
    value = hf.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers:
        raise wrong(name, value, f"a list of {layers} entries, one a layer")
    return value


def sliding_window(hf: HF) -> int | None:
    size = optional_integer(hf, "sliding_window")
    if size is not None and size < 1:
        raise wrong("sliding_window", size, "at least 1, or null")
    return size


def same_windows(size: int | None, layers: int) -> tuple[int | None, ...]:
    """The same sliding window in every layer."""
    return (size,) * layers if size else ()


def windows_by_type(hf: HF, layers: int, size: int | None, default: list[bool]) -> tuple[int | None, ...]:
    """Sliding windows where ``layer_types``, or else ``default``, asks for them."""
    names = ["sliding_attention" if sliding else "full_attention" for sliding in default]
    types = layer_list(hf, "layer_types", layers) or names
    for value in types:
        if value not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"field 'layer_types' holds {value!r}; supported are full_attention, sliding_attention"
            )
    if size is None and "sliding_attention" in types:
        raise UserError("field 'layer_types' asks for sliding_attention but no sliding_window is in use")
    windows = tuple(size if value == "sliding_attention" else None for value in types)
    return windows if any(windows) else ()


# Writing


def token_ids(config: ModelConfig) -> HF:
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def activation_name(config: ModelConfig, gelu_tanh: str = "gelu_pytorch_tanh") -> str:
    return gelu_tanh if config.activation == "gelu_tanh" else config.activation


def window_size(config: ModelConfig) -> int | None:
    """The sliding window of those layers that have one."""
    return next((size for size in config.windows if size), None)


def layer_types(config: ModelConfig) -> list[str]:
    layers = range(config.num_layers)
    return ["sliding_attention" if config.window(layer) else "full_attention" for layer in layers]
