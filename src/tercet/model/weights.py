"""Weights of checkpoints and adapters as numpy arrays, by the network's names, without torch.

Tensors stay mapped to their files and are converted one at a time.
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
from tercet.model.gguf_index import holds_gguf
from tercet.model.gguf_tensors import GGUFTensors
from tercet.model.gguf_values import Blocks
from tercet.model.safetensors_file import StoredTensor, read_safetensors
from tercet.model.tensor_names import TensorRule, split_rows

Floats = NDArray[np.float32]
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def matched_tensors(config: ModelConfig, directory: str | Path) -> list[tuple[TensorRule, StoredTensor]]:
    """Return each tensor of the model's family with the stored tensor.

    Raises:
        UserError: a tensor is missing, unexpected, of a wrong shape or of a type that weights can't have.
    """
    directory, family = Path(directory), FAMILIES[config.family]
    remaining = open_tensors(directory)
    if vision := [
        name for name in remaining if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name)
    ]:
        raise UserError(
            f"{remaining[vision[0]].file}: tensor {vision[0]} belongs to a vision model; only text models are "
            "supported: load it with transformers' AutoModelForCausalLM and save its text part"
        )
    matched = []
    for rule in family.tensors(config):
        # A bare decoder (GPT2Model, LlamaModel) is stored without the prefix.
        tensor = remaining.pop(rule.name, None) or remaining.pop(rule.name.removeprefix(family.prefix), None)
        if tensor is None:
            raise UserError(
                f"{directory}: tensor {rule.name} is missing; the weights and config.json are not of the same model"
            )
        if tensor.shape != rule.shape:
            raise UserError(
                f"{tensor.file}: tensor {rule.name} has shape {list(tensor.shape)}; "
                f"config.json requires {list(rule.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name} has dtype {tensor.dtype}; it must be one of {', '.join(DTYPES)}"
            )
        matched.append((rule, tensor))
    head = remaining.pop(family.head, None) if config.tie_embeddings else None
    if head is not None:
        embedding = next(
            tensor for rule, tensor in matched if rule.parts[0].name == "model.embed_tokens.weight"
        )
        if head.dtype != embedding.dtype or not np.array_equal(head.data, embedding.data):
            raise UserError(
                f"{head.file}: tensor {family.head} differs from the embedding, "
                "but config.json ties them (field 'tie_word_embeddings')"
            )
    for name, tensor in remaining.items():
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise UserError(
                f"{tensor.file}: tensor {name} is unexpected; a {family.name} model with this config.json has no such tensor"
            )
    return matched


def as_float32(tensor: StoredTensor) -> Floats:
    """Return the stored tensor as float32, which is exact for all types but F64."""
    kind = np.dtype(DTYPES[tensor.dtype])
    data = tensor.data
    if data.ctypes.data % kind.itemsize:  # in older files; a view must be aligned
        data = np.array(data)
    values: NDArray[Any] = data.view(kind).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # bfloat16 is the upper half of a float32
        wide: Floats = (values.astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Update:
    """An adapter's change to a matrix of the network: scaling * b @ a, of shapes [out, r] and [r, in]."""

    a: Floats
    b: Floats
    scaling: float


class SafetensorsTensors:
    """The tensors of a checkpoint directory by the network's names.

    Attributes:
        dtype: safetensors' name of the embedding's type.
        parameters: number of weights.

    Raises:
        UserError: as `matched_tensors`.
    """

    def __init__(self, directory: str | Path, config: ModelConfig) -> None:
        matched = matched_tensors(config, directory)
        self._places = {
            part.name: (rule, tensor, number)
            for rule, tensor in matched
            for number, part in enumerate(rule.parts)
        }
        self.dtype = matched[0][1].dtype
        self.parameters = sum(math.prod(rule.shape) for rule, _ in matched)
        self._last: tuple[str, list[Floats]] = ("", [])  # parts of a tensor are requested in a row

    def values(self, name: str) -> Floats:
        """Return the tensor of that name in ``Transformer.state_dict()``, as float32."""
        rule, tensor, number = self._places[name]
        if self._last[0] != rule.name:
            joined = as_float32(tensor)
            self._last = (
                rule.name,
                split_rows(joined.T if rule.transpose else joined, rule.heights, rule.groups),
            )
        return self._last[1][number]

    def blocks(self, name: str) -> Blocks | None:
        """Return None: safetensors files have no quantised blocks."""
        return None

    def type_of(self, name: str) -> str:
        """Return safetensors' name of a tensor's type."""
        return self.dtype_of(name)

    def dtype_of(self, name: str) -> str:
        """Return safetensors' name of a tensor's type."""
        return self._places[name][1].dtype


def open_weights(directory: str | Path, config: ModelConfig) -> SafetensorsTensors | GGUFTensors:
    """Return the tensors of a checkpoint directory, in safetensors files or in a GGUF file.

    Raises:
        UserError: a file is missing or damaged, or does not fit ``config``.
    """
    if holds_gguf(directory):
        return GGUFTensors(directory, config)
    return SafetensorsTensors(directory, config)


class Weights:
    """The weights of a checkpoint directory, with an adapter merged if there is one.

    Attributes:
        config: the network's configuration.
        dtype: safetensors' name of the matrices' type; "F32" if they are quantised or an adapter is merged.
        parameters: number of weights.

    Raises:
        UserError: a file is missing or damaged, or does not fit the others.
    """

    def __init__(self, directory: str | Path, adapter: str | Path | None = None) -> None:
        self.config = read_config(directory)
        self._tensors = open_weights(directory, self.config)
        # An adapter's change must not be rounded away.
        self.dtype = self._tensors.dtype if adapter is None else "F32"
        self.parameters = self._tensors.parameters
        self._updates = {} if adapter is None else read_adapter(adapter, self.config)[1]

    def __call__(self, name: str) -> Floats:
        """Return the tensor of that name in ``Transformer.state_dict()``, as float32."""
        values = self._tensors.values(name)
        update = self._updates.get(name.removesuffix(".weight"))
        if update is not None:
            values = values + update.scaling * (update.b @ update.a)
        return values

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix as the quantised rows of a GGUF file; None if it is not stored so, or is changed."""
        if name.removesuffix(".weight") in self._updates:
            return None
        return self._tensors.blocks(name)

    def type_of(self, name: str) -> str | None:
        """Return GGUF's name of the type of `blocks`, or a float type; None for values that an adapter changes."""
        return None if name.removesuffix(".weight") in self._updates else self._tensors.type_of(name)

    def dtype_of(self, name: str) -> str:
        """Return safetensors' name of a stored tensor's type; "F32" if it is quantised."""
        return self._tensors.dtype_of(name)


def read_adapter(directory: str | Path, config: ModelConfig) -> tuple[AdapterConfig, dict[str, Update]]:
    """Return a stored adapter's configuration, and its updates by the network's module names.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unexpected or of a wrong shape,
            or the configuration is not supported.
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
    stored = read_safetensors(path)
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
        a = _take(stored, path, f"base_model.model.{theirs}.lora_A.weight", (r, inner))
        b = _take(stored, path, f"base_model.model.{theirs}.lora_B.weight", (sum(heights), r))
        rows = split_rows(b, heights, groups.get(ours[0], 1))
        scaling = adapter.scaling(r, alpha)
        updates |= {name: Update(a, row, scaling) for name, row in zip(ours, rows, strict=True)}
    if stored:
        raise UserError(
            f"{path}: tensor {next(iter(stored))} is unexpected; {CONFIG} does not name its module"
        )
    return adapter, updates


def _groups(config: ModelConfig) -> dict[str, int]:
    """Return the number of groups of tensors whose parts alternate by head, by the first part's module."""
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
            f"{path}: tensor {name} has shape {list(tensor.shape)}; {CONFIG} and the base require {list(shape)}, "
            "so check that this is the base that the adapter was trained on"
        )
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{path}: tensor {name} has dtype {tensor.dtype}; it must be one of {', '.join(DTYPES)}"
        )
    return as_float32(tensor)
