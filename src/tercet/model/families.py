"""Model families: how each one's ``config.json`` and tensor names correspond to ours.

A family is a pair of small functions (see `tercet.model.hf_config`) and a table of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.hf_config import (
    HF,
    read_gpt2,
    read_llama,
    read_mistral,
    read_qwen2,
    read_qwen3,
    refuse,
    write_gpt2,
    write_llama,
    write_mistral,
    write_qwen2,
    write_qwen3,
    wrong,
)


@dataclass(frozen=True)
class Part:
    """One of our tensors: its name in ``Transformer.state_dict()`` and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a checkpoint: our parts, joined along the first dimension, then transposed or not.

    GPT-2 stores query, key and value as one tensor and every matrix as [in, out].
    """

    name: str
    parts: tuple[Part, ...]
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on disk."""
        rows, *rest = self.parts[0].shape
        joined = (sum(part.shape[0] for part in self.parts), *rest) if len(self.parts) > 1 else (rows, *rest)
        return tuple(reversed(joined)) if self.transpose else joined


@dataclass(frozen=True)
class Family:
    """How one family is read and written.

    name, architecture: ``model_type`` and ``architectures[0]`` in config.json.
    prefix: what tensor names of the whole model begin with; checkpoints of the bare decoder lack it.
    ignored: regular expressions of tensors that hold no weights (buffers that old versions stored).
    """

    name: str
    architecture: str
    base_architecture: str
    prefix: str
    read: Callable[[HF], ModelConfig]
    write: Callable[[ModelConfig], HF]
    tensors: Callable[[ModelConfig], list[TensorRule]]
    ignored: tuple[str, ...] = (r"(.*\.)?rotary_emb\.inv_freq",)


# Tensors


def _decoder_tensors(config: ModelConfig) -> list[TensorRule]:
    """Llama and its descendants: their names are ours."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        linears = [
            ("self_attn.q_proj", query, hidden, config.attention_bias),
            ("self_attn.k_proj", key, hidden, config.attention_bias),
            ("self_attn.v_proj", key, hidden, config.attention_bias),
            ("self_attn.o_proj", hidden, query, config.output_bias),
            ("mlp.gate_proj", inner, hidden, config.mlp_bias),
            ("mlp.up_proj", inner, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, inner, config.mlp_bias),
        ]
        for name, rows, columns, bias in linears:
            shapes[f"{at}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{at}.{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{at}.self_attn.q_norm.weight"] = shapes[f"{at}.self_attn.k_norm.weight"] = (
                config.head_dim,
            )
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return [TensorRule(name, (Part(name, shape),)) for name, shape in shapes.items()]


def _gpt2_tensors(config: ModelConfig) -> list[TensorRule]:
    hidden, inner = config.hidden_size, config.intermediate_size

    def same(theirs: str, ours: str, *shape: int) -> TensorRule:
        return TensorRule(theirs, (Part(ours, shape),))

    def norm(theirs: str, ours: str) -> list[TensorRule]:
        return [same(f"{theirs}.{kind}", f"{ours}.{kind}", hidden) for kind in ("weight", "bias")]

    def linear(theirs: str, ours: list[str], rows: int, columns: int) -> list[TensorRule]:
        return [
            TensorRule(
                f"{theirs}.weight", tuple(Part(f"{o}.weight", (rows, columns)) for o in ours), transpose=True
            ),
            TensorRule(f"{theirs}.bias", tuple(Part(f"{o}.bias", (rows,)) for o in ours)),
        ]

    rules = [
        same("transformer.wte.weight", "model.embed_tokens.weight", config.vocab_size, hidden),
        same("transformer.wpe.weight", "model.embed_positions.weight", config.max_positions, hidden),
    ]
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"model.layers.{layer}"
        attention = [f"{ours}.self_attn.{name}_proj" for name in "qkv"]
        rules += norm(f"{theirs}.ln_1", f"{ours}.input_layernorm")
        rules += linear(f"{theirs}.attn.c_attn", attention, hidden, hidden)
        rules += linear(f"{theirs}.attn.c_proj", [f"{ours}.self_attn.o_proj"], hidden, hidden)
        rules += norm(f"{theirs}.ln_2", f"{ours}.post_attention_layernorm")
        rules += linear(f"{theirs}.mlp.c_fc", [f"{ours}.mlp.up_proj"], inner, hidden)
        rules += linear(f"{theirs}.mlp.c_proj", [f"{ours}.mlp.down_proj"], hidden, inner)
    rules += norm("transformer.ln_f", "model.norm")
    if not config.tie_embeddings:
        rules.append(same("lm_head.weight", "lm_head.weight", config.vocab_size, hidden))
    return rules


def _llama_like(
    name: str, title: str, read: Callable[[HF], ModelConfig], write: Callable[[ModelConfig], HF]
) -> Family:
    return Family(name, f"{title}ForCausalLM", f"{title}Model", "model.", read, write, _decoder_tensors)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama_like("llama", "Llama", read_llama, write_llama),
        _llama_like("mistral", "Mistral", read_mistral, write_mistral),
        _llama_like("qwen2", "Qwen2", read_qwen2, write_qwen2),
        _llama_like("qwen3", "Qwen3", read_qwen3, write_qwen3),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            "GPT2Model",
            "transformer.",
            read_gpt2,
            write_gpt2,
            _gpt2_tensors,
            ignored=(r"(.*\.)?attn\.(masked_)?bias",),
        ),
    )
}


def config_from_hf(hf: HF, where: str) -> ModelConfig:
    """The configuration that a parsed ``config.json`` describes; ``where`` names the file in errors.

    Raises:
        UserError: the architecture or a field is unknown, wrong or not supported.
    """
    if not isinstance(hf, dict):
        raise UserError(f"{where} holds a {type(hf).__name__}; it must be a JSON object")
    model_type, architectures = hf.get("model_type"), hf.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{where}: {wrong('architectures', architectures, 'a list of names')}")
    if model_type is None:
        for family in FAMILIES.values():
            if family.architecture in architectures:
                model_type = family.name
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = (
            f"architecture {architectures[0]!r} (model_type {model_type!r})"
            if architectures
            else repr(model_type)
        )
        raise UserError(f"{where}: {named} is not supported; supported model types are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    known = {family.architecture.lower(), family.base_architecture.lower()}
    if architectures and not known & {name.lower() for name in architectures}:
        raise UserError(
            f"{where}: architecture {architectures[0]!r} is not supported; "
            f"of model type {model_type!r} only {family.architecture} is"
        )
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: field 'quantization_config': quantized weights are not supported; use the original checkpoint"
        )
    try:
        refuse(hf, "per_layer_config", {})
        return family.read(hf)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from problem


def config_to_hf(config: ModelConfig, dtype: str) -> HF:
    """``config.json`` of a model with weights of type ``dtype`` ("float32", "bfloat16", ...).

    Raises:
        ValueError: the family has no field for something that ``config`` asks for.
    """
    family = FAMILIES[config.family]
    hf = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.write(config),
        "dtype": dtype,
        "torch_dtype": dtype,  # older readers
    }
    back = family.read(hf)
    if back != config:
        ours, theirs = asdict(config), asdict(back)
        lost = [f"{f.name}={ours[f.name]!r}" for f in fields(config) if ours[f.name] != theirs[f.name]]
        raise ValueError(f"a {family.name} config.json cannot say {', '.join(lost)}")
    return hf
