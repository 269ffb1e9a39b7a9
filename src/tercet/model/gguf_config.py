"""Convert the metadata of a GGUF file to `ModelConfig`: the inverse of what export writes.

Each function makes the fields of Hugging Face's ``config.json``, whose reader supplies what a family has in
common. Keys and their defaults are llama.cpp's (``src/llama-model.cpp`` and ``src/models``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tercet.errors import UserError
from tercet.model.config import ModelConfig, RopeScaling
from tercet.model.families import FAMILIES
from tercet.model.gguf_architecture import LAYERS_27B, NO_ROPE_STEP
from tercet.model.gguf_file import GGUFFile, TensorInfo
from tercet.model.gguf_values import Floats, rows_of, to_float32
from tercet.model.hf_fields import HF
from tercet.model.hf_rope import scaling_object
from tercet.model.rope import rope_frequencies

# Keys of graphs that compute something else, where their value is not this one.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "embedding_scale": 0.0,
    "expert_shared_count": 0,
    "expert_weights_scale": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def config_of(file: GGUFFile, token_ids: HF) -> ModelConfig:
    """Return the configuration of the model in a file.

    Args:
        file: the file.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of config.json.

    Raises:
        UserError: the architecture is not supported, a key is missing, or the network has no counterpart to one.
    """
    kind = file.text("general.type", "model")
    if kind != "model":
        raise UserError(f"{file.paths[0]} holds a GGUF {kind} (field 'general.type'), not a model")
    name = file.text("general.architecture")
    if name not in _READERS:
        raise UserError(
            f"{file.paths[0]}: architecture {name!r} is not supported; supported are {', '.join(_READERS)}"
        )
    keys = _Keys(file, name)
    for key, neutral in _NEUTRAL.items():
        if (value := file.value(f"{name}.{key}")) not in (None, neutral):
            raise UserError(f"{file.paths[0]}: field '{name}.{key}' is {value!r}, which is not supported")
    try:
        family, hf = _READERS[name](keys)
        return FAMILIES[family].read({**hf, **token_ids})
    except UserError as problem:
        message = str(problem)
        raise UserError(
            message if str(file.paths[0]) in message else f"{file.paths[0]}: {message}"
        ) from problem


def shortest(value: float) -> float:
    """Return the shortest decimal number that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Keys:
    """The metadata of an architecture, with the defaults of llama.cpp."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self.file = file
        self.name = name
        self.layers = self.integer("block_count")
        self.hidden = self.integer("embedding_length")
        self.heads = self.integer("attention.head_count")
        self.head_dim = self.integer("attention.key_length", self.hidden // max(self.heads, 1))
        self.context = self.integer("context_length")
        self.tied = "output.weight" not in file.tensors
        if (values := self.integer("attention.value_length", self.head_dim)) != self.head_dim:
            raise UserError(
                f"{file.paths[0]}: values have {values} dimensions and keys {self.head_dim} "
                f"('{name}.attention.value_length', '{name}.attention.key_length'); they must be equal"
            )

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer, which may be stored as a list with the same number for each layer."""
        name = f"{self.name}.{key}"
        values = self.file.value(name)
        if not isinstance(values, list):
            return self.file.integer(name, default)
        if not values or any(type(value) is not int or value != values[0] for value in values):
            raise UserError(f"{self.file.paths[0]}: field {name!r} differs by layer, which is not supported")
        number: int = values[0]
        return number

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 number in its shortest form."""
        return shortest(self.file.number(f"{self.name}.{key}", default))

    def tensor(self, name: str) -> TensorInfo:
        """Return the entry of a tensor."""
        info = self.file.tensors.get(name)
        if info is None:
            raise UserError(f"{self.file.paths[0]}: tensor {name} is missing; convert the model again")
        return info

    def has(self, name: str) -> bool:
        """Return whether the first layer has a tensor."""
        return f"blk.0.{name}" in self.file.tensors

    def vector(self, name: str) -> Floats:
        """Return the values of a small float tensor."""
        info = self.tensor(name)
        if info.type != "F32" or len(info.shape) != 1:
            raise UserError(
                f"{self.file.paths[0]}: tensor {name} is {info.type} {list(info.shape)}; it must be a vector of F32"
            )
        data = np.memmap(info.file, np.uint8, mode="r")
        return to_float32("F32", rows_of(info, data), info.shape[0])

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.tensor("token_embd.weight").shape[0]


# Rotary positions


def _scaling(keys: _Keys, theta: float, rotary: int) -> RopeScaling | None:
    """Return the scaling of rotary positions."""
    kind = keys.file.text(f"{keys.name}.rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    original = keys.integer("rope.scaling.original_context_length", keys.context)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UserError(
            f"field '{keys.name}.rope.scaling.type' is {kind!r}; supported are none, linear, yarn, longrope"
        )
    if "rope_freqs.weight" in keys.file.tensors:
        if kind == "yarn" or kind == "longrope":
            raise UserError(
                f"the file has rope_freqs.weight and scaling {kind}; only one of them is supported"
            )
        factors = keys.vector("rope_freqs.weight") * np.float32(factor if kind == "linear" else 1)
        return _by_frequency(keys, theta, rotary, factors, attention)
    if kind == "longrope":
        return _longrope(keys, original, attention)
    if kind == "yarn":
        own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=None if math.isclose(attention, 1, rel_tol=1e-6) else shortest(attention * own),
        )
    if attention != 1:
        raise UserError(
            f"field '{keys.name}.rope.scaling.attn_factor' is {attention}; without scaling it must be 1"
        )
    return RopeScaling("linear", factor, keys.context) if kind == "linear" and factor != 1 else None


def _longrope(keys: _Keys, original: int, attention: float) -> RopeScaling:
    factor = keys.context / original
    own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=None if math.isclose(attention, own, rel_tol=1e-6) else attention,
        short_factor=_decimals(keys.vector("rope_factors_short.weight")),
        long_factor=_decimals(keys.vector("rope_factors_long.weight")),
    )


def _by_frequency(
    keys: _Keys, theta: float, rotary: int, factors: Floats, attention: float
) -> RopeScaling | None:
    """Return a scaling that divides each frequency by its factor.

    Llama 3's is recognised. Any other is a longrope whose short and long factors are the same, which gives
    the frequencies of the file exactly.
    """
    if len(factors) != rotary // 2 or not (factors > 0).all():
        raise UserError(
            f"tensor rope_freqs.weight has {len(factors)} factors; it must have {rotary // 2}, all above 0"
        )
    largest = shortest(float(factors.max()))
    if attention == 1 and largest == 1 and float(factors.min()) == 1:
        return None
    if attention == 1:
        plain, _ = rope_frequencies(_sized(theta, rotary, None), 1)
        for power in range(3, 21):
            scaling = RopeScaling("llama3", largest, 2**power, low_freq_factor=1.0, high_freq_factor=4.0)
            frequencies, _ = rope_frequencies(_sized(theta, rotary, scaling), 1)
            if np.allclose(plain / frequencies, factors, rtol=1e-5, atol=0):
                return scaling
    decimals = _decimals(factors)
    return RopeScaling(
        "longrope", 1.0, keys.context, attention_factor=attention, short_factor=decimals, long_factor=decimals
    )


def _sized(theta: float, rotary: int, scaling: RopeScaling | None) -> ModelConfig:
    return ModelConfig("llama", 1, 1, 1, 1, 1, 1, rotary, 1, rope_theta=theta, rope_scaling=scaling)


def _decimals(values: Floats) -> tuple[float, ...]:
    return tuple(shortest(float(value)) for value in values)


def _rope(keys: _Keys) -> HF:
    """Return the fields of rotary positions."""
    theta = keys.number("rope.freq_base", 10_000.0)
    rotary = keys.integer("rope.dimension_count", keys.head_dim)
    scaling = scaling_object(_scaling(keys, theta, rotary))
    hf: HF = {"rope_theta": theta, "rope_scaling": scaling}
    if rotary != keys.head_dim:
        factor = rotary / keys.head_dim
        # Readers round down.
        hf["partial_rotary_factor"] = (
            factor if int(keys.head_dim * factor) == rotary else math.nextafter(factor, 1)
        )
    return hf


# Families


def _decoder(keys: _Keys) -> HF:
    """Return the fields that Llama and its descendants share."""
    return {
        "vocab_size": keys.vocabulary,
        "hidden_size": keys.hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": keys.heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", keys.heads),
        "head_dim": keys.head_dim,
        "max_position_embeddings": keys.context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": keys.tied,
        **_rope(keys),
    }


def _biases(keys: _Keys) -> HF:
    """Return which projections have biases; all four of the attention, or none."""
    names = ("attn_q", "attn_k", "attn_v", "attn_output")
    present = [name for name in names if keys.has(f"{name}.bias")]
    if present and len(present) < len(names):
        raise UserError(
            f"only {', '.join(present)} have biases; all four projections of the attention must, or none"
        )
    return {"attention_bias": bool(present)}


def _llama(keys: _Keys) -> tuple[str, HF]:
    hf = _decoder(keys)
    if experts := keys.integer("expert_count", 0):
        mixture = {"num_local_experts": experts, "num_experts_per_tok": keys.integer("expert_used_count")}
        return "mixtral", hf | mixture | {"sliding_window": None}
    if window := keys.integer("attention.sliding_window", 0):
        return "mistral", hf | {"sliding_window": window}
    return "llama", hf | _biases(keys) | {"mlp_bias": keys.has("ffn_up.bias")}


def _qwen2(keys: _Keys) -> tuple[str, HF]:
    return "qwen2", _decoder(keys)


def _qwen3(keys: _Keys) -> tuple[str, HF]:
    return "qwen3", _decoder(keys) | _biases(keys)


def _qwen3_moe(keys: _Keys) -> tuple[str, HF]:
    inner = keys.integer("expert_feed_forward_length")
    return "qwen3_moe", {
        **_decoder(keys),
        **_biases(keys),
        "intermediate_size": keys.integer("feed_forward_length", inner),
        "moe_intermediate_size": inner,
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "norm_topk_prob": keys.file.boolean(f"{keys.name}.expert_weights_norm", True),
    }


def _phi3(keys: _Keys) -> tuple[str, HF]:
    hf = _decoder(keys) | {"sliding_window": keys.integer("attention.sliding_window", 0) or None}
    if hf["rope_scaling"] is not None:
        hf["original_max_position_embeddings"] = hf["rope_scaling"].get("original_max_position_embeddings")
    return "phi3", hf


def _olmo2(keys: _Keys) -> tuple[str, HF]:
    if keys.integer("attention.sliding_window", 0):
        raise UserError("the file has sliding windows (OLMo 3), which are not supported; OLMo 2 has none")
    return "olmo2", _decoder(keys) | _biases(keys)


def _smollm3(keys: _Keys) -> tuple[str, HF]:
    rotated = [int((layer + 1) % NO_ROPE_STEP != 0) for layer in range(keys.layers)]
    mlp_bias = {"mlp_bias": keys.has("ffn_up.bias")}
    return "smollm3", _decoder(keys) | _biases(keys) | mlp_bias | {"no_rope_layers": rotated}


def _gemma(keys: _Keys, every: int, default_window: int) -> HF:
    """Return the fields that Gemma 2 and 3 share; every ``every``-th layer has no window if no key says more."""
    window = keys.integer("attention.sliding_window", default_window)
    pattern = keys.file.value(f"{keys.name}.attention.sliding_window_pattern")
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        every, pattern = pattern, None
    if pattern is None:
        pattern = [(layer + 1) % every != 0 for layer in range(keys.layers)]
    if not isinstance(pattern, list) or len(pattern) != keys.layers:
        raise UserError(
            f"field '{keys.name}.attention.sliding_window_pattern' must have {keys.layers} entries"
        )
    size = keys.head_dim
    if LAYERS_27B[keys.name] == keys.layers:
        size = keys.hidden // keys.heads
    return {
        **_decoder(keys),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": size,
        "sliding_window": window or 4096,
        "layer_types": ["sliding_attention" if window and local else "full_attention" for local in pattern],
    }


def _gemma2(keys: _Keys) -> tuple[str, HF]:
    return "gemma2", _gemma(keys, 2, 4096) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: _Keys) -> tuple[str, HF]:
    hf = _gemma(keys, 6, 0)
    scaling = hf.pop("rope_scaling") or {"rope_type": "default"}
    return "gemma3_text", hf | {
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": hf["rope_theta"]},
            "sliding_attention": {"rope_theta": keys.number("rope.freq_base_swa", 10_000.0)},
        },
    }


def _gpt2(keys: _Keys) -> tuple[str, HF]:
    return "gpt2", {
        "vocab_size": keys.vocabulary,
        "n_embd": keys.hidden,
        "n_head": keys.heads,
        "n_layer": keys.layers,
        "n_positions": keys.tensor("position_embd.weight").shape[0],
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": keys.tied,
    }


def _gpt_neox(keys: _Keys) -> tuple[str, HF]:
    rope = _rope(keys)
    return "gpt_neox", {
        "vocab_size": keys.vocabulary,
        "hidden_size": keys.hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": keys.heads,
        "max_position_embeddings": keys.context,
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": keys.file.boolean(f"{keys.name}.use_parallel_residual", True),
        "hidden_act": "gelu",
        "tie_word_embeddings": keys.tied,
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        "rotary_emb_base": rope["rope_theta"],
        **rope,
    }


_READERS: dict[str, Callable[[_Keys], tuple[str, HF]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
}
