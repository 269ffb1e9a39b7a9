"""Estimate what tuning costs on this machine, before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tercet.data.examples import prepare
from tercet.finetune.inputs import token_limit
from tercet.finetune.settings import Method
from tercet.finetune.sft import DEFAULT_RANK
from tercet.model.adapter import AdapterConfig, add_lora
from tercet.model.device import find_device
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer
from tercet.train.calibrate import Speed
from tercet.train.supervised import affordable_steps, measure_speed

FEWEST_STEPS, SMALLEST_BATCH = 60, 4


@dataclass(frozen=True)
class Estimate:
    """The speed of tuning a model on some rows with one method.

    Attributes:
        speed: of optimizer steps.
        tokens: of an example, on average.
        examples: number of examples.
    """

    speed: Speed
    tokens: float
    examples: int

    def steps(self, minutes: float, batch_size: int) -> int:
        """Return the steps of a batch size that fit into a time."""
        return affordable_steps(self.speed, self.tokens * batch_size, minutes)

    def batch_size(self, minutes: float, largest: int = 16) -> int:
        """Return the batch size for a time: the largest that gives at least `FEWEST_STEPS` steps, but not below 4.

        Where there is time for a few large steps only, more and smaller ones lower the loss farther.
        """
        size = largest
        while size > SMALLEST_BATCH and self.steps(minutes, size) < FEWEST_STEPS:
            size //= 2
        return size

    def minutes(self, epochs: float, batch_size: int) -> float:
        """Return the time that a number of epochs takes."""
        steps = epochs * self.examples / batch_size
        return steps / max(self.steps(1000.0, batch_size), 1) * 1000.0


def estimate(
    model: Path,
    rows: Sequence[dict[str, Any]],
    method: Method,
    *,
    examples: int | None = None,
    rank: int = DEFAULT_RANK,
) -> Estimate:
    """Measure some optimizer steps on rows of the mean length.

    Args:
        model: directory of the checkpoint.
        rows: as for `tercet.tune`; a part of them is enough.
        method: "lora" or "full".
        examples: the number of all rows; None: of those given.
        rank: of the adapter.

    Raises:
        UserError: bad rows, or a model that cannot be loaded.
    """
    tokenizer = Tokenizer.load(model)
    limit = token_limit(model, None)
    encoded = prepare(list(rows), tokenizer, limit, "truncate").examples
    network = load_model(model, dtype=torch.float32, trainable=True)
    if method == "lora":
        adapter = AdapterConfig(r=rank, alpha=2 * rank, use_rslora=False, base_model=str(model))
        add_lora(network, adapter, 0)
    network.to(find_device(None))
    speed = measure_speed(network, encoded)
    mean = sum(len(example.ids) for example in encoded) / len(encoded)
    return Estimate(speed, mean, examples or len(encoded))
