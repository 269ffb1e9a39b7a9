"""Load a network from a checkpoint directory, and save it to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tercet.files import write_json
from tercet.model.checkpoint import MAX_SHARD_BYTES, read_config, write_tensors
from tercet.model.config import ModelConfig
from tercet.model.families import FAMILIES, config_to_hf
from tercet.model.gguf_index import holds_gguf
from tercet.model.gguf_tensors import GGUFTensors
from tercet.model.safetensors_file import Item, StoredTensor
from tercet.model.tensor_names import network_tensors, split_rows
from tercet.model.transformer import Transformer
from tercet.model.weights import matched_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trainable: bool = False,
) -> Transformer:
    """Load the network of a checkpoint directory, in evaluation mode.

    Args:
        directory: the checkpoint directory.
        dtype: type of the weights; None: the stored type of each tensor, or for a GGUF file that of its
            matrices, float32 if they are quantised.
        device: where the weights are put.
        trainable: give every weight its own memory. Otherwise weights that need no conversion stay
            mapped to the file, which costs no time or memory, but must not be overwritten in place.

    Raises:
        UserError: a file is missing or damaged, or a tensor is missing, unexpected or of a wrong shape.
    """
    directory = Path(directory)
    config = read_config(directory)
    if holds_gguf(directory):
        state = _dequantised(directory, config, dtype, device, trainable)
    else:
        state = _stored(directory, config, dtype, device, trainable)
    model = without_weights(config)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()
    return model.eval()


def _stored(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
    trainable: bool,
) -> dict[str, Tensor]:
    """Return the weights of safetensors files."""
    state: dict[str, Tensor] = {}
    for rule, tensor in matched_tensors(config, directory):
        mapped = tensor_from(tensor)
        joined = mapped.to(device=device, dtype=dtype or mapped.dtype, copy=trainable)
        if rule.transpose:
            joined = joined.t()
        for part, piece in zip(rule.parts, split_rows(joined, rule.heights, rule.groups), strict=True):
            # Pieces of a tensor share its memory, but an optimizer updates them separately.
            shared = trainable and len(rule.parts) > 1 and piece.is_contiguous()
            state[part.name] = piece.clone() if shared else piece.contiguous()
    return state


def _dequantised(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
    trainable: bool,
) -> dict[str, Tensor]:
    """Return the weights of a GGUF file, all in the type of its matrices if ``dtype`` is None."""
    tensors = GGUFTensors(directory, config)
    kind = dtype or DTYPES[tensors.dtype]  # norms are always stored as float32
    return {
        part.name: torch.from_numpy(np.ascontiguousarray(tensors.values(part.name))).to(
            device=device, dtype=kind, copy=trainable
        )
        for part in network_tensors(config)
    }


def without_weights(config: ModelConfig) -> Transformer:
    """Return a network on the meta device, whose weights are to be assigned."""
    with torch.device("meta"), _WithoutInitialisation():
        return Transformer(config)


def join_rows(parts: list[Tensor], groups: int = 1) -> Tensor:
    """Join tensors into a single one: the inverse of `split_rows`."""
    if len(parts) == 1:
        return parts[0]
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


class _WithoutInitialisation(TorchFunctionMode):
    """Skip random initialisation, which on the meta device has no effect but to import torch's compiler (1.5 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None  # no caller uses the result
        return func(*args, **(kwargs or {}))


def tensor_from(tensor: StoredTensor) -> Tensor:
    """Return the stored tensor, mapped from its file."""
    dtype, data = DTYPES[tensor.dtype], tensor.data
    if data.ctypes.data % dtype.itemsize:  # in older files; a view must be aligned
        data = np.array(data)
    return torch.from_numpy(data).view(dtype).view(tensor.shape)


def save_model(
    model: Transformer,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights, with the names of the model's family.

    Args:
        model: the network.
        directory: the checkpoint directory to write.
        dtype: type of the weights on disk; None: the type of each tensor.
        max_shard_bytes: largest size of a shard's tensors.
        generation: more fields of generation_config.json; they take precedence over the token ids of
            the configuration (every stop id under ``eos_token_id``).

    Raises:
        UserError: the directory can't be written to.
        ValueError: the model has adapters that are not merged.
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
            joined = join_rows(parts, rule.groups)
            joined = (joined.t() if rule.transpose else joined).to("cpu", dtype or joined.dtype).contiguous()
            yield rule.name, DTYPE_NAMES[joined.dtype], tuple(joined.shape), joined.view(torch.uint8).numpy()

    stored = dtype or model.model.embed_tokens.weight.dtype
    hf = config_to_hf(config, str(stored).removeprefix("torch."))
    write_tensors(directory, items(), max_shard_bytes)
    write_json(directory / "generation_config.json", {**_generation(hf), **(generation or {})})
    write_json(directory / "config.json", hf)


def _generation(hf: dict[str, Any]) -> dict[str, Any]:
    return {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
