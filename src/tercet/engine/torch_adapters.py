"""LoRA adapters beside a network's layers, each applied to the rows of a pass that request it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.model.transformer import Transformer
from tercet.model.weights import Floats, Update


class Adapters:
    """Forward hooks on the layers that adapters change; a network without adapters has no hooks.

    Both small matrices and their products are float32, whatever the dtype of the network.
    """

    def __init__(self, model: Transformer) -> None:
        self._model, self._count = model, 0
        self._matrices: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # of each layer by adapter
        self._rows: dict[int, Tensor | None] = {}  # of the present pass, by adapter; None for all rows

    def add(self, updates: Mapping[str, Update]) -> int:
        """Load the updates of an adapter, by module; return the adapter's number, from 1 on."""
        self._count += 1
        for name, update in updates.items():
            if name not in self._matrices:
                matrices = self._matrices[name] = {}
                self._model.get_submodule(name).register_forward_hook(self._hook(matrices))
            scaled = np.float32(update.scaling) * update.b
            self._matrices[name][self._count] = self._tensor(update.a), self._tensor(scaled)
        return self._count

    def _tensor(self, values: Floats) -> Tensor:
        """Return the values on the network's device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._model.device)

    @contextmanager
    def chosen(self, adapters: Sequence[int]) -> Iterator[None]:
        """Apply ``adapters[n]`` to row n of the pass that is computed in this context; 0 for none."""
        for adapter in set(adapters) - {0}:
            rows = [row for row, number in enumerate(adapters) if number == adapter]
            whole = len(rows) == len(adapters)
            self._rows[adapter] = None if whole else torch.tensor(rows, device=self._model.device)
        try:
            yield
        finally:
            self._rows = {}

    def _hook(self, matrices: Mapping[int, tuple[Tensor, Tensor]]) -> Any:
        """Return a hook that adds the products of a layer's matrices, by adapter."""

        def change(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            """Return the layer's output [rows, T, out] with B (A x) added."""
            for adapter, rows in self._rows.items():
                if adapter not in matrices:
                    continue
                a, b = matrices[adapter]
                x = inputs[0] if rows is None else inputs[0][rows]
                added = F.linear(F.linear(x.float(), a), b).to(output.dtype)
                output = output + added if rows is None else output.index_add(0, rows, added)
            return output

        return change
