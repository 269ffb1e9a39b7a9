"""LoRA adapters beside a network's layers, each applied to the rows of a pass that ask for it."""

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
    """Hooks on the layers that an adapter changes; a network without adapters has none.

    Both small matrices are float32 and so are their products, whatever the network computes in.
    """

    def __init__(self, model: Transformer) -> None:
        self._model, self._count = model, 0
        self._matrices: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # of each layer by adapter
        self._rows: dict[int, Tensor | None] = {}  # of the pass that is computed, by adapter; None: all

    def add(self, updates: Mapping[str, Update]) -> int:
        """Keep what an adapter adds to each of our modules; its number, from 1 on."""
        self._count += 1
        for name, update in updates.items():
            if name not in self._matrices:
                mine = self._matrices[name] = {}
                self._model.get_submodule(name).register_forward_hook(self._hook(mine))
            scaled = np.float32(update.scaling) * update.b
            self._matrices[name][self._count] = self._tensor(update.a), self._tensor(scaled)
        return self._count

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._model.device)

    @contextmanager
    def chosen(self, adapters: Sequence[int]) -> Iterator[None]:
        """What is computed inside has for each row its adapter, 0: none."""
        for adapter in set(adapters) - {0}:
            rows = [row for row, one in enumerate(adapters) if one == adapter]
            whole = len(rows) == len(adapters)
            self._rows[adapter] = None if whole else torch.tensor(rows, device=self._model.device)
        try:
            yield
        finally:
            self._rows = {}

    def _hook(self, matrices: Mapping[int, tuple[Tensor, Tensor]]) -> Any:
        def change(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            """The layer's output [rows, T, out] with B (A x) added."""
            for adapter, rows in self._rows.items():
                if adapter not in matrices:
                    continue
                a, b = matrices[adapter]
                x = inputs[0] if rows is None else inputs[0][rows]
                added = F.linear(F.linear(x.float(), a), b).to(output.dtype)
                output = output + added if rows is None else output.index_add(0, rows, added)
            return output

        return change
