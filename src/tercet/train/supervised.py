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
from tercet.train.calibrate import Speed, calibrate
from tercet.train.loop import Recipe, Trained, train
from tercet.train.loss import loss_sum
from tercet.train.schedule import Schedule

T = TypeVar("T")

_measured: dict[tuple[Any, ...], Speed] = {}  # of this process

PLAN = "plan.json"
MARGIN = 1.35  # planned over measured time: for padding, held-out evaluations and other work of the machine
TOKEN_BUDGET = 4096  # tokens in one forward pass; larger steps are accumulated
# Backpropagation of one micro-batch cannot be interrupted, so on a slow machine micro-batches are smaller.
MICRO_SECONDS, LEAST_MICRO = 4.0, 256
# Where there is a time limit, held-out evaluations take at most this share of it: examples beyond that are left out.
# An evaluation is a forward pass, about a third of a training step.
EVALUATION_SHARE, FORWARD_SHARE, FEWEST_HELD_OUT = 0.12, 1 / 3, 32
MEASURED_ROWS = 16  # of the steps that are timed; the time of other batch sizes follows
WIDTHS = 16  # tokens between the lengths of timed rows, so that a part of the examples gives the same length as all
EVALUATIONS = 6  # in a run of less than an epoch
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
    patience: int = 0  # held-out evaluations without a lower loss that end the run; 0: none do


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
    plan = _plan(directory / PLAN, model, supervision, examples, len(held_out), batch_size)
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
        return _batches(chosen, plan["micro_tokens"])

    recipe = Recipe(
        # Compared with 0.9 on builtin:docs-routing: a long plateau was better than a long cool-down.
        Schedule.of(plan["steps"], warmup=0.06, cooldown=0.3),
        supervision.learning_rate,
        weight_decay=supervision.weight_decay,
        betas=(0.9, 0.98),
        evaluate_every=plan["evaluate_every"],
        patience=supervision.patience,
        deadline=plan["deadline"],
    )
    trained = train(
        model,
        recipe,
        batches_at,
        directory,
        fingerprint=key,
        title=title,
        evaluate=_heldout_loss(
            model, _sample(held_out, plan["held_out"], supervision.seed), plan["micro_tokens"]
        ),
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


def _batches(examples: Sequence[Encoded], tokens: int) -> list[Batch]:
    return [
        Batch(torch.from_numpy(ids), torch.from_numpy(targets))
        for ids, targets in micro_batches(examples, tokens)
    ]


def _sample(examples: Sequence[Encoded], count: int, seed: int) -> list[Encoded]:
    """Return ``count`` of the examples, in their order, chosen by ``seed``."""
    if count >= len(examples):
        return list(examples)
    return [examples[index] for index in sorted(items_at(0, count, len(examples), seed + 1))]


def measure_speed(model: Transformer, examples: Sequence[Encoded]) -> Speed:
    """Measure optimizer steps with rows of about the examples' mean length.

    `Speed.step_seconds` gives the time of steps of any size. A process measures a network once: a climb plans with
    the speed before it tunes.
    """
    mean = sum(len(example.ids) for example in examples) / len(examples)
    rows, width = (
        max(1, min(MEASURED_ROWS, round(TOKEN_BUDGET / mean))),
        max(4, WIDTHS * round(mean / WIDTHS)),
    )
    width = min(width, model.config.max_positions)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    key = (model.config, str(model.device), trained, rows, width)
    if key not in _measured:
        _measured[key] = calibrate(model, rows, width)
    return _measured[key]


def affordable_steps(speed: Speed, tokens: float, minutes: float) -> int:
    """Return how many steps of a number of tokens fit into a time, evaluations and padding included."""
    return int(60 * minutes / (MARGIN * speed.step_seconds(tokens)))


def _plan(
    path: Path,
    model: Transformer,
    supervision: Supervision,
    examples: list[Encoded],
    held_out: int,
    batch_size: int,
) -> dict[str, Any]:
    """Return steps, deadline, type and threads; stored at ``path``, so that a resumed run repeats them."""
    if path.is_file():
        stored: dict[str, Any] = read_json(path)
        return stored
    mean = sum(len(example.ids) for example in examples) / len(examples)
    speed = measure_speed(model, examples)
    epoch = math.ceil(len(examples) / batch_size)
    whole = max(1, round(supervision.epochs * len(examples) / batch_size))
    steps, deadline = whole, None
    if supervision.minutes is not None:
        deadline = 60 * supervision.minutes
        steps = max(1, min(whole, affordable_steps(speed, mean * batch_size, supervision.minutes)))
    evaluate_every = max(1, min(epoch, steps // (EVALUATIONS if steps < epoch else 4)))
    if deadline is not None:
        evaluations = math.ceil(steps / evaluate_every)
        forward = (
            FORWARD_SHARE
            * max(speed.step_seconds(mean * batch_size) - speed.fixed_seconds, 1e-9)
            / batch_size
        )
        affordable = int(EVALUATION_SHARE * deadline / (evaluations * forward))
        held_out = min(held_out, max(FEWEST_HELD_OUT, affordable))
    micro_tokens = TOKEN_BUDGET
    if model.device.type == "cpu":
        micro_tokens = min(
            TOKEN_BUDGET, max(LEAST_MICRO, 64 * round(MICRO_SECONDS * speed.tokens_per_second / 64))
        )
    plan = {
        "steps": steps,
        "whole_steps": whole,
        "deadline": deadline,
        "threads": speed.threads,
        "compute_dtype": speed.compute_dtype,
        "tokens_per_second": speed.tokens_per_second,
        "seconds_per_step": round(speed.step_seconds(mean * batch_size), 4),
        "evaluate_every": evaluate_every,
        "held_out": held_out,
        "micro_tokens": micro_tokens,
    }
    write_json(path, plan)
    estimate = 1.2 * steps * speed.step_seconds(mean * batch_size)
    say(f"about {duration(estimate)} at {speed.tokens_per_second:,.0f} tokens/s")
    return plan


def _heldout_loss(
    model: Transformer, held_out: Sequence[Encoded], micro_tokens: int
) -> Callable[[], dict[str, float]]:
    """Return a function that measures the mean loss over all supervised tokens of the held-out examples."""
    batches = _batches(held_out, micro_tokens)
    tokens = sum(batch.supervised for batch in batches)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            return {"loss": sum(float(loss_sum(model, batch)) for batch in batches) / tokens}

    return evaluate
