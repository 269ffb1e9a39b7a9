"""The fields of Hugging Face's ``config.json``, family by family, to and from `ModelConfig`.

Two layouts are read: the one of transformers 5 (``rope_parameters``, ``dtype``) and the older one
(``rope_theta``, ``rope_scaling``, ``torch_dtype``). Written files hold both, so that readers of
either age agree. A field left out has the default of the family's configuration class in transformers.
"""

from __future__ import annotations

import math
from typing import Any

from tercet.errors import UserError
from tercet.model.config import Activation, ModelConfig, RopeKind, RopeScaling

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
ROPE_KINDS: tuple[RopeKind, ...] = ("linear", "dynamic", "llama3", "yarn")


# Reading fields


def wrong(name: str, value: object, wanted: str) -> UserError:
    return UserError(f"field {name!r} is {value!r}; it must be {wanted}")


def _integer(hf: HF, name: str, default: int | None = None) -> int:
    value = hf.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise wrong(name, value, "an integer below 2**31")
    return value


def _optional_integer(hf: HF, name: str, default: int | None = None) -> int | None:
    return None if hf.get(name, default) is None else _integer(hf, name, default)


def _number(hf: HF, name: str, default: float | None = None) -> float:
    value = hf.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(name, value, "a number")
    return float(value)


def _optional_number(hf: HF, name: str) -> float | None:
    return None if hf.get(name) is None else _number(hf, name)


def _boolean(hf: HF, name: str, default: bool) -> bool:
    value = hf.get(name, default)
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def refuse(hf: HF, name: str, neutral: object) -> None:
    """A field that changes the result and that the network has no counterpart for."""
    value = hf.get(name)
    if value is not None and value != neutral:
        raise UserError(f"field {name!r} is {value!r}, which is not supported; only {neutral!r} is")


def _activation(hf: HF, name: str, default: str) -> Activation:
    value = hf.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(f"field {name!r} is {value!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _eos(hf: HF, default: int | None) -> tuple[int, ...]:
    value = hf.get("eos_token_id", default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise wrong("eos_token_id", value, "an integer, a list of integers or null")
    return tuple(ids)


def _rope(hf: HF, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling. transformers 5 prefers ``rope_scaling`` where both layouts are there; so do we."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        raise wrong(name, rope, "an object")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(f"field {name!r} differs by layer type ({', '.join(nested)}), which is not supported")
    refuse(rope, "partial_rotary_factor", 1.0)
    base = rope if rope.get("rope_theta") is not None else hf
    theta = _number(base, "rope_theta", 10_000.0) if base.get("rope_theta") is not None else 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        raise UserError(
            f"{name}: rope_type {kind!r} is unknown; supported are default, {', '.join(ROPE_KINDS)}"
        )
    try:
        scaling = _scaling(hf, rope, kind, max_positions)
        if scaling.factor <= 0 or scaling.original_max_positions < 1:
            raise UserError("factor and original_max_position_embeddings must be above 0")
        return theta, scaling
    except UserError as problem:
        raise UserError(f"{name}: {problem}") from problem


def _scaling(hf: HF, rope: HF, kind: RopeKind, max_positions: int) -> RopeScaling:
    if kind in ("linear", "dynamic"):  # these count from max_position_embeddings, whatever else is there
        return RopeScaling(kind, _number(rope, "factor"), max_positions)
    source = hf if hf.get("original_max_position_embeddings") is not None else rope
    original = _integer(source, "original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if low == high:
            raise UserError(f"low_freq_factor and high_freq_factor are both {low}; the second must be larger")
        return RopeScaling(
            kind, _number(rope, "factor"), original, low_freq_factor=low, high_freq_factor=high
        )
    factor = _optional_number(rope, "factor")
    return RopeScaling(
        kind,
        max_positions / original if factor is None else factor,
        original,
        beta_fast=_optional_number(rope, "beta_fast") or 32.0,
        beta_slow=_optional_number(rope, "beta_slow") or 1.0,
        attention_factor=_optional_number(rope, "attention_factor"),
        mscale=_optional_number(rope, "mscale"),
        mscale_all_dim=_optional_number(rope, "mscale_all_dim"),
        truncate=_boolean(rope, "truncate", True),
    )


def _window(hf: HF) -> int | None:
    window = _optional_integer(hf, "sliding_window", 4096)
    if window is not None and window < 1:
        raise wrong("sliding_window", window, "at least 1, or null")
    return window


def _layer_windows(hf: HF, layers: int) -> tuple[int | None, ...]:
    """Sliding windows of Qwen: some layers see all positions, the others the last ``sliding_window``."""
    sliding = _boolean(hf, "use_sliding_window", False)
    window = _window(hf) if sliding else None
    types = hf.get("layer_types")
    if types is None:
        first = _integer(hf, "max_window_layers", 28)
        types = ["sliding_attention" if i >= first and window else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise wrong("layer_types", types, f"a list of {layers} names, one a layer")
    for value in types:
        if value not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"field 'layer_types' holds {value!r}; supported are full_attention, sliding_attention"
            )
    if window is None and "sliding_attention" in types:
        raise UserError("field 'layer_types' asks for sliding_attention but no sliding_window is in use")
    windows = tuple(window if value == "sliding_attention" else None for value in types)
    return windows if any(windows) else ()


def _decoder(
    hf: HF,
    family: str,
    *,
    vocab: int,
    intermediate: int,
    positions: int,
    kv_heads: int | None,
    head_dim: int | None,
    bos: int | None,
    eos: int | None,
    **choices: Any,
) -> ModelConfig:
    """What Llama and its descendants share; the arguments are the defaults in which they differ."""
    refuse(hf, "partial_rotary_factor", 1.0)
    hidden, heads = _integer(hf, "hidden_size", 4096), _integer(hf, "num_attention_heads", 32)
    layers = _integer(hf, "num_hidden_layers", 32)
    dim = _optional_integer(hf, "head_dim", head_dim)
    if dim is None:
        if heads < 1 or hidden % heads:
            raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        dim = hidden // heads
    max_positions = _integer(hf, "max_position_embeddings", positions)
    theta, scaling = _rope(hf, max_positions)
    windows = choices.pop("windows", None)
    groups = _optional_integer(hf, "num_key_value_heads", kv_heads)
    return ModelConfig(
        family=family,
        vocab_size=_integer(hf, "vocab_size", vocab),
        hidden_size=hidden,
        intermediate_size=_integer(hf, "intermediate_size", intermediate),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if groups is None else groups,
        head_dim=dim,
        max_positions=max_positions,
        norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_activation(hf, "hidden_act", "silu"),
        windows=windows(layers) if windows else (),
        tie_embeddings=_boolean(hf, "tie_word_embeddings", False),
        bos_token_id=_optional_integer(hf, "bos_token_id", bos),
        eos_token_ids=_eos(hf, eos),
        pad_token_id=_optional_integer(hf, "pad_token_id"),
        **choices,
    )


def read_llama(hf: HF) -> ModelConfig:
    bias = _boolean(hf, "attention_bias", False)
    return _decoder(
        hf,
        "llama",
        vocab=32_000,
        intermediate=11_008,
        positions=2048,
        kv_heads=None,
        head_dim=None,
        bos=1,
        eos=2,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=_boolean(hf, "mlp_bias", False),
    )


def read_mistral(hf: HF) -> ModelConfig:
    window = _window(hf)
    return _decoder(
        hf,
        "mistral",
        vocab=32_000,
        intermediate=14_336,
        positions=131_072,
        kv_heads=8,
        head_dim=None,
        bos=1,
        eos=2,
        windows=lambda layers: (window,) * layers if window else (),
    )


def read_qwen2(hf: HF) -> ModelConfig:
    return _decoder(
        hf,
        "qwen2",
        vocab=151_936,
        intermediate=22_016,
        positions=32_768,
        kv_heads=32,
        head_dim=None,
        bos=None,
        eos=None,
        attention_bias=True,
        windows=lambda layers: _layer_windows(hf, layers),
    )


def read_qwen3(hf: HF) -> ModelConfig:
    bias = _boolean(hf, "attention_bias", False)
    return _decoder(
        hf,
        "qwen3",
        vocab=151_936,
        intermediate=22_016,
        positions=32_768,
        kv_heads=32,
        head_dim=128,
        bos=None,
        eos=None,
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
        windows=lambda layers: _layer_windows(hf, layers),
    )


def read_gpt2(hf: HF) -> ModelConfig:
    refuse(hf, "scale_attn_weights", True)
    refuse(hf, "scale_attn_by_inverse_layer_idx", False)
    refuse(hf, "add_cross_attention", False)
    hidden, heads = _integer(hf, "n_embd", 768), _integer(hf, "n_head", 12)
    if heads < 1 or hidden % heads:
        raise UserError(f"n_embd {hidden} is not a multiple of n_head {heads}")
    return ModelConfig(
        family="gpt2",
        vocab_size=_integer(hf, "vocab_size", 50_257),
        hidden_size=hidden,
        intermediate_size=4 * hidden if hf.get("n_inner") is None else _integer(hf, "n_inner"),
        num_layers=_integer(hf, "n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=_integer(hf, "n_positions", 1024),
        norm="layer",
        norm_eps=_number(hf, "layer_norm_epsilon", 1e-5),
        positions="learned",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=_activation(hf, "activation_function", "gelu_new"),
        tie_embeddings=_boolean(hf, "tie_word_embeddings", True),
        bos_token_id=_optional_integer(hf, "bos_token_id", 50_256),
        eos_token_ids=_eos(hf, 50_256),
        pad_token_id=_optional_integer(hf, "pad_token_id"),
    )


# Writing


def _token_ids(config: ModelConfig) -> HF:
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def _write_rope(config: ModelConfig) -> HF:
    """Both layouts: transformers 5 reads ``rope_parameters``, older readers the other two."""
    scaling = config.rope_scaling
    if scaling is None:
        parameters: HF = {"rope_type": "default"}
    else:
        parameters = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            parameters["original_max_position_embeddings"] = scaling.original_max_positions
        if scaling.kind == "llama3":
            parameters |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        if scaling.kind == "yarn":
            parameters |= {
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            optional = ("attention_factor", "mscale", "mscale_all_dim")
            parameters |= {key: value for key in optional if (value := getattr(scaling, key)) is not None}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else parameters,
        "rope_parameters": {**parameters, "rope_theta": config.rope_theta},
    }


def _write_decoder(config: ModelConfig) -> HF:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **_write_rope(config),
        **_token_ids(config),
    }


def write_llama(config: ModelConfig) -> HF:
    return _write_decoder(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def write_mistral(config: ModelConfig) -> HF:
    return _write_decoder(config) | {"sliding_window": config.window(0)}


def _write_windows(config: ModelConfig) -> HF:
    windows = [config.window(layer) for layer in range(config.num_layers)]
    sliding = [layer for layer, window in enumerate(windows) if window]
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": windows[sliding[0]] if sliding else None,
        # Older readers know the number of full layers at the bottom, newer ones the list.
        "max_window_layers": sliding[0] if sliding else config.num_layers,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def write_qwen2(config: ModelConfig) -> HF:
    return _write_decoder(config) | _write_windows(config)


def write_qwen3(config: ModelConfig) -> HF:
    return write_qwen2(config) | {"attention_bias": config.attention_bias}


def write_gpt2(config: ModelConfig) -> HF:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,  # older readers
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **_token_ids(config),
    }
