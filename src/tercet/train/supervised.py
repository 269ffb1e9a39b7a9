"""Supervised training on masked examples: what tuning, and the chat stage of a build, have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tercet.data.batches import Encoded, items_at, micro_batches
from tercet.files import read_json, write_json
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.progress import duration, say
from tercet.train.calibrate import calibrate
from tercet.train.loop import Recipe, Trained, train
from tercet.train.loss import Batch, loss_sum
from tercet.train.schedule import Schedule

T = TypeVar("T")

MARGIN = 1.5  # time planned over time measured: padding, held-out measurements, a machine that has other work
TOKEN_BUDGET = 4096  # tokens in one forward pass; larger steps are accumulated
HELDOUT_SHARE, HELDOUT_MOST = 0.05, 200  # of the examples, where no dev data is given


@dataclass(frozen=True)
class Supervision:
    """How long and how fast to train."""

    epochs: float
    batch_size: int  # examples an optimizer step
    learning_rate: float  # peak, AdamW's
    weight_decay: float = 0.0
    minutes: float | None = None  # fewer steps than the epochs ask for where they would take longer
    seed: int = 0


def full_rate(parameters: int) -> float:
    """Peak AdamW rate for all weights by their number: a power law through what works at both ends.

    4e-3 at 0.6M weights (on builtin:docs-routing dev accuracy was 0.45 at 1e-3 and 0.53 at 4e-3), 1e-5
    at 3B.
    """
    return float(f"{min(4e-3, 4e-3 * (1e6 / parameters) ** 0.75):.2g}")


def hold_out(examples: list[T], seed: int) -> tuple[list[T], list[T]]:
    """Training and held-out examples: a twentieth, at most 200, chosen by ``seed``."""
    count = min(HELDOUT_MOST, round(HELDOUT_SHARE * len(examples)))
    if count < 1:
        say("too few examples to hold any out: the held-out loss is that of the training examples")
        return examples, examples
    held = set(items_at(0, count, len(examples), seed + 1))
    train_part = [example for index, example in enumerate(examples) if index not in held]
    return train_part, [examples[index] for index in sorted(held)]


def fine_tune(
    model: Transformer,
    examples: list[Encoded],
    held: Sequence[Encoded],
    directory: Path,
    asked: Supervision,
    *,
    pad: int,
    key: str,
    title: str,
) -> Trained:
    """Train the weights of ``model`` that require gradients; it is left with those of the lowest held-out loss.

    directory: the plan, the state and the measurements are kept here; an unfinished run found here goes on.
    pad: the token that fills rows up. key: of everything that decides the result.

    Raises:
        UserError, KeyboardInterrupt: as `tercet.train.loop.train`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    batch_size = min(asked.batch_size, len(examples))
    plan = _plan(directory / "plan.json", model, asked, examples, batch_size)
    torch.set_num_threads(plan["threads"])
    model.compute_dtype = getattr(torch, plan["compute_dtype"])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"{title}: {count:,} of {sum(p.numel() for p in model.parameters()):,} weights, {plan['steps']} steps of "
        f"{batch_size} examples, rate {asked.learning_rate:g}, {plan['compute_dtype']}"
    )

    def batches_at(step: int) -> list[Batch]:
        chosen = [examples[index] for index in items_at(step, batch_size, len(examples), asked.seed)]
        return _batches(chosen, pad)

    recipe = Recipe(
        # Measured against 0.9 on builtin:docs-routing: a long plateau gave more than a long cool-down.
        Schedule.of(plan["steps"], warmup=0.06, cooldown=0.3),
        asked.learning_rate,
        weight_decay=asked.weight_decay,
        betas=(0.9, 0.98),
        evaluate_every=max(1, min(math.ceil(len(examples) / batch_size), plan["steps"] // 4)),
        deadline=plan["deadline"],
    )
    trained = train(
        model,
        recipe,
        batches_at,
        directory,
        fingerprint=key,
        title=title,
        evaluate=_heldout(model, held, pad),
        keep_best=True,
    )
    model.compute_dtype = None
    return trained


def ending_with(stops: set[str], tokenizer: Tokenizer, generation: dict[str, Any]) -> dict[str, Any]:
    """``generation`` (a generation config) that also stops at ``stops``: what training ended answers with.

    Without them a model would run on after its answer.
    """
    old = generation.get("eos_token_id")
    ids = [] if old is None else list(old) if isinstance(old, list) else [old]
    ids += [i for token in sorted(stops) if (i := tokenizer.id_of(token)) is not None and i not in ids]
    return {**generation, "eos_token_id": ids if len(ids) != 1 else ids[0]}


def _batches(examples: Sequence[Encoded], pad: int) -> list[Batch]:
    return [
        Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
        for tokens, targets in micro_batches(examples, pad, TOKEN_BUDGET)
    ]


def _plan(
    path: Path, model: Transformer, asked: Supervision, examples: list[Encoded], batch_size: int
) -> dict[str, Any]:
    """Steps, arithmetic and threads; decided once and kept, so that a resumed run repeats them."""
    if path.is_file():
        stored: dict[str, Any] = read_json(path)
        return stored
    mean = sum(len(example.ids) for example in examples) / len(examples)
    # The real size of a step: small ones are slower a token than large ones.
    rows, width = min(batch_size, max(1, round(TOKEN_BUDGET / mean))), max(4, 4 * round(mean / 4))
    speed = calibrate(model, rows, min(width, model.config.max_positions))
    steps = max(1, round(asked.epochs * len(examples) / batch_size))
    deadline = None
    if asked.minutes is not None:
        deadline = 60 * asked.minutes
        affordable = int(deadline / (MARGIN * mean * batch_size / speed.tokens_per_second))
        steps = max(1, min(steps, affordable))
    plan = {
        "steps": steps,
        "deadline": deadline,
        "threads": speed.threads,
        "compute_dtype": speed.compute_dtype,
        "tokens_per_second": speed.tokens_per_second,
    }
    write_json(path, plan)
    estimate = 1.2 * steps * mean * batch_size / speed.tokens_per_second
    say(f"about {duration(estimate)} at {speed.tokens_per_second:,.0f} tokens/s")
    return plan


def _heldout(model: Transformer, held: Sequence[Encoded], pad: int) -> Callable[[], dict[str, float]]:
    """Loss per supervised token over all held-out examples, each token weighing the same."""
    pieces = _batches(held, pad)
    total = sum(piece.supervised for piece in pieces)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            return {"loss": sum(float(loss_sum(model, piece)) for piece in pieces) / total}

    return evaluate
