"""``adapter_config.json`` of a LoRA adapter, as PEFT writes it: adapted layers and their ranks."""

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

# Fields without effect on the result of a stored adapter: origin, training, layout, memory.
_HARMLESS = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
# Initialisations that change only the adapter; other ones (pissa, olora, ...) change the base as well.
_HARMLESS_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + scaling * B A.

    Attributes:
        r: the rank of A and B.
        alpha: scaling is alpha / r, or alpha / sqrt(r) if rank-stabilised; None: 2 r.
        target_modules: ends of Hugging Face's module names; or a regular expression for the whole
            name; or "all-linear": every linear layer but the head.
        exclude_modules: likewise, of modules that are not adapted.
        layers_to_transform: the numbers of the layers whose modules ``target_modules`` adapts by the ends of
            their names; None: all. A module that is listed with its whole name is adapted anyway.
        layers_pattern: regular expressions of the name that stands before the number of a layer; empty: any.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        rank_pattern: regular expressions of module names' ends, to the rank of those modules.
        alpha_pattern: likewise, to their alpha.
        base_model: the base model's weights: a path or a name on the Hub.
        revision: the base model's revision on the Hub.

    Raises:
        UserError: r or alpha is not positive.
    """

    r: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, value in [
            ("r", self.r),
            *((f"rank_pattern {key!r}", r) for key, r in self.rank_pattern.items()),
        ]:
            if type(value) is not int or value < 1:
                raise UserError(f"adapter: {name} is {value!r}; a rank must be an integer of at least 1")
        alphas: list[tuple[str, float]] = [("alpha", self.whole_alpha)]
        alphas += [(f"alpha_pattern {key!r}", alpha) for key, alpha in self.alpha_pattern.items()]
        for name, alpha in alphas:
            if type(alpha) not in (int, float) or alpha <= 0:
                raise UserError(f"adapter: {name} is {alpha!r}; it must be a number above 0")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError("adapter: layers_to_transform needs a list of modules as target_modules")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("adapter: layers_pattern needs layers_to_transform")

    @property
    def whole_alpha(self) -> float:
        """The alpha of modules that no pattern matches."""
        return 2 * self.r if self.alpha is None else self.alpha

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Return rank and alpha of a module, by its Hugging Face name; the first matching pattern decides."""
        r = next((r for key, r in self.rank_pattern.items() if _matches_end(key, module)), self.r)
        alphas = (alpha for key, alpha in self.alpha_pattern.items() if _matches_end(key, module))
        return r, next(alphas, self.whole_alpha)

    def scaling(self, r: int, alpha: float) -> float:
        """Return the factor on B A."""
        return alpha / r**0.5 if self.use_rslora else alpha / r

    def alpha_for(self, r: int, scaling: float) -> float:
        """Return the alpha that gives ``scaling`` at rank ``r``: the inverse of `scaling`."""
        # Ten digits: the product of a quotient, such as 32 / 3 * 3, should be written as the original number.
        alpha = round(scaling * (r**0.5 if self.use_rslora else r), 10)
        return int(alpha) if alpha == int(alpha) else alpha


def _matches_end(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as problem:
        raise UserError(f"adapter: {pattern!r} is not a regular expression: {problem}") from problem


def _matches(modules: tuple[str, ...] | str, name: str) -> bool:
    if not isinstance(modules, str):
        return any(name == end or name.endswith(f".{end}") for end in modules)
    try:
        return re.fullmatch(modules, name) is not None
    except re.error as problem:
        raise UserError(f"adapter: {modules!r} is not a regular expression: {problem}") from problem


def _in_layers(adapter: AdapterConfig, name: str) -> bool:
    """Return whether the number of the layer that a module belongs to is one of ``layers_to_transform``.

    As PEFT, the number is the first whole part of the name that is one, after a part that matches a pattern.
    """
    if adapter.layers_to_transform is None or name in adapter.target_modules:
        return True
    for pattern in adapter.layers_pattern or (r"[^.]+",):
        try:
            match = re.match(rf"(?:.*?\.)?{pattern}\.(?P<number>\d+)\.", name)
        except re.error as problem:
            raise UserError(f"adapter: {pattern!r} is not a regular expression: {problem}") from problem
        if match is not None:
            return int(match["number"]) in adapter.layers_to_transform
    return False


def adapted_modules(adapter: AdapterConfig, model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the adapted linear layers: Hugging Face's module name to the network's module names.

    A module of Hugging Face may be several modules here (GPT-2's c_attn); the name of one of them
    adapts it alone.

    Raises:
        UserError: no layer matches, or an embedding, the head or an MLP of a mixture does.
    """

    def targeted(name: str) -> bool:
        return (
            _matches(adapter.target_modules, name)
            and _in_layers(adapter, name)
            and not _matches(adapter.exclude_modules, name)
        )

    everything = isinstance(adapter.target_modules, str) and adapter.target_modules.lower() == ALL_LINEAR
    adapted: dict[str, tuple[str, ...]] = {}
    ends: dict[str, None] = {}
    for rule in FAMILIES[model.family].tensors(model):
        if not rule.name.endswith(".weight") or len(rule.shape) != 2:
            continue
        theirs = rule.name.removesuffix(".weight")
        ours = tuple(part.name.removesuffix(".weight") for part in rule.parts)
        if model.num_experts and ".mlp." in ours[0]:
            # PEFT adapts the experts as joint parameters, and takes a plain MLP's name for theirs.
            if not everything and targeted(theirs):
                raise UserError(
                    f"adapter: target_modules matches {theirs}; in a mixture only the attention can be adapted"
                )
            continue
        if ".layers." not in ours[0]:
            if not everything and targeted(theirs):
                raise UserError(
                    f"adapter: target_modules matches {theirs}; embeddings and the head can't be adapted"
                )
            continue
        ends[theirs.rpartition(".")[2]] = None
        if everything:
            names = ours if not _matches(adapter.exclude_modules, theirs) else ()
        else:
            names = ours if targeted(theirs) else tuple(name for name in ours if targeted(name))
        if names:
            adapted[theirs] = names
    if not everything and targeted("lm_head"):
        raise UserError("adapter: target_modules matches lm_head; embeddings and the head can't be adapted")
    if not adapted:
        layers = "" if adapter.layers_to_transform is None else " in layers_to_transform"
        raise UserError(
            f"adapter: target_modules {adapter.target_modules!r}{layers} matches no layer of this {model.family} "
            f"model, which has {', '.join(ends)} in {model.num_layers} layers"
        )
    return adapted


def is_adapter(directory: str | Path) -> bool:
    """Return whether the directory holds an adapter rather than a whole model."""
    return (Path(directory) / CONFIG).is_file()


def read_adapter_config(directory: str | Path) -> AdapterConfig:
    """Return the configuration of a stored adapter.

    Raises:
        UserError: the file is missing or wrong, or a field has an unsupported value.
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
    remaining = {key: value for key, value in content.items() if key not in _HARMLESS}

    def take(name: str, kind: type | tuple[type, ...], default: Any, expected: str) -> Any:
        value = remaining.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"field {name!r} is {value!r}; it must be {expected}")
        return value

    def modules(name: str) -> tuple[str, ...] | str:
        value = take(name, (str, list), (), "a list of module names or a regular expression")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"field {name!r} is {value!r}; it must be a list of module names")
        return value if isinstance(value, str) else tuple(value)

    def layers() -> tuple[int, ...] | None:
        value = take("layers_to_transform", (int, list), [], "a layer number or a list of them")
        numbers = [value] if isinstance(value, int) else value
        if not all(type(number) is int for number in numbers):
            raise UserError(f"field 'layers_to_transform' is {value!r}; it must be a list of layer numbers")
        return tuple(numbers) or None

    def pattern() -> tuple[str, ...]:
        value = modules("layers_pattern")
        return (value,) if value and isinstance(value, str) else tuple(value)

    for name, allowed in [("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None)), ("bias", ("none", None)),
                          ("init_lora_weights", _HARMLESS_INITIALISATIONS)]:  # fmt: skip
        if (value := remaining.pop(name, None)) not in allowed:
            raise UserError(f"field {name!r} is {value!r}, which is not supported")
    config = AdapterConfig(
        r=take("r", int, 8, "an integer"),  # PEFT's defaults are 8 and 8
        alpha=take("lora_alpha", (int, float), 8, "a number"),
        target_modules=modules("target_modules"),
        exclude_modules=modules("exclude_modules"),
        layers_to_transform=layers(),
        layers_pattern=pattern(),
        use_rslora=take("use_rslora", bool, False, "true or false"),
        rank_pattern=take("rank_pattern", dict, {}, "an object"),
        alpha_pattern=take("alpha_pattern", dict, {}, "an object"),
        base_model=take("base_model_name_or_path", str, None, "a path or a name"),
        revision=take("revision", str, None, "a string"),
    )
    for name, value in remaining.items():
        # By type: 0 is a value, though it equals False.
        if not (value is None or value is False or (isinstance(value, str | list | dict) and not value)):
            raise UserError(f"field {name!r} is {value!r}, which is not supported")
    return config
