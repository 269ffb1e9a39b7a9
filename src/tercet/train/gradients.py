"""Gradients of one optimizer step, by PyTorch's autograd or by the written-out passes for CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tercet.model.transformer import Transformer
from tercet.train.batch import Batch
from tercet.train.loss import losses_of


class Gradients(Protocol):
    """Computes the gradients of one optimizer step."""

    def gradients(self, batches: Sequence[Batch]) -> tuple[float | Tensor, int]:
        """Set every parameter's ``grad`` to the gradient of the mean loss of all ``batches``.

        Returns:
            The mean loss in nats over the supervised tokens, and their number. A loss that is a tensor may
            still be computing on a GPU: ``float`` waits for it.
        """
        ...


class Autograd:
    """Gradients by PyTorch's autograd, for any network on any device."""

    def __init__(self, model: Transformer, z_weight: float = 0.0) -> None:
        self.model, self.z_weight = model, z_weight

    def gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        """Implement `Gradients.gradients`."""
        tokens = sum(batch.supervised for batch in batches)
        for parameter in self.model.parameters():
            parameter.grad = None
        total = torch.zeros((), device=self.model.device)
        for batch in batches:
            if batch.supervised:
                losses = losses_of(self.model, batch, 1 / tokens, self.z_weight)
                losses.total.backward()  # type: ignore[no-untyped-call]
                total += losses.entropy
        return total / max(1, tokens), tokens


def gradients_of(model: Transformer, threads: int, z_weight: float = 0.0) -> Gradients:
    """Return the fastest way to compute the network's gradients: the written-out passes where supported."""
    from tercet.train.cpu.support import supports

    if not supports(model):
        return Autograd(model, z_weight)
    from tercet.train.cpu.step import Stepper

    return Stepper(model, threads, z_weight)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Make gradients on a GPU repeatable: within the block they are summed in a fixed order.

    By default, attention's backward pass sums in the order in which its thread blocks finish.
    """
    if device.type != "cuda":
        yield
        return
    debugging: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), debugging.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    debugging.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        debugging.fill_uninitialized_memory = filled
