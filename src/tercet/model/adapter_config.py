"""``adapter_config.json`` of a LoRA adapter, as PEFT writes it: which layers, which ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tercet.errors import UserError
from tercet.files import read_json
from tercet.model.config import ModelConfig
from tercet.model.families import FAMILIES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"

# Fields that leave the result of a stored adapter as it is: origin, training, layout, memory.
_HARMLESS = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
# Ways to begin that change only the adapter; the others (pissa, olora, ...) change the base as well.
_HARMLESS_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + scaling * B A.

    alpha: scaling is alpha / r, or alpha / sqrt(r) when rank-stabilised; None: 2 r.
    target_modules: ends of module names, as Hugging Face calls them; or one regular expression for
        the whole name; or "all-linear": every linear layer but the head.
    rank_pattern, alpha_pattern: regular expression of a module name's end, to its own r or alpha.
    base_model: where the weights are that it belongs to: a path or a name on the Hub.

    Raises:
        UserError: r or alpha is not positive.
    """

    r: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    use_rslora: bool = False  # Kalajdzievski 2023, arXiv:2312.03732
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None
    revision: str | None = None  # of the base on the Hub

    def __post_init__(self) -> None:
        for name, value in [
            ("r", self.r),
            *((f"rank_pattern {key!r}", r) for key, r in self.rank_pattern.items()),
        ]:
            if type(value) is not int or value < 1:
                raise UserError(f"adapter: {name} is {value!r}; a rank is an integer of at least 1")
        alphas: list[tuple[str, float]] = [("alpha", self.whole_alpha)]
        alphas += [(f"alpha_pattern {key!r}", alpha) for key, alpha in self.alpha_pattern.items()]
        for name, alpha in alphas:
            if type(alpha) not in (int, float) or alpha <= 0:
                raise UserError(f"adapter: {name} is {alpha!r}; it must be a number above 0")

    @property
    def whole_alpha(self) -> float:
        """alpha where no pattern says otherwise."""
        return 2 * self.r if self.alpha is None else self.alpha

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """r and alpha of a module, by its Hugging Face name; the first pattern that matches decides."""
        r = next((r for key, r in self.rank_pattern.items() if _matches_end(key, module)), self.r)
        alphas = (alpha for key, alpha in self.alpha_pattern.items() if _matches_end(key, module))
        return r, next(alphas, self.whole_alpha)

    def scaling(self, r: int, alpha: float) -> float:
        """The factor on B A."""
        return alpha / r**0.5 if self.use_rslora else alpha / r

    def alpha_for(self, r: int, scaling: float) -> float:
        """The alpha that gives ``scaling`` at rank ``r``: the inverse of `scaling`."""
        # Ten digits: a product of a quotient, such as 32 / 3 * 3, should be written as what was meant.
        alpha = round(scaling * (r**0.5 if self.use_rslora else r), 10)
        return int(alpha) if alpha == int(alpha) else alpha


def _matches_end(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as problem:
        raise UserError(f"adapter: {pattern!r} is not a regular expression: {problem}") from problem


def _matches(wanted: tuple[str, ...] | str, name: str) -> bool:
    if not isinstance(wanted, str):
        return any(name == end or name.endswith(f".{end}") for end in wanted)
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as problem:
        raise UserError(f"adapter: {wanted!r} is not a regular expression: {problem}") from problem


def adapted_modules(adapter: AdapterConfig, model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Which linear layers the adapter changes: Hugging Face's module name to ours.

    One module of theirs may be several of ours (GPT-2's c_attn); naming one of ours takes it alone.

    Raises:
        UserError: nothing matches, or an embedding, the head or an MLP of a mixture does.
    """

    def wanted(name: str) -> bool:
        return _matches(adapter.target_modules, name) and not _matches(adapter.exclude_modules, name)

    everything = isinstance(adapter.target_modules, str) and adapter.target_modules.lower() == ALL_LINEAR
    chosen: dict[str, tuple[str, ...]] = {}
    ends: dict[str, None] = {}
    for rule in FAMILIES[model.family].tensors(model):
        if not rule.name.endswith(".weight") or len(rule.shape) != 2:
            continue
        theirs = rule.name.removesuffix(".weight")
        ours = tuple(part.name.removesuffix(".weight") for part in rule.parts)
        if model.num_experts and ".mlp." in ours[0]:
            # PEFT adapts the experts as joint parameters, and takes a plain MLP's name for theirs.
            if not everything and wanted(theirs):
                raise UserError(
                    f"adapter: target_modules takes in {theirs}; in a mixture only the attention can be adapted"
                )
            continue
        if ".layers." not in ours[0]:
            if not everything and wanted(theirs):
                raise UserError(
                    f"adapter: target_modules takes in {theirs}; embeddings and the head can't be adapted"
                )
            continue
        ends[theirs.rpartition(".")[2]] = None
        if everything:
            taken = ours if not _matches(adapter.exclude_modules, theirs) else ()
        else:
            taken = ours if wanted(theirs) else tuple(name for name in ours if wanted(name))
        if taken:
            chosen[theirs] = taken
    if not everything and wanted("lm_head"):
        raise UserError("adapter: target_modules takes in lm_head; embeddings and the head can't be adapted")
    if not chosen:
        raise UserError(
            f"adapter: target_modules {adapter.target_modules!r} matches no layer of this {model.family} model, "
            f"which has {', '.join(ends)}"
        )
    return chosen


def is_adapter(directory: str | Path) -> bool:
    """Whether the directory holds an adapter (and not a whole model)."""
    return (Path(directory) / CONFIG).is_file()


def read_adapter_config(directory: str | Path) -> AdapterConfig:
    """The settings of a stored adapter.

    Raises:
        UserError: the file is missing or wrong, or a field asks for what is not supported.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{path.parent} has no {CONFIG}, so it is not an adapter")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    try:
        return _parse(content)
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from problem


def _parse(content: dict[str, Any]) -> AdapterConfig:
    left = {key: value for key, value in content.items() if key not in _HARMLESS}

    def take(name: str, kind: type | tuple[type, ...], default: Any, wanted: str) -> Any:
        value = left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"field {name!r} is {value!r}; it must be {wanted}")
        return value

    def modules(name: str) -> tuple[str, ...] | str:
        value = take(name, (str, list), (), "a list of module names or a regular expression")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"field {name!r} is {value!r}; it must be a list of module names")
        return value if isinstance(value, str) else tuple(value)

    for name, allowed in [("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None)), ("bias", ("none", None)),
                          ("init_lora_weights", _HARMLESS_BEGINNINGS)]:  # fmt: skip
        if (value := left.pop(name, None)) not in allowed:
            raise UserError(f"field {name!r} is {value!r}, which is not supported")
    config = AdapterConfig(
        r=take("r", int, 8, "an integer"),  # 8 and 8 are what PEFT takes where these are left out
        alpha=take("lora_alpha", (int, float), 8, "a number"),
        target_modules=modules("target_modules"),
        exclude_modules=modules("exclude_modules"),
        use_rslora=take("use_rslora", bool, False, "true or false"),
        rank_pattern=take("rank_pattern", dict, {}, "an object"),
        alpha_pattern=take("alpha_pattern", dict, {}, "an object"),
        base_model=take("base_model_name_or_path", str, None, "a path or a name"),
        revision=take("revision", str, None, "a text"),
    )
    for name, value in left.items():
        if value not in (None, False, "", [], {}):
            raise UserError(f"field {name!r} is {value!r}, which is not supported")
    return config
