"""A checkpoint's weights by our names, and an adapter's, as numpy arrays: no torch.

Tensors stay mapped to their files until they are asked for, one at a time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.errors import UserError
from tercet.model.adapter_config import CONFIG, WEIGHTS, AdapterConfig, adapted_modules, read_adapter_config
from tercet.model.checkpoint import open_tensors, read_config
from tercet.model.config import ModelConfig
from tercet.model.families import FAMILIES
from tercet.model.safetensors_file import StoredTensor, read_safetensors
from tercet.model.tensor_names import TensorRule, split_rows

Floats = NDArray[np.float32]
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def matched_tensors(config: ModelConfig, directory: str | Path) -> list[tuple[TensorRule, StoredTensor]]:
    """Each rule of the model's family with its stored tensor.

    Raises:
        UserError: a tensor is missing, left over, of a wrong shape or of a type that weights don't have.
    """
    directory, family = Path(directory), FAMILIES[config.family]
    left = open_tensors(directory)
    if pictures := [
        name for name in left if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name)
    ]:
        raise UserError(
            f"{left[pictures[0]].file}: tensor {pictures[0]} belongs to a model that sees pictures; only text "
            "models are supported: load it with transformers' AutoModelForCausalLM and save its text part"
        )
    matched = []
    for rule in family.tensors(config):
        # A bare decoder (GPT2Model, LlamaModel) is stored without the prefix.
        tensor = left.pop(rule.name, None) or left.pop(rule.name.removeprefix(family.prefix), None)
        if tensor is None:
            raise UserError(f"{directory}: tensor {rule.name} is missing from the weights")
        if tensor.shape != rule.shape:
            raise UserError(
                f"{tensor.file}: tensor {rule.name} has shape {list(tensor.shape)}; "
                f"config.json asks for {list(rule.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name} has dtype {tensor.dtype}; weights must be {', '.join(DTYPES)}"
            )
        matched.append((rule, tensor))
    head = left.pop(family.head, None) if config.tie_embeddings else None
    if head is not None:
        embedding = next(
            tensor for rule, tensor in matched if rule.parts[0].name == "model.embed_tokens.weight"
        )
        if head.dtype != embedding.dtype or not np.array_equal(head.data, embedding.data):
            raise UserError(
                f"{head.file}: tensor {family.head} differs from the embedding, "
                "but config.json ties them (field 'tie_word_embeddings')"
            )
    for name, tensor in left.items():
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise UserError(
                f"{tensor.file}: tensor {name} is unexpected; a {family.name} model of this config.json has none"
            )
    return matched


def as_float32(tensor: StoredTensor) -> Floats:
    """The stored tensor as float32, exactly where its type allows."""
    kind = np.dtype(DTYPES[tensor.dtype])
    data = tensor.data
    if data.ctypes.data % kind.itemsize:  # older files; a view must be aligned
        data = np.array(data)
    values: NDArray[Any] = data.view(kind).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # the upper half of a float32
        wide: Floats = (values.astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one of our matrices: scaling * b @ a, of shapes [out, r] and [r, in]."""

    a: Floats
    b: Floats
    scaling: float


class Weights:
    """A checkpoint directory's weights, with an adapter merged or without.

    Raises:
        UserError: a file is missing, broken or does not fit.
    """

    def __init__(self, directory: str | Path, adapter: str | Path | None = None) -> None:
        self.config = read_config(directory)
        matched = matched_tensors(self.config, directory)
        self._places = {
            part.name: (rule, tensor, number)
            for rule, tensor in matched
            for number, part in enumerate(rule.parts)
        }
        # The embedding's, as safetensors calls it; what an adapter adds must not be rounded away.
        self.dtype = matched[0][1].dtype if adapter is None else "F32"
        self.parameters = sum(math.prod(rule.shape) for rule, _ in matched)
        self._updates = {} if adapter is None else read_adapter(adapter, self.config)[1]
        self._last: tuple[str, list[Floats]] = ("", [])  # parts of one tensor are asked for one after another

    def __call__(self, name: str) -> Floats:
        """The tensor of that name in ``Transformer.state_dict()``, as float32."""
        rule, tensor, number = self._places[name]
        if self._last[0] != rule.name:
            whole = as_float32(tensor)
            self._last = (
                rule.name,
                split_rows(whole.T if rule.transpose else whole, rule.heights, rule.groups),
            )
        found = self._last[1][number]
        update = self._updates.get(name.removesuffix(".weight"))
        if update is not None:
            found = found + update.scaling * (update.b @ update.a)
        return found


def read_adapter(directory: str | Path, config: ModelConfig) -> tuple[AdapterConfig, dict[str, Update]]:
    """A stored adapter: its configuration, and by our module names what it adds.

    Raises:
        UserError: a file is missing or broken, a tensor is missing, unexpected or of a wrong shape,
            or the configuration asks for what is not supported.
    """
    directory = Path(directory)
    adapter = read_adapter_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is not read)"
        raise UserError(
            f"{directory} has no {WEIGHTS}{pickled if (directory / 'adapter_model.bin').is_file() else ''}"
        )
    shapes = {
        part.name: part.shape for rule in FAMILIES[config.family].tensors(config) for part in rule.parts
    }
    left = read_safetensors(path)
    updates: dict[str, Update] = {}
    groups = _groups(config)
    try:
        modules = adapted_modules(adapter, config)
    except UserError as problem:
        raise UserError(f"{directory / CONFIG}: {str(problem).removeprefix('adapter: ')}") from problem
    for theirs, ours in modules.items():
        r, alpha = adapter.rank_and_alpha(theirs)
        heights = [shapes[f"{name}.weight"][0] for name in ours]
        inner = shapes[f"{ours[0]}.weight"][1]
        a = _take(left, path, f"base_model.model.{theirs}.lora_A.weight", (r, inner))
        b = _take(left, path, f"base_model.model.{theirs}.lora_B.weight", (sum(heights), r))
        rows = split_rows(b, heights, groups.get(ours[0], 1))
        scaling = adapter.scaling(r, alpha)
        updates |= {name: Update(a, row, scaling) for name, row in zip(ours, rows, strict=True)}
    if left:
        raise UserError(f"{path}: tensor {next(iter(left))} is unexpected; {CONFIG} does not name its module")
    return adapter, updates


def _groups(config: ModelConfig) -> dict[str, int]:
    """Of tensors whose parts alternate by head, by the first part's module."""
    return {
        rule.parts[0].name.removesuffix(".weight"): rule.groups
        for rule in FAMILIES[config.family].tensors(config)
        if rule.groups > 1
    }


def _take(stored: dict[str, StoredTensor], path: Path, name: str, shape: tuple[int, int]) -> Floats:
    tensor = stored.pop(name, None)
    if tensor is None:
        raise UserError(f"{path}: tensor {name} is missing")
    if tensor.shape != shape:
        raise UserError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}; by {CONFIG} and this base it must have "
            f"{list(shape)}: is it the base that the adapter was trained on?"
        )
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{path}: tensor {name} has dtype {tensor.dtype}; it must be one of {', '.join(DTYPES)}"
        )
    return as_float32(tensor)
