"""What a run would be and take, before it is made."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tercet.data.documents import read_documents
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.pretrain.hardware import HARDWARE
from tercet.pretrain.plan import network
from tercet.pretrain.planning import PLANNED_BYTES_PER_TOKEN, Plan, law_key, make_plan, reading_limit
from tercet.pretrain.pretrain import pretrain
from tercet.pretrain.scaling import Law, Point, fit, keep, remembered
from tercet.pretrain.settings import BuildSettings, EstimateSettings
from tercet.progress import say
from tercet.settings import keyword_form

FRACTIONS = (1 / 48, 1 / 24, 1 / 12, 1 / 6)  # of the budget: a third of its time in all


@dataclass(frozen=True)
class Estimate:
    """A planned run. seconds: of training on this machine; memory: the peak of the process."""

    layers: int
    width: int
    vocab_size: int
    context: int
    parameters: int
    matmul_parameters: int
    tokens: int
    steps: int
    step_tokens: int
    flops: float
    tokens_per_second: float
    seconds: float
    memory_bytes: int
    bits_per_byte: float | None  # None: no scaling law is known for this corpus
    corpus_bytes: int
    corpus_complete: bool  # False: reading stopped when there was enough for the run
    passes: float  # over the corpus, roughly; under one where it was not read to its end
    rules: list[dict[str, Any]]
    hardware: list[dict[str, Any]]  # name, seconds there, cost where a price was given
    law: dict[str, Any] | None


def estimate_with(asked: EstimateSettings) -> Estimate:
    """Estimate a build before it is made: shape, tokens, time, memory, cost and expected loss.

    Measures this machine for a few seconds and reads as much of the corpus as the build would. With ``fit``,
    trains four tiny models on budgets of 1/48 to 1/6 of the requested one and fits a scaling law, which is
    kept for this corpus.

    Raises:
        UserError: bad data or settings, or runs to which no law can be fitted.
    """
    plan = make_plan(asked)
    config = network(plan.layers, plan.width, plan.vocab_size, plan.context)
    flops = 6.0 * config.matmul_parameters * plan.tokens
    law = remembered(law_key(asked))
    if asked.fit:
        law = _fitted(asked, flops, reading_limit(plan, asked))
    size, complete = _size(asked, plan)
    prices = asked.prices or {}
    return Estimate(
        layers=plan.layers,
        width=plan.width,
        vocab_size=plan.vocab_size,
        context=plan.context,
        parameters=_parameters(config),
        matmul_parameters=config.matmul_parameters,
        tokens=plan.tokens,
        steps=plan.steps,
        step_tokens=plan.rows * plan.context,
        flops=flops,
        tokens_per_second=plan.speed["tokens_per_second"],
        seconds=plan.predicted["seconds"],
        memory_bytes=plan.predicted["memory_bytes"],
        bits_per_byte=None if law is None else law.predict(flops),
        corpus_bytes=size,
        corpus_complete=complete,
        passes=plan.tokens * PLANNED_BYTES_PER_TOKEN / max(1, size),
        rules=[vars(rule) for rule in plan.rules],
        hardware=[
            {
                "name": one.name,
                "seconds": one.seconds(flops),
                "cost": None if key not in prices else one.seconds(flops) / 3600 * prices[key],
            }
            for key, one in HARDWARE.items()
        ],
        law=None
        if law is None
        else {"floor": law.floor, "scale": law.scale, "exponent": law.exponent, "error": law.error},
    )


def _size(asked: EstimateSettings, plan: Plan) -> tuple[int, bool]:
    """Bytes of text, counted until there are enough for the run; and whether that was all."""
    enough = reading_limit(plan, asked)
    size = 0
    for document in read_documents(asked.sources):
        size += len(document.text.encode())
        if size >= enough:
            return size, False
    return size, True


def _parameters(config: ModelConfig) -> int:
    with torch.device("meta"):  # counted, not made
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def _fitted(asked: EstimateSettings, flops: float, read_bytes: int) -> Law:
    """From tiny runs that read the text of the large one: what each holds out, and is measured on, is the same."""
    points = []
    for number, fraction in enumerate(FRACTIONS, start=1):
        say(f"tiny run {number} of {len(FRACTIONS)}: {fraction * flops:.2g} operations")
        with tempfile.TemporaryDirectory() as directory:
            tiny = BuildSettings(
                asked.sources,
                Path(directory) / "run",
                flops=fraction * flops,
                read_bytes=read_bytes,
                context=asked.context,
                optimizer=asked.optimizer,
                seed=asked.seed,
            )
            made = pretrain(tiny)
        points.append(Point(6.0 * made.matmul_parameters * made.tokens, made.bits_per_byte))
    law = fit(points)
    keep(law_key(asked), law)
    return law


estimate = keyword_form(EstimateSettings, estimate_with, "estimate")
