"""Model families: how their ``config.json`` and tensor names correspond to Tercet's.

A family is a pair of small functions (`tercet.model.hf_config` and its neighbours) and a table of
names (`tercet.model.tensor_names`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from tercet.errors import UserError
from tercet.model import hf_config, hf_gemma, hf_gpt
from tercet.model import tensor_names as names
from tercet.model.config import ModelConfig
from tercet.model.hf_fields import HF, refuse, wrong
from tercet.model.tensor_names import Names, TensorRule


@dataclass(frozen=True)
class Family:
    """The reader and writer of a family's checkpoints.

    Attributes:
        name: ``model_type`` in config.json.
        architecture: ``architectures[0]`` in config.json.
        base_architecture: the same in a checkpoint of the bare decoder.
        read: makes a configuration from the fields of config.json.
        write: makes the fields of config.json from a configuration.
        names: the family's names of tensors.
        prefix: beginning of tensor names in the whole model; checkpoints of the bare decoder lack it.
        ignored: regular expressions of tensors without weights (buffers that old versions stored).
    """

    name: str
    architecture: str
    base_architecture: str
    read: Callable[[HF], ModelConfig]
    write: Callable[[ModelConfig], HF]
    names: Names = names.LLAMA_NAMES
    prefix: str = "model."
    ignored: tuple[str, ...] = (r"(.*\.)?rotary_emb\.inv_freq",)

    def tensors(self, config: ModelConfig) -> list[TensorRule]:
        """Return every tensor of a checkpoint with this configuration."""
        return self.names.rules(config)

    @property
    def head(self) -> str:
        """Name of the head's tensor."""
        return self.names.rename("lm_head.weight")


def _decoder(
    name: str,
    title: str,
    read: Callable[[HF], ModelConfig],
    write: Callable[[ModelConfig], HF],
    tensors: Names = names.LLAMA_NAMES,
) -> Family:
    return Family(name, f"{title}ForCausalLM", f"{title}Model", read, write, tensors)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _decoder("llama", "Llama", hf_config.read_llama, hf_config.write_llama),
        _decoder("mistral", "Mistral", hf_config.read_mistral, hf_config.write_mistral),
        _decoder("qwen2", "Qwen2", hf_config.read_qwen2, hf_config.write_qwen2),
        _decoder("qwen3", "Qwen3", hf_config.read_qwen3, hf_config.write_qwen3),
        _decoder("gemma2", "Gemma2", hf_gemma.read_gemma2, hf_gemma.write_gemma2, names.GEMMA_NAMES),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "Gemma3TextModel",
            hf_gemma.read_gemma3,
            hf_gemma.write_gemma3,
            names.GEMMA_NAMES,
        ),
        _decoder("phi3", "Phi3", hf_config.read_phi3, hf_config.write_phi3, names.PHI3_NAMES),
        _decoder("olmo2", "Olmo2", hf_config.read_olmo2, hf_config.write_olmo2, names.OLMO2_NAMES),
        _decoder("smollm3", "SmolLM3", hf_config.read_smollm3, hf_config.write_smollm3),
        _decoder("mixtral", "Mixtral", hf_config.read_mixtral, hf_config.write_mixtral, names.MIXTRAL_NAMES),
        _decoder("qwen3_moe", "Qwen3Moe", hf_config.read_qwen3_moe, hf_config.write_qwen3_moe),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            "GPT2Model",
            hf_gpt.read_gpt2,
            hf_gpt.write_gpt2,
            names.GPT2_NAMES,
            prefix="transformer.",
            ignored=(r"(.*\.)?attn\.(masked_)?bias",),
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            "GPTNeoXModel",
            hf_gpt.read_gpt_neox,
            hf_gpt.write_gpt_neox,
            names.GPT_NEOX_NAMES,
            prefix="gpt_neox.",
            ignored=(r"(.*\.)?attention\.(masked_)?bias", r"(.*\.)?rotary_emb\.inv_freq"),
        ),
    )
}


def _text_model(hf: HF) -> HF:
    """Return the configuration of the text part of a multimodal Gemma 3.

    Loading the weights then refuses a checkpoint that contains other parts.
    """
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise wrong("text_config", text, "an object")
    shared = {name: hf[name] for name in ("tie_word_embeddings", "quantization_config") if name in hf}
    return shared | text | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def config_from_hf(hf: HF, where: str) -> ModelConfig:
    """Return the configuration that a parsed ``config.json`` describes; ``where`` names the file in errors.

    Raises:
        UserError: the architecture or a field is unknown, wrong or unsupported.
    """
    if not isinstance(hf, dict):
        raise UserError(f"{where} holds a {type(hf).__name__}; it must be a JSON object")
    if hf.get("model_type") == "gemma3":
        try:
            hf = _text_model(hf)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from problem
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
        raise UserError(
            f"{where}: {named} is not supported; supported model types are {', '.join(FAMILIES)} "
            "(transformers:REF runs other ones)"
        )
    family = FAMILIES[model_type]
    known = {family.architecture.lower(), family.base_architecture.lower()}
    if architectures and not known & {name.lower() for name in architectures}:
        raise UserError(
            f"{where}: architecture {architectures[0]!r} is not supported; "
            f"of model type {model_type!r} only {family.architecture} is"
        )
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: field 'quantization_config' is set, but quantized weights are not supported; "
            "use the original checkpoint"
        )
    try:
        refuse(hf, "per_layer_config", {})
        return family.read(hf)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from problem


def config_to_hf(config: ModelConfig, dtype: str) -> HF:
    """Return ``config.json`` of a model with weights of type ``dtype`` ("float32", "bfloat16", ...).

    Raises:
        ValueError: the family's config.json can't express ``config``.
    """
    family = FAMILIES[config.family]
    hf = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.write(config),
        "dtype": dtype,
        "torch_dtype": dtype,  # for older readers
    }
    back = family.read(hf)
    if back != config:
        ours, theirs = asdict(config), asdict(back)
        lost = [f"{f.name}={ours[f.name]!r}" for f in fields(config) if ours[f.name] != theirs[f.name]]
        raise ValueError(f"config.json of a {family.name} model can't express {', '.join(lost)}")
    return hf
