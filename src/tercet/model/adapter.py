"""LoRA: trainable low-rank matrices beside frozen weights, in PEFT's file format.

A PEFT adapter is a directory with ``adapter_config.json`` and ``adapter_model.safetensors``. Its
tensors are ``base_model.model.MODULE.lora_A.weight`` [r, in] and ``….lora_B.weight`` [out, r], where
MODULE is Hugging Face's name. If a module of Hugging Face is several modules here (GPT-2's c_attn), the
parts share A and divide the rows of B. When they are saved, their A are stacked and their B are placed
on a block diagonal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from tercet.files import write_atomic
from tercet.model.adapter_config import (
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    adapted_modules,
    is_adapter,
    read_adapter_config,
)
from tercet.model.families import FAMILIES
from tercet.model.loading import join_rows
from tercet.model.safetensors_file import Item, write_safetensors
from tercet.model.transformer import Linear, Transformer
from tercet.model.weights import read_adapter

Value = TypeVar("Value")

__all__ = [
    "AdapterConfig",
    "LoRALinear",
    "add_lora",
    "freeze_base",
    "is_adapter",
    "load_adapter",
    "merge_lora",
    "read_adapter_config",
    "save_adapter",
]


class LoRALinear(nn.Module):
    """``base(x) + scaling * B(A(x))``. A [r, in] and B [out, r] are float32, whatever the base's type is."""

    def __init__(self, base: Linear, r: int, scaling: float) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.lora_A = Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for ``x`` [..., in]."""
        return cast(Tensor, self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling)

    def merged(self) -> Linear:
        """Add the product to the base in float32, round once, and return the base."""
        with torch.no_grad():
            change = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling
            # A new tensor: the old one may be mapped to a file.
            self.base.weight = nn.Parameter((self.base.weight.float() + change).to(self.base.weight.dtype))
        return self.base


def add_lora(model: Transformer, config: AdapterConfig, seed: int) -> None:
    """Put an adapter beside each chosen layer and freeze all other weights.

    A is Kaiming-uniform with a = sqrt(5), as in PEFT, which is uniform within 1 / sqrt(in). B is
    zero, so the model's outputs are unchanged. The same seed gives the same adapter.

    Raises:
        UserError: ``config.target_modules`` matches no layer, or matches an embedding or the head.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in _wrap(model, config).values():
            bound = layer.lora_A.in_features**-0.5
            values = torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            layer.lora_A.weight.copy_(values)
            layer.lora_B.weight.zero_()
    freeze_base(model)


def _wrap(model: Transformer, config: AdapterConfig) -> dict[str, LoRALinear]:
    """Replace the chosen layers and return the new ones by name. Their matrices are not initialised yet."""
    if lora_layers(model):
        raise ValueError("the model already has an adapter; merge it before adding another")
    wrapped = {}
    for theirs, ours in adapted_modules(config, model.config).items():
        r, alpha = config.rank_and_alpha(theirs)
        for name in ours:
            parent, _, leaf = name.rpartition(".")
            layer = LoRALinear(cast(Linear, model.get_submodule(name)), r, config.scaling(r, alpha))
            setattr(model.get_submodule(parent), leaf, layer)
            wrapped[name] = layer
    return wrapped


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    """Return the adapted layers by their module name in the network."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def freeze_base(model: Transformer) -> None:
    """Make only the adapters' matrices trainable."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def merge_lora(model: Transformer) -> None:
    """Add every adapter to its base. The model has ordinary layers again, and all its weights are trainable."""
    for name, layer in lora_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.merged())
    model.requires_grad_(True)


# Files


def save_adapter(model: Transformer, directory: str | Path, config: AdapterConfig) -> None:
    """Write the model's adapter as a PEFT directory.

    Raises:
        UserError: the directory can't be written to.
        ValueError: the model has no adapter.
    """
    directory = Path(directory)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to save")
    items: list[Item] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    modules = _modules(model)
    for theirs, ours in modules.items():
        parts = [cast(Linear | LoRALinear, model.get_submodule(name)) for name in ours]
        if not any(isinstance(part, LoRALinear) for part in parts):
            continue
        a, b, scaling = _fuse(parts, _groups(model, parts))
        ranks[theirs], alphas[theirs] = a.shape[0], config.alpha_for(a.shape[0], scaling)
        for letter, matrix in (("A", a), ("B", b)):
            data = matrix.detach().to("cpu", torch.float32).contiguous()
            name = f"base_model.model.{theirs}.lora_{letter}.weight"
            items.append((name, "F32", tuple(data.shape), data.view(torch.uint8).numpy()))
    transposed = any(rule.transpose for rule in FAMILIES[model.config.family].tensors(model.config))
    content = {
        "alpha_pattern": _by_end(
            {name: a for name, a in alphas.items() if a != config.whole_alpha}, list(ranks)
        ),
        "base_model_name_or_path": config.base_model,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.whole_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": _by_end({name: r for name, r in ranks.items() if r != config.r}, list(ranks)),
        "revision": config.revision,
        "target_modules": sorted(_by_end(dict.fromkeys(ranks, 0), list(modules))),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    write_safetensors(directory / WEIGHTS, items)
    write_atomic(directory / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _modules(model: Transformer) -> dict[str, tuple[str, ...]]:
    return adapted_modules(AdapterConfig(), model.config)


def _groups(model: Transformer, parts: Sequence[nn.Module]) -> int:
    """Return the number of groups in which a joined layer holds the rows of its parts (see `TensorRule`)."""
    by_head = FAMILIES[model.config.family].names.by_head and len(parts) > 1
    return model.config.num_heads if by_head else 1


def _by_end(values: dict[str, Value], modules: list[str]) -> dict[str, Value]:
    """Shorten module names to their last part if all ``modules`` with that ending have the same value."""
    missing = object()
    short: dict[str, Value] = {}
    for name, value in values.items():
        end = name.rpartition(".")[2]
        alike = all(
            values.get(other, missing) == value for other in modules if other.rpartition(".")[2] == end
        )
        short[end if alike else name] = value
    return short


def _fuse(parts: list[Linear | LoRALinear], groups: int) -> tuple[Tensor, Tensor, float]:
    """Return a single A [r, in], B [out, r] and scaling with the same effect as the parts together.

    Parts that share A keep it; otherwise r is the sum of their ranks. Parts without an adapter get zeros.
    """
    adapted = [part for part in parts if isinstance(part, LoRALinear)]
    scaling, a = adapted[0].scaling, adapted[0].lora_A.weight.detach()
    shared = all(part.scaling == scaling and torch.equal(part.lora_A.weight, a) for part in adapted)
    if not shared:
        a = torch.cat([part.lora_A.weight.detach() for part in adapted])
    blocks, column = [], 0
    for part in parts:
        if isinstance(part, LoRALinear):
            block = a.new_zeros(part.base.out_features, a.shape[0])
            r = part.lora_A.out_features
            block[:, column : column + r] = part.lora_B.weight.detach() * (part.scaling / scaling)
            column += 0 if shared else r
        else:
            block = a.new_zeros(part.out_features, a.shape[0])
        blocks.append(block)
    return a, join_rows(blocks, groups), scaling


def load_adapter(model: Transformer, directory: str | Path) -> AdapterConfig:
    """Put a stored adapter on its base model and freeze all other weights.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unexpected or of a wrong shape,
            or the configuration is not supported.
    """
    config, updates = read_adapter(directory, model.config)
    with torch.no_grad():
        for name, layer in _wrap(model, config).items():
            layer.lora_A.weight.copy_(torch.from_numpy(np.ascontiguousarray(updates[name].a)))
            layer.lora_B.weight.copy_(torch.from_numpy(np.ascontiguousarray(updates[name].b)))
    freeze_base(model)
    return config
