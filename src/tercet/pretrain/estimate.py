"""Estimate shape, time, memory, cost and loss of a build before it is run."""

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
from tercet.pretrain.scaling import Law, Point, fit, store_law, stored_law
from tercet.pretrain.settings import BuildSettings, EstimateSettings
from tercet.progress import say
from tercet.settings import keyword_form

FRACTIONS = (1 / 48, 1 / 24, 1 / 12, 1 / 6)  # of the budget: a third of its time in all


@dataclass(frozen=True)
class Estimate:
    """A planned run."""

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
    tokens_per_second: float  # on this machine
    seconds: float  # of training on this machine
    memory_bytes: int  # peak of the process
    bits_per_byte: float | None  # None: no scaling law is known for this corpus
    corpus_bytes: int
    corpus_complete: bool  # False: reading stopped when there was enough text for the run
    passes: float  # epochs, roughly; below one where the corpus was not read to its end
    rules: list[dict[str, Any]]
    hardware: list[dict[str, Any]]  # name, seconds of training, cost where a price is known
    law: dict[str, Any] | None


def estimate_with(settings: EstimateSettings) -> Estimate:
    """Estimate a build before it is made: shape, tokens, time, memory, cost and expected loss.

    Measures this machine for a few seconds and reads as much of the corpus as the build would. With ``fit``,
    trains four tiny models on budgets of 1/48 to 1/6 of the requested one and fits a scaling law, which is
    stored for this corpus.

    Raises:
        UserError: Bad data or settings, or runs to which no law can be fitted.
    """
    plan = make_plan(settings)
    config = network(plan.layers, plan.width, plan.vocab_size, plan.context)
    flops = 6.0 * config.matmul_parameters * plan.tokens
    law = stored_law(law_key(settings))
    if settings.fit:
        law = _fit_law(settings, flops, reading_limit(plan, settings))
    corpus_bytes, complete = _corpus_bytes(settings, plan)
    prices = settings.prices or {}
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
        corpus_bytes=corpus_bytes,
        corpus_complete=complete,
        passes=plan.tokens * PLANNED_BYTES_PER_TOKEN / max(1, corpus_bytes),
        rules=[vars(rule) for rule in plan.rules],
        hardware=[
            {
                "name": hardware.name,
                "seconds": hardware.seconds(flops),
                "cost": None if key not in prices else hardware.seconds(flops) / 3600 * prices[key],
            }
            for key, hardware in HARDWARE.items()
        ],
        law=None
        if law is None
        else {"floor": law.floor, "scale": law.scale, "exponent": law.exponent, "error": law.error},
    )


def _corpus_bytes(settings: EstimateSettings, plan: Plan) -> tuple[int, bool]:
    """Count the bytes of text up to the run's limit, and say whether that is the whole corpus."""
    limit = reading_limit(plan, settings)
    count = 0
    for document in read_documents(settings.sources, allow_partial=settings.allow_partial):
        count += len(document.text.encode())
        if count >= limit:
            return count, False
    return count, True


def _parameters(config: ModelConfig) -> int:
    with torch.device("meta"):  # no memory: the parameters are only counted
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def _fit_law(settings: EstimateSettings, flops: float, read_bytes: int) -> Law:
    """Fit and store a law from tiny runs.

    They read the text of the large run, so that all of them hold out, and are measured on, the same text.
    """
    points = []
    for number, fraction in enumerate(FRACTIONS, start=1):
        say(f"tiny run {number} of {len(FRACTIONS)}: {fraction * flops:.2g} operations")
        with tempfile.TemporaryDirectory() as directory:
            tiny = BuildSettings(
                settings.sources,
                Path(directory) / "run",
                flops=fraction * flops,
                read_bytes=read_bytes,
                context=settings.context,
                optimizer=settings.optimizer,
                seed=settings.seed,
            )
            built = pretrain(tiny)
        points.append(Point(6.0 * built.matmul_parameters * built.tokens, built.bits_per_byte))
    law = fit(points)
    store_law(law_key(settings), law)
    return law


estimate = keyword_form(EstimateSettings, estimate_with, "estimate")
