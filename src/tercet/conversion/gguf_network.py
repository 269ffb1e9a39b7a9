"""A GGUF file's network as llama.cpp computes it, read without any of the code that writes files.

A check that undoes a conversion by the tables that made it would agree with a mistake in them. So names come
from the ``gguf`` package, values from its dequantisation, the configuration from the file's metadata, and what
llama.cpp's graphs do with rows, norms and scales is said here once more.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tercet.errors import UserError
from tercet.files import write_atomic, write_json
from tercet.model.config import ModelConfig
from tercet.model.families import FAMILIES
from tercet.model.gguf_config import config_of
from tercet.model.gguf_file import GGUFFile
from tercet.model.gguf_values import Floats, rows_of, to_float32
from tercet.model.gguf_vocabulary import read_vocabulary
from tercet.model.tokenizer import CONFIG, TOKENIZER, Tokenizer
from tercet.model.weights import Update

# Graphs whose rotary positions turn neighbouring dimensions of a head together (LLAMA_ROPE_TYPE_NORM).
NEIGHBOURS = ("llama", "smollm3")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")


class GGUFNetwork:
    """The network in a file, by the names of our network.

    Attributes:
        config: the configuration in the file's metadata.
        architecture: llama.cpp's name of the graph.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            UserError: it is damaged, or holds what can't be read.
        """
        self._file = GGUFFile(path)
        self._vocabulary = read_vocabulary(self._file)
        self.architecture = self._file.text("general.architecture")
        self.config: ModelConfig = config_of(
            self._file, {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        )
        self._places = _places(self.config, self.architecture)
        self._bytes = np.memmap(path, np.uint8, "r")

    def type_of(self, name: str) -> str:
        """Return GGML's name of the type that a tensor is stored in."""
        return self._file.tensors[self._places[name][0]].type

    def tokenizer(self) -> Tokenizer:
        """Return the file's tokenizer."""
        with TemporaryDirectory() as directory:
            write_atomic(Path(directory) / TOKENIZER, json.dumps(self._vocabulary.tokenizer))
            write_json(Path(directory) / CONFIG, self._vocabulary.config)
            return Tokenizer.load(directory)

    def __call__(self, name: str) -> Floats:
        """Return a tensor as our network applies it, float32.

        Raises:
            UserError: the file has no such tensor.
        """
        place = self._places[name]
        info = self._file.tensors.get(place[0])
        if info is None:
            raise UserError(f"the file has no tensor {place[0]}")
        rows = rows_of(info, self._bytes)
        if len(info.shape) == 1:
            values = to_float32(info.type, rows, info.shape[0])[place[1]]
        else:
            values = to_float32(info.type, rows[place[1]], info.shape[-1])
        if self.architecture in NEIGHBOURS:
            values = _halves(name, values, self.config)
        # llama.cpp multiplies by a norm's weight as it is stored; our network adds Gemma's offset to it.
        is_norm = name.endswith("norm.weight")
        return np.asarray(values - self.config.norm_offset, np.float32) if is_norm else values


def _halves(name: str, values: Floats, config: ModelConfig) -> Floats:
    """Return rows of queries or keys so that the dimensions turned together are half a head apart."""
    if not re.search(r"\.(q|k)_proj\.", name):
        return values
    size = config.head_dim
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    heads = np.arange(0, len(values), size)
    rows: Floats = values[(heads[:, None] + order[None, :]).reshape(-1)]
    return rows


def _places(config: ModelConfig, architecture: str) -> dict[str, tuple[str, Any]]:
    """Return the file's tensor and the rows or the matrix in it, by our name."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    places: dict[str, tuple[str, Any]] = {}
    for rule in FAMILIES[config.family].tensors(config):
        begin = 0
        for part in rule.parts:
            expert = _EXPERT.fullmatch(part.name.removesuffix(".weight"))
            if expert is not None:
                places[part.name] = (f"blk.{expert[1]}.ffn_{expert[3]}_exps.weight", int(expert[2]))
                continue
            theirs = names.get_name(rule.name, (".weight", ".bias"))
            places[part.name] = (str(theirs), slice(begin, begin + part.shape[0]))
            begin += part.shape[0]
    return places


class WithAdapter:
    """A base with the LoRA adapter of a GGUF file, as llama.cpp applies it to a GGUF file of the base.

    Attributes:
        config: the base's configuration.
        adapted: our names of the matrices that the file changes.
    """

    def __init__(self, base: Any, path: Path) -> None:
        """Open a file.

        Raises:
            UserError: it is damaged or is no adapter.
        """
        self._base, self.config = base, base.config
        file = GGUFFile(path)
        if (file.text("general.type"), file.text("adapter.type")) != ("adapter", "lora"):
            raise UserError("the file is no LoRA adapter")
        self.architecture = file.text("general.architecture")
        alpha, data = file.number("adapter.lora.alpha"), np.memmap(path, np.uint8, "r")
        self._updates: dict[str, Update] = {}
        rest = set(file.tensors)
        for ours, (theirs, rows) in _places(self.config, self.architecture).items():
            if f"{theirs}.lora_a" not in file.tensors:
                continue
            read = []
            for suffix in ("lora_a", "lora_b"):
                info = file.tensors[f"{theirs}.{suffix}"]
                rest.discard(info.name)
                read.append(to_float32(info.type, rows_of(info, data), info.shape[-1]))
            a, b = read[0], read[1][rows]
            if self.architecture in NEIGHBOURS:
                b = _halves(ours, b, self.config)
            self._updates[ours] = Update(a, b, alpha / len(a))
        if rest:
            raise UserError(f"the file's tensor {min(rest)} belongs to no matrix of the base")
        self.adapted = tuple(self._updates)
        self._kind = next((info.type for info in file.tensors.values()), "F32")

    def type_of(self, name: str) -> str:
        """Return the type that the file's change of a matrix is stored in; "F32" for a matrix it does not change."""
        return self._kind if name in self._updates else "F32"

    def __call__(self, name: str) -> Floats:
        """Return a tensor with the adapter merged, as float32."""
        values: Floats = self._base(name)
        update = self._updates.get(name)
        return values if update is None else values + update.scaling * (update.b @ update.a)
