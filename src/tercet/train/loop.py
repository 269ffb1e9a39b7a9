"""The training loop that every level shares: steps, schedule, checkpoints, resume.

A run is a pure function of its seed, data and thread count: batches come from the step number, so
that a run killed at any moment and started again ends bit for bit as if it had not been killed.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tercet.errors import UserError
from tercet.files import write_jsonl
from tercet.model.transformer import Transformer
from tercet.progress import Progress, say
from tercet.train.loss import Batch, loss_sum
from tercet.train.schedule import Schedule
from tercet.train.state import Progressed, load_progress, load_tensors, save_state, trainable

STATE = "state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """How to train. Rates and counts are per optimizer step."""

    schedule: Schedule
    learning_rate: float
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm
    evaluate_every: int = 0  # steps between held-out measurements; 0: at the end only
    save_seconds: float = 20.0  # a checkpoint this often: what a kill can cost
    deadline: float | None = None  # seconds of training; a slow machine cools down early to meet it


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    steps: int
    tokens: int
    seconds: float
    best: float | None
    best_step: int
    history: list[dict[str, Any]]
    shortened: bool  # a deadline cut the schedule, so the clock had a say in the result

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def make_optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); norms, biases and embeddings are not decayed."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and "embed" not in name

    groups = [
        {"params": [p for n, p in parameters.items() if decays(n, p)], "weight_decay": recipe.weight_decay},
        {"params": [p for n, p in parameters.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def train(
    model: Transformer,
    recipe: Recipe,
    batches_at: Callable[[int], Sequence[Batch]],
    directory: Path,
    *,
    fingerprint: str,
    title: str,
    evaluate: Callable[[], dict[str, float]] | None = None,
    keep_best: bool = False,
) -> Trained:
    """Train ``model`` in place and leave it with the final (or best) weights.

    batches_at: the pieces of optimizer step n, from 0; gradients are weighted by token.
    directory: `state.safetensors` and `metrics.jsonl` are kept here; an unfinished run found here goes on.
    fingerprint: of everything that decides the result; a state with another one is refused.
    evaluate: held-out measurements; its ``loss`` decides which weights are best.

    Raises:
        UserError: another run's state is in ``directory``, the disk is full, or the loss is not finite.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the state has been saved.
    """
    state = directory / STATE
    # In the optimizer's order, decayed ones first, which its saved moments are numbered by.
    parameters = trainable(model)
    parameters = dict(sorted(parameters.items(), key=lambda item: item[1].dim() < 2 or "embed" in item[0]))
    optimizer = make_optimizer(parameters, recipe)
    progressed = load_progress(state, fingerprint)
    best: dict[str, Tensor] | None = None
    schedule = recipe.schedule
    if progressed is None:
        progressed = Progressed(fingerprint, steps=schedule.steps, cooldown=schedule.cooldown)
        write_jsonl(directory / "metrics.jsonl", [])
    else:
        best = load_tensors(state, parameters, optimizer)
        schedule = replace(schedule, steps=progressed.steps, cooldown=progressed.cooldown)
        # Lines written after the checkpoint describe steps that will be taken again.
        write_jsonl(directory / "metrics.jsonl", _rows_until(directory / "metrics.jsonl", progressed.step))
        if not progressed.done:
            say(f"{title}: going on from step {progressed.step} of {progressed.steps}")

    model.train()
    begun = saved = time.monotonic()
    before = progressed.seconds
    with (
        _stop_signals() as stop,
        (directory / "metrics.jsonl").open("a", encoding="utf-8") as metrics,
        Progress(title, schedule.steps, "steps", done=progressed.step) as bar,
    ):
        while not progressed.done:
            step = progressed.step
            rate = recipe.learning_rate * schedule.rate(step)
            loss, tokens, norm = _step(model, parameters, optimizer, batches_at(step), rate, recipe.clip)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise UserError(
                    f"the loss is {loss} at step {step + 1} (gradient norm {norm}); the last good state is in "
                    f"{state}; start again with a lower learning rate"
                )
            progressed.step, progressed.tokens = step + 1, progressed.tokens + tokens
            progressed.seconds = before + time.monotonic() - begun
            row = {
                "step": step + 1,
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": rate,
                "tokens": progressed.tokens,
                "seconds": round(progressed.seconds, 3),
            }
            if schedule.steps > progressed.step and recipe.deadline is not None:
                schedule = _meet_deadline(schedule, progressed, recipe.deadline, title)
                progressed.steps, progressed.cooldown = schedule.steps, schedule.cooldown
                bar.total = schedule.steps
            progressed.done = progressed.step >= schedule.steps
            every = recipe.evaluate_every
            if evaluate is not None and (progressed.done or (every and progressed.step % every == 0)):
                measured = evaluate()
                model.train()
                row.update({f"heldout_{key}": value for key, value in measured.items()})
                progressed.history.append({"step": progressed.step, "tokens": progressed.tokens, **measured})
                if progressed.best is None or measured["loss"] < progressed.best:
                    progressed.best, progressed.best_step = measured["loss"], progressed.step
                    if keep_best:
                        best = {name: value.detach().clone() for name, value in parameters.items()}
            metrics.write(json.dumps(row) + "\n")
            bar.advance(1, f"loss {loss:.3f}")
            if progressed.done or stop.is_set() or time.monotonic() - saved > recipe.save_seconds:
                metrics.flush()
                progressed.seconds = before + time.monotonic() - begun
                save_state(state, progressed, parameters, optimizer, best)
                saved = time.monotonic()
            if stop.is_set():
                say(
                    f"stopped at step {progressed.step}; saved in {directory}. The same command goes on from there"
                )
                raise KeyboardInterrupt
    if keep_best and best is not None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(best[name])
    model.eval()
    return Trained(
        progressed.step,
        progressed.tokens,
        progressed.seconds,
        progressed.best,
        progressed.best_step,
        progressed.history,
        progressed.shortened,
    )


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The measurements up to ``step``; a kill may have torn the last line."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        rows.append(row)
    return rows


def _step(
    model: Transformer,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    rate: float,
    clip: float,
) -> tuple[float, int, float]:
    """One optimizer step; returns the mean loss in nats, the tokens it is over, and the gradient norm."""
    tokens = sum(batch.supervised for batch in batches)
    total = 0.0
    for batch in batches:
        if batch.supervised:
            loss = loss_sum(model, batch) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), clip))
    for group in optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, tokens, norm


def _meet_deadline(schedule: Schedule, progressed: Progressed, deadline: float, title: str) -> Schedule:
    """A shorter schedule when this one would end more than a tenth past the deadline."""
    # Judge by a sixth of the time at least: the first steps touch memory for the first time, and a
    # machine is often busy for a moment.
    if progressed.seconds < deadline / 6:
        return schedule
    pace = progressed.seconds / progressed.step
    if pace * schedule.steps <= 1.1 * deadline:
        return schedule
    remaining = int((deadline - progressed.seconds) / pace)
    shorter = schedule.shortened(progressed.step, remaining)
    if not progressed.shortened:
        say(
            f"{title}: the machine is slower than when it was measured; ending near step {shorter.steps} "
            f"instead of {schedule.steps} to keep to the time, so a rerun may give other numbers"
        )
    progressed.shortened = True
    return shorter


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Within the block SIGINT and SIGTERM only set the event, so that a step always ends whole."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python lets only the main thread set handlers
        return
    previous = {sign: signal.signal(sign, lambda *_: stop.set()) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
