"""From a checkpoint directory to a network in memory, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tercet.errors import UserError
from tercet.files import write_json
from tercet.model.checkpoint import (
    MAX_SHARD_BYTES,
    Item,
    StoredTensor,
    open_tensors,
    read_config,
    write_tensors,
)
from tercet.model.config import ModelConfig
from tercet.model.families import FAMILIES, Family, TensorRule, config_to_hf
from tercet.model.transformer import Transformer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trainable: bool = False,
) -> Transformer:
    """The network of a checkpoint directory, in evaluation mode.

    dtype: of the weights; None: each tensor's own on disk.
    trainable: give every weight memory of its own. Otherwise weights that need no conversion stay
        mapped to the file, which costs no time or memory, but must then not be overwritten in place.

    Raises:
        UserError: a file is missing or broken, or a tensor is missing, unexpected or of a wrong shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    family = FAMILIES[config.family]
    stored = _match(config, family, open_tensors(directory), directory)
    state: dict[str, Tensor] = {}
    for rule, tensor in stored:
        whole = tensor_from(tensor)
        own = whole.to(device=device, dtype=dtype or whole.dtype, copy=trainable)
        if rule.transpose:
            own = own.t()
        pieces = torch.split(own, [part.shape[0] for part in rule.parts])
        for part, piece in zip(rule.parts, pieces, strict=True):
            # Pieces of one tensor would share its memory, and an optimizer updates them apart.
            shared = trainable and len(rule.parts) > 1 and piece.is_contiguous()
            state[part.name] = piece.clone() if shared else piece.contiguous()
    with torch.device("meta"), _WithoutInitialisation():  # no memory or time for weights replaced at once
        model = Transformer(config)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()
    return model.eval()


class _WithoutInitialisation(TorchFunctionMode):
    """Skip random numbers: meaningless on the meta device, where the first imports torch's compiler (1.5 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None  # no caller looks at it
        return func(*args, **(kwargs or {}))


def tensor_from(tensor: StoredTensor) -> Tensor:
    """The stored tensor itself, mapped from its file. UserError when its type is not a weight's."""
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} has dtype {tensor.dtype}; weights must be {', '.join(DTYPES)}"
        )
    dtype, data = DTYPES[tensor.dtype], tensor.data
    if data.ctypes.data % dtype.itemsize:  # older files; a view must be aligned
        data = np.array(data)
    return torch.from_numpy(data).view(dtype).view(tensor.shape)


def _match(
    config: ModelConfig, family: Family, stored: dict[str, StoredTensor], directory: Path
) -> list[tuple[TensorRule, StoredTensor]]:
    """Each rule with its stored tensor; nothing may be missing, left over or of a wrong shape."""
    left = dict(stored)
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
        matched.append((rule, tensor))
    head = left.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None:
        embedding = next(
            tensor for rule, tensor in matched if rule.parts[0].name == "model.embed_tokens.weight"
        )
        if head.dtype != embedding.dtype or not np.array_equal(head.data, embedding.data):
            raise UserError(
                f"{head.file}: tensor lm_head.weight differs from the embedding, "
                "but config.json ties them (field 'tie_word_embeddings')"
            )
    for name, tensor in left.items():
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise UserError(
                f"{tensor.file}: tensor {name} is unexpected; a {family.name} model of this config.json has none"
            )
    return matched


def save_model(
    model: Transformer,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights, as the model's family names them.

    dtype: of the weights on disk; None: each tensor's own.
    generation: fields of generation_config.json beyond the token ids of the configuration, or
        instead of them (every stop id under ``eos_token_id``).

    Raises:
        UserError: the disk refuses. ValueError: the model holds adapters that are not merged.
    """
    directory = Path(directory)
    config = model.config
    state = model.state_dict()
    rules = FAMILIES[config.family].tensors(config)
    ours = {part.name for rule in rules for part in rule.parts}
    if unknown := sorted(state.keys() - ours - {"lm_head.weight"}):
        raise ValueError(
            f"{unknown[0]} has no place in a {config.family} checkpoint; merge adapters before saving"
        )

    def items() -> Iterator[Item]:
        for rule in rules:
            parts = [state[part.name].detach() for part in rule.parts]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            whole = (whole.t() if rule.transpose else whole).to("cpu", dtype or whole.dtype).contiguous()
            yield rule.name, DTYPE_NAMES[whole.dtype], tuple(whole.shape), whole.view(torch.uint8).numpy()

    stored = dtype or model.model.embed_tokens.weight.dtype
    hf = config_to_hf(config, str(stored).removeprefix("torch."))
    write_tensors(directory, items(), max_shard_bytes)
    write_json(directory / "generation_config.json", {**_generation(hf), **(generation or {})})
    write_json(directory / "config.json", hf)


def _generation(hf: dict[str, Any]) -> dict[str, Any]:
    return {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
