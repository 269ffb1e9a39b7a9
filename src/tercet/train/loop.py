"""The training loop that every level shares: steps, schedule, checkpoints, resume.

A run is a pure function of its seed, data and thread count: batches come from the step number, so
that a run killed at any moment and started again ends bit for bit as if it had not been killed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tercet.errors import UserError
from tercet.files import write_jsonl
from tercet.model.transformer import Transformer
from tercet.progress import Progress, say
from tercet.train.loss import Batch, Gradients, gradients_of, repeatable
from tercet.train.optimizer import Optimizer, Rates, clip_gradients
from tercet.train.ranks import AddedGradients, Ranks
from tercet.train.schedule import Schedule
from tercet.train.state import FileState, Progressed, trainable

if TYPE_CHECKING:
    from tercet.train.sharded import ShardedState

STATE = "state.safetensors"
SKIPPED_MOST = 5  # steps in a row without a usable gradient end the run: the weights themselves are broken
# A gradient this many times the usual one is an accident (a broken document, an overflow): clipping would
# still follow its direction. Not judged in the first steps, when norms fall by themselves.
SPIKE, SPIKE_AFTER = 50, 50


@dataclass(frozen=True)
class Recipe:
    """How to train. Rates and counts are per optimizer step."""

    schedule: Schedule
    learning_rate: float  # peak; AdamW's, unless ``rates`` says more
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    rates: Rates | None = None  # instead of the three above
    clip: float = 1.0  # largest gradient norm
    z_loss: float = 0.0  # weight of log(Z)^2, Z the softmax's normaliser
    evaluate_every: int = 0  # steps between held-out measurements; 0: at the end only
    save_seconds: float = 20.0  # a checkpoint this often: what a kill can cost
    deadline: float | None = None  # seconds of training; a slow machine cools down early to meet it
    threads: int = 0  # of the training step; 0: as many as PyTorch is set to

    @property
    def peak_rates(self) -> Rates:
        return self.rates or Rates(
            "adamw", self.learning_rate, weight_decay=self.weight_decay, betas=self.betas
        )


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
    skipped: int = 0  # steps whose gradient was not finite or a spike, and was not applied

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: Transformer,
    recipe: Recipe,
    batches_at: Callable[[int], Sequence[Batch]],
    directory: Path,
    *,
    fingerprint: str,
    title: str,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    keep_best: bool = False,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> Trained:
    """Train ``model`` in place and leave it with the final (or best) weights.

    batches_at: the pieces of optimizer step n, from 0; gradients are weighted by token.
    directory: `state.safetensors` and `metrics.jsonl` are kept here; an unfinished run found here goes on.
    fingerprint: of everything that decides the result; a state with another one is refused.
    ranks: the processes that train together; each gives the pieces of its own rows in ``batches_at``.
    sharded: ``model`` is one of `tercet.train.sharded.shard`; all processes evaluate together.
    evaluate: held-out measurements; its ``loss`` decides which weights are best.

    Raises:
        UserError: another run's state is in ``directory``, the disk is full, or the loss is not finite.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the state has been saved.
    """
    ranks = ranks or Ranks()
    parameters = trainable(model)
    threads = recipe.threads or torch.get_num_threads()
    # Processes that share a matrix must exchange it in the same order.
    optimizer = Optimizer(parameters, recipe.peak_rates, threads=1 if sharded else threads, dtype=model.dtype)
    state: FileState | ShardedState
    step_gradients: Gradients
    if sharded:
        from tercet.train.sharded import ShardedGradients, ShardedState

        state = ShardedState(directory, ranks)
        step_gradients = ShardedGradients(model, ranks, recipe.z_loss)
    else:
        state = FileState(directory / STATE, ranks)
        step_gradients = gradients_of(model, threads, recipe.z_loss)
        if ranks.size > 1:
            step_gradients = AddedGradients(step_gradients, list(parameters.values()), ranks)
    progressed = state.progress(fingerprint)
    best: dict[str, Tensor] | None = None
    schedule = recipe.schedule
    if progressed is None:
        progressed = Progressed(fingerprint, steps=schedule.steps, cooldown=schedule.cooldown)
        rows = []
    else:
        best = state.load(parameters, optimizer)
        schedule = replace(schedule, steps=progressed.steps, cooldown=progressed.cooldown)
        # Lines written after the checkpoint describe steps that will be taken again.
        rows = _rows_until(directory / "metrics.jsonl", progressed)
        if not progressed.done:
            say(f"{title}: going on from step {progressed.step} of {progressed.steps}")

    ranks.wait()  # until all have read it
    if ranks.first:
        write_jsonl(directory / "metrics.jsonl", rows)
    model.train()
    begun = saved = time.monotonic()
    before = progressed.seconds
    in_a_row = 0  # skipped
    ahead: dict[int, Sequence[Batch]] = {}  # of the next step
    with (
        _stop_signals() as stop,
        repeatable(model.device),
        (directory / "metrics.jsonl" if ranks.first else Path(os.devnull)).open(
            "a", encoding="utf-8"
        ) as metrics,
        Progress(title, schedule.steps, "steps", done=progressed.step) as bar,
    ):

        def save() -> float:
            metrics.flush()
            progressed.seconds = before + time.monotonic() - begun
            state.save(progressed, parameters, optimizer, best)
            return time.monotonic()

        while not progressed.done:
            step = progressed.step
            ended = step >= schedule.steps
            every = recipe.evaluate_every
            due = step > progressed.evaluated and (ended or (every and step % every == 0))
            if evaluate is not None and due:
                # Saved first: measuring may fail or be killed, and must not cost the training before it.
                soon = time.monotonic() - saved > recipe.save_seconds / 2
                if ended or ranks.in_step(False, 0.0, soon)[2]:
                    saved = save()
                measured = evaluate()
                model.train()
                metrics.write(json.dumps({"step": step, **_heldout(measured)}) + "\n")
                progressed.history.append({"step": step, "tokens": progressed.tokens, **measured})
                progressed.evaluated = step
                if progressed.best is None or measured["loss"] < progressed.best:
                    progressed.best, progressed.best_step = measured["loss"], step
                    if keep_best:
                        best = {name: value.detach().clone() for name, value in parameters.items()}
            if ended:
                progressed.done = True
                save()
                break
            computed, tokens = step_gradients.gradients(ahead.pop(step, ()) or batches_at(step))
            if isinstance(computed, Tensor) and computed.device.type != "cpu" and step + 1 < schedule.steps:
                ahead[step + 1] = batches_at(step + 1)  # while the GPU is still at this one
            norm = clip_gradients(list(parameters.values()), recipe.clip)
            loss = float(computed)
            rate = schedule.rate(step)
            reason = _no_use(loss, norm, progressed)
            if reason is None:
                optimizer.step(rate)
                in_a_row = 0
                progressed.norm = norm if not progressed.norm else 0.95 * progressed.norm + 0.05 * norm
            else:
                in_a_row, progressed.skipped = in_a_row + 1, progressed.skipped + 1
                say(f"{title}: step {step + 1} left out: {reason}")
            if in_a_row == SKIPPED_MOST:
                kept = state.path if state.path.is_file() else "none yet"
                raise UserError(
                    f"{in_a_row} steps in a row could not be used, the last (step {step + 1}) because {reason}; the last "
                    f"good checkpoint: {kept}; start again with a lower learning rate"
                )
            optimizer.zero_grad()
            progressed.step, progressed.tokens = step + 1, progressed.tokens + tokens
            asked, progressed.seconds, due = ranks.in_step(
                stop.is_set(),
                before + time.monotonic() - begun,
                time.monotonic() - saved > recipe.save_seconds,
            )
            row: dict[str, Any] = {
                "step": step + 1,
                "loss": loss if math.isfinite(loss) else None,
                "gradient_norm": norm if math.isfinite(norm) else None,
                "learning_rate": recipe.learning_rate * rate,
                "tokens": progressed.tokens,
                "seconds": round(progressed.seconds, 3),
            }
            if reason is not None:
                row["skipped"] = reason
            metrics.write(json.dumps(row) + "\n")
            bar.advance(1, f"loss {loss:.3f}")
            if schedule.steps > progressed.step and recipe.deadline is not None:
                schedule = _meet_deadline(schedule, recipe.schedule, progressed, recipe.deadline, title)
                progressed.steps, progressed.cooldown = schedule.steps, schedule.cooldown
                bar.total = schedule.steps
            # While steps can't be used the weights are in doubt, and the checkpoint stays the one before.
            if not in_a_row and (asked or due):
                saved = save()
            if asked:
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
        progressed.skipped,
    )


def _heldout(measured: dict[str, Any]) -> dict[str, Any]:
    return {f"heldout_{key}": value for key, value in measured.items()}


def _no_use(loss: float, norm: float, progressed: Progressed) -> str | None:
    """Why a step's gradient must not be applied, or None. It says nothing of the data that isn't there."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    if progressed.step >= SPIKE_AFTER and norm > SPIKE * progressed.norm:
        return f"the gradient norm, {norm:.3g}, is more than {SPIKE} times the usual {progressed.norm:.3g}"
    return None


def _rows_until(path: Path, progressed: Progressed) -> list[dict[str, Any]]:
    """The measurements up to the state's step; a kill may have torn the last line."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        later = row["step"] > (progressed.step if "loss" in row else progressed.evaluated)
        if later:
            break
        rows.append(row)
    return rows


def _meet_deadline(
    schedule: Schedule, planned: Schedule, progressed: Progressed, deadline: float, title: str
) -> Schedule:
    """A shorter schedule when this one would end more than a tenth past the deadline.

    One that was cut comes back, as far as it was planned, when the machine is fast again: a twentieth early.
    """
    # Judge by a sixth of the time at least: the first steps touch memory for the first time, and a
    # machine is often busy for a moment.
    if progressed.seconds < deadline / 6:
        return schedule
    pace = progressed.seconds / progressed.step
    early = schedule.steps < planned.steps and pace * schedule.steps < 0.95 * deadline
    if pace * schedule.steps <= 1.1 * deadline and not early:
        return schedule
    remaining = int((deadline - progressed.seconds) / pace)
    other = schedule.ending(progressed.step, remaining, planned)
    if not progressed.shortened:
        say(
            f"{title}: the machine is slower than when it was measured; ending near step {other.steps} "
            f"instead of {schedule.steps} to keep to the time, so a rerun may give other numbers"
        )
    progressed.shortened = True
    return other


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
