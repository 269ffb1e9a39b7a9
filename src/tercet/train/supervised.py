"""Supervised training on masked examples, for fine-tuning and for the chat stage of a build."""

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
from tercet.train.batch import Batch
from tercet.train.calibrate import calibrate
from tercet.train.loop import Recipe, Trained, train
from tercet.train.loss import loss_sum
from tercet.train.schedule import Schedule

T = TypeVar("T")

MARGIN = 1.5  # planned over measured time: for padding, held-out evaluations and other work of the machine
TOKEN_BUDGET = 4096  # tokens in one forward pass; larger steps are accumulated
HELDOUT_SHARE, HELDOUT_LIMIT = 0.05, 200  # of the examples, where there is no dev data


@dataclass(frozen=True)
class Supervision:
    """The length of training and its learning rate."""

    epochs: float
    batch_size: int  # examples in an optimizer step
    learning_rate: float  # peak, AdamW's
    weight_decay: float = 0.0
    minutes: float | None = None  # time limit: fewer steps where the epochs would take longer
    seed: int = 0


def full_rate(parameters: int) -> float:
    """Return the peak AdamW rate for training all weights, by their number.

    A power law through a rate that works for small models, 4e-3 at 0.6M weights (on builtin:docs-routing, dev
    accuracy was 0.45 at 1e-3 and 0.53 at 4e-3), and one for large models, 1e-5 at 3B.
    """
    return float(f"{min(4e-3, 4e-3 * (1e6 / parameters) ** 0.75):.2g}")


def hold_out(examples: list[T], seed: int) -> tuple[list[T], list[T]]:
    """Return training and held-out examples; a twentieth, at most 200, is held out, chosen by ``seed``."""
    count = min(HELDOUT_LIMIT, round(HELDOUT_SHARE * len(examples)))
    if count < 1:
        say("too few examples for a held-out part: the held-out loss is measured on the training examples")
        return examples, examples
    chosen = set(items_at(0, count, len(examples), seed + 1))
    train_part = [example for index, example in enumerate(examples) if index not in chosen]
    return train_part, [examples[index] for index in sorted(chosen)]


def fine_tune(
    model: Transformer,
    examples: list[Encoded],
    held_out: Sequence[Encoded],
    directory: Path,
    supervision: Supervision,
    *,
    key: str,
    title: str,
) -> Trained:
    """Train the weights of ``model`` that require gradients; it ends with those of the lowest held-out loss.

    Args:
        model: The network.
        examples: Training examples.
        held_out: Held-out examples.
        directory: Holds the plan, the state and the metrics; an unfinished run found here is resumed.
        supervision: The length of training and its learning rate.
        key: A fingerprint of everything that determines the result.
        title: Names the run in progress lines and messages.

    Raises:
        UserError: As `tercet.train.loop.train`.
        KeyboardInterrupt: As `tercet.train.loop.train`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    batch_size = min(supervision.batch_size, len(examples))
    plan = _plan(directory / "plan.json", model, supervision, examples, batch_size)
    torch.set_num_threads(plan["threads"])
    model.compute_dtype = getattr(torch, plan["compute_dtype"])
    parameters = sum(p.numel() for p in model.parameters())
    trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"{title}: {trainable_parameters:,} of {parameters:,} weights, {plan['steps']} steps of {batch_size} "
        f"examples, peak learning rate {supervision.learning_rate:g}, {plan['compute_dtype']}"
    )

    def batches_at(step: int) -> list[Batch]:
        chosen = [examples[index] for index in items_at(step, batch_size, len(examples), supervision.seed)]
        return _batches(chosen)

    recipe = Recipe(
        # Compared with 0.9 on builtin:docs-routing: a long plateau was better than a long cool-down.
        Schedule.of(plan["steps"], warmup=0.06, cooldown=0.3),
        supervision.learning_rate,
        weight_decay=supervision.weight_decay,
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
        evaluate=_heldout_loss(model, held_out),
        keep_best=True,
    )
    model.compute_dtype = None
    return trained


def ending_with(stops: set[str], tokenizer: Tokenizer, generation: dict[str, Any]) -> dict[str, Any]:
    """Return the generation config ``generation`` with the stop tokens ``stops`` added.

    These tokens ended the training answers; without them a model would continue after its answer.
    """
    old = generation.get("eos_token_id")
    ids = [] if old is None else list(old) if isinstance(old, list) else [old]
    ids += [i for token in sorted(stops) if (i := tokenizer.id_of(token)) is not None and i not in ids]
    return {**generation, "eos_token_id": ids if len(ids) != 1 else ids[0]}


def _batches(examples: Sequence[Encoded]) -> list[Batch]:
    return [
        Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
        for tokens, targets in micro_batches(examples, TOKEN_BUDGET)
    ]


def _plan(
    path: Path, model: Transformer, supervision: Supervision, examples: list[Encoded], batch_size: int
) -> dict[str, Any]:
    """Return steps, deadline, type and threads; stored at ``path``, so that a resumed run repeats them."""
    if path.is_file():
        stored: dict[str, Any] = read_json(path)
        return stored
    mean = sum(len(example.ids) for example in examples) / len(examples)
    # Measure steps of the real size: small steps take longer per token than large ones.
    rows, width = min(batch_size, max(1, round(TOKEN_BUDGET / mean))), max(4, 4 * round(mean / 4))
    speed = calibrate(model, rows, min(width, model.config.max_positions))
    steps = max(1, round(supervision.epochs * len(examples) / batch_size))
    deadline = None
    if supervision.minutes is not None:
        deadline = 60 * supervision.minutes
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


def _heldout_loss(model: Transformer, held_out: Sequence[Encoded]) -> Callable[[], dict[str, float]]:
    """Return a function that measures the mean loss over all supervised tokens of the held-out examples."""
    batches = _batches(held_out)
    tokens = sum(batch.supervised for batch in batches)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            return {"loss": sum(float(loss_sum(model, batch)) for batch in batches) / tokens}

    return evaluate
