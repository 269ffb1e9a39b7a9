"""The training loop that pre-training and fine-tuning share: steps, schedule, checkpoints, resume.

The seed, the data and the thread count determine a run: the step number alone selects a batch. A run that
was killed at any moment and started again therefore ends bit for bit like an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import torch
from torch import Tensor

from tercet.errors import UserError
from tercet.files import write_jsonl
from tercet.model.transformer import Transformer
from tercet.progress import Progress, say
from tercet.train.batch import Batch
from tercet.train.gradients import Gradients, gradients_of, repeatable
from tercet.train.interrupts import StopSignals, stop_signals
from tercet.train.optimizer import Optimizer, Rates, clip_gradients
from tercet.train.ranks import Ranks, SummedGradients
from tercet.train.schedule import Schedule
from tercet.train.state import FileState, RunProgress, trainable

if TYPE_CHECKING:
    from tercet.train.sharded import ShardedState

STATE = "state.safetensors"
METRICS = "metrics.jsonl"
MAX_SKIPPED = 5  # consecutive steps without a usable gradient end the run: the weights themselves are broken
# A gradient norm this many times the running mean is an accident (a broken document, an overflow); clipping
# would still follow its direction. Not checked during the first steps, when norms fall by themselves.
SPIKE_RATIO, SPIKE_CHECK_FROM = 50, 50


@dataclass(frozen=True)
class Recipe:
    """How to train. Rates and counts are per optimizer step."""

    schedule: Schedule
    learning_rate: float  # peak; AdamW's, unless ``rates`` is set
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    rates: Rates | None = None  # replaces the three fields above
    clip: float = 1.0  # largest gradient norm
    z_loss: float = 0.0  # weight of log(Z)^2, with Z the softmax normaliser
    evaluate_every: int = 0  # steps between held-out evaluations; 0: only at the end
    patience: int = 0  # evaluations in a row without a lower loss that end the run; 0: none do
    save_seconds: float = 20.0  # time between checkpoints: the most training that a kill can cost
    deadline: float | None = None  # seconds of training; a slow machine cools down early to meet it
    threads: int = 0  # of the training step; 0: PyTorch's current setting

    @property
    def peak_rates(self) -> Rates:
        """The optimizer's peak rates: ``rates``, or AdamW with this recipe's own three values."""
        return self.rates or Rates(
            "adamw", self.learning_rate, weight_decay=self.weight_decay, betas=self.betas
        )


@dataclass(frozen=True)
class Trained:
    """The result of `train`."""

    steps: int
    tokens: int  # supervised tokens
    seconds: float  # of the whole run: evaluations, checkpoints and the time before a resume included
    best: float | None  # lowest held-out loss
    best_step: int
    history: list[dict[str, Any]]  # held-out evaluations
    shortened: bool  # a deadline cut the schedule, so the machine's speed affected the result
    skipped: int = 0  # steps that were not applied because their gradient was not finite or a spike

    @property
    def tokens_per_second(self) -> float:
        """Average training speed."""
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
    """Train ``model`` in place; afterwards it holds the final (or best) weights.

    Args:
        model: The network. With ``sharded`` it comes from `tercet.train.sharded.shard`, and all processes
            evaluate together.
        recipe: The schedule, the rates and how often to evaluate and save.
        batches_at: Returns the micro-batches of optimizer step n, counted from 0. Their gradients are
            weighted by supervised tokens. Each process returns its own rows.
        directory: Holds `state.safetensors` and `metrics.jsonl`; an unfinished run found here is resumed.
        fingerprint: Of everything that determines the result; a state with another fingerprint is refused.
        title: Names the run in progress lines and messages.
        evaluate: Returns the held-out measurements; the lowest ``loss`` determines the best weights.
        keep_best: End with the best weights instead of the last.
        ranks: The processes that train together; None: this one alone.
        sharded: Each process holds a part of every weight.

    Raises:
        UserError: ``directory`` holds another run's state, the disk is full, or too many consecutive steps
            had no usable gradient.
        KeyboardInterrupt: On SIGINT or SIGTERM, after the state was saved.
    """
    run = _Run(model, recipe, batches_at, directory, title, ranks or Ranks(), sharded)
    run.restore(fingerprint)
    model.train()
    run.train(evaluate, keep_best)
    if keep_best:
        run.load_best()
    model.eval()
    progress = run.progress
    return Trained(
        progress.step,
        progress.tokens,
        progress.seconds,
        progress.best,
        progress.best_step,
        progress.history,
        progress.shortened,
        progress.skipped,
    )


class _Run:
    """One call of `train`: the network with its optimizer, and where the run stands."""

    def __init__(
        self,
        model: Transformer,
        recipe: Recipe,
        batches_at: Callable[[int], Sequence[Batch]],
        directory: Path,
        title: str,
        ranks: Ranks,
        sharded: bool,
    ) -> None:
        self.model, self.recipe, self.batches_at = model, recipe, batches_at
        self.directory, self.title, self.ranks = directory, title, ranks
        self.parameters = trainable(model)
        threads = recipe.threads or torch.get_num_threads()
        # Processes that share a matrix must exchange it in the same order, so one thread updates it.
        self.optimizer = Optimizer(
            self.parameters, recipe.peak_rates, threads=1 if sharded else threads, dtype=model.dtype
        )
        self.state: FileState | ShardedState
        self.gradients: Gradients
        if sharded:
            from tercet.train.sharded import ShardedGradients, ShardedState

            self.state = ShardedState(directory, ranks)
            self.gradients = ShardedGradients(model, ranks, recipe.z_loss)
        else:
            self.state = FileState(directory / STATE, ranks)
            self.gradients = gradients_of(model, threads, recipe.z_loss)
            if ranks.size > 1:
                self.gradients = SummedGradients(self.gradients, list(self.parameters.values()), ranks)
        self.schedule = recipe.schedule
        self.progress: RunProgress
        self.metrics: TextIO
        self.bar: Progress
        self.best: dict[str, Tensor] | None = None
        self.skipped_in_a_row = 0
        self.saved_step = -1  # of the state on disk, as far as this process has written it
        self.prefetched: dict[int, Sequence[Batch]] = {}  # the micro-batches of the next step

    # Resume and checkpoints

    def restore(self, fingerprint: str) -> None:
        """Load the state that ``directory`` holds, or begin at step 0; drop metrics beyond that state."""
        progress = self.state.progress(fingerprint)
        rows = []
        if progress is None:
            progress = RunProgress(fingerprint, steps=self.schedule.steps, cooldown=self.schedule.cooldown)
        else:
            self.best = self.state.load(self.parameters, self.optimizer)
            self.schedule = replace(self.schedule, steps=progress.steps, cooldown=progress.cooldown)
            # Lines written after the checkpoint describe steps that will be taken again.
            rows = _rows_until(self.directory / METRICS, progress)
            if not progress.done:
                say(f"{self.title}: resuming at step {progress.step} of {progress.steps}")
        self.progress = progress
        self.ranks.barrier()  # every process must have read the state before the first one writes
        if self.ranks.first:
            write_jsonl(self.directory / METRICS, rows)

    def _save(self) -> None:
        self.metrics.flush()
        self.progress.seconds = self._elapsed()
        self.state.save(self.progress, self.parameters, self.optimizer, self.best)
        self.saved_at = time.monotonic()
        self.saved_step = self.progress.step

    def _elapsed(self) -> float:
        """Seconds of training so far, those of earlier processes included."""
        return self.seconds_before + time.monotonic() - self.started_at

    def load_best(self) -> None:
        """Put the best weights into the network, where an evaluation has chosen any."""
        if self.best is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.best[name])

    # The loop

    def train(self, evaluate: Callable[[], dict[str, Any]] | None, keep_best: bool) -> None:
        """Take all remaining steps, with evaluations between them."""
        self.started_at = self.saved_at = time.monotonic()
        self.seconds_before = self.progress.seconds
        path = self.directory / METRICS if self.ranks.first else Path(os.devnull)
        with (
            stop_signals(at_once=self.ranks.size == 1) as stop,
            repeatable(self.model.device),
            path.open("a", encoding="utf-8") as self.metrics,
            Progress(self.title, self.schedule.steps, "steps", done=self.progress.step) as self.bar,
        ):
            while not self.progress.done:
                ended = self.progress.step >= self.schedule.steps
                if evaluate is not None and self._evaluation_due(ended):
                    self._evaluate(evaluate, ended, keep_best, stop)
                    ended = ended or self._without_progress()
                if ended:
                    self.progress.done = True
                    self._save()
                else:
                    self._step(stop)

    def _without_progress(self) -> bool:
        """Return whether the last evaluation used up the recipe's patience."""
        progress, patience = self.progress, self.recipe.patience
        since = len([entry for entry in progress.history if entry["step"] > progress.best_step])
        used_up = 0 < patience <= since
        if used_up:
            say(
                f"{self.title}: the held-out loss has not fallen in {since} evaluations; ending at step {progress.step}"
            )
        return used_up

    def _evaluation_due(self, ended: bool) -> bool:
        step, every = self.progress.step, self.recipe.evaluate_every
        return step > self.progress.evaluated and (ended or (every > 0 and step % every == 0))

    def _evaluate(
        self, evaluate: Callable[[], dict[str, Any]], ended: bool, keep_best: bool, stop: StopSignals
    ) -> None:
        """Evaluate and record the result. An evaluation that is interrupted is repeated by the resumed run."""
        # Save first: an evaluation may fail or be killed, and must not cost the training before it.
        save_due = time.monotonic() - self.saved_at > self.recipe.save_seconds / 2
        if ended or self.ranks.agree(False, 0.0, save_due)[2]:
            self._save()
        try:
            with stop.interruptible():
                measured = evaluate()
        except KeyboardInterrupt:
            self._stop()
        self.model.train()
        progress = self.progress
        row = {"step": progress.step, **{f"heldout_{key}": value for key, value in measured.items()}}
        self.metrics.write(json.dumps(row) + "\n")
        progress.history.append({"step": progress.step, "tokens": progress.tokens, **measured})
        progress.evaluated = progress.step
        if progress.best is None or measured["loss"] < progress.best:
            progress.best, progress.best_step = measured["loss"], progress.step
            if keep_best:
                self.best = {name: value.detach().clone() for name, value in self.parameters.items()}

    def _step(self, stop: StopSignals) -> None:
        """Take one optimizer step and record it.

        A signal while the gradients are computed ends the run before the step; the step is lost, and nothing else.
        On a slow machine they take half a minute.

        Raises:
            KeyboardInterrupt: ``stop`` is set, in any of the processes.
        """
        progress = self.progress
        try:
            with stop.interruptible():
                loss, norm, tokens = self._compute_gradients(progress.step)
        except KeyboardInterrupt:
            self.optimizer.zero_grad()
            self._stop()
        rate = self.schedule.rate(progress.step)
        fault = self._update(loss, norm, rate)
        self.optimizer.zero_grad()
        progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
        stopping, progress.seconds, save_due = self.ranks.agree(
            stop.is_set(), self._elapsed(), time.monotonic() - self.saved_at > self.recipe.save_seconds
        )
        self._record(loss, norm, rate, fault)
        self._meet_deadline()
        # While steps are skipped the weights are in doubt, so the previous checkpoint stays.
        if stopping:
            self._stop()
        if not self.skipped_in_a_row and save_due:
            self._save()

    def _stop(self) -> NoReturn:
        """Save the last step and end the run. While steps are skipped, the previous checkpoint stays.

        Raises:
            KeyboardInterrupt: always.
        """
        if not self.skipped_in_a_row and self.saved_step != self.progress.step:
            self._save()
        say(
            f"stopped at step {self.progress.step}; saved in {self.directory}. Run the same command to resume"
        )
        raise KeyboardInterrupt

    def _compute_gradients(self, step: int) -> tuple[float, float, int]:
        """Compute and clip the gradients of ``step``; return the mean loss, gradient norm and token count."""
        computed, tokens = self.gradients.gradients(self.prefetched.pop(step, ()) or self.batches_at(step))
        on_gpu = isinstance(computed, Tensor) and computed.device.type != "cpu"
        if on_gpu and step + 1 < self.schedule.steps:
            self.prefetched[step + 1] = self.batches_at(step + 1)  # while the GPU still computes this step
        norm = clip_gradients(list(self.parameters.values()), self.recipe.clip)
        return float(computed), norm, tokens

    def _update(self, loss: float, norm: float, rate: float) -> str | None:
        """Move the weights, or skip the step and return the reason.

        Raises:
            UserError: `MAX_SKIPPED` steps in a row were skipped.
        """
        progress = self.progress
        fault = _gradient_fault(loss, norm, progress)
        if fault is None:
            self.optimizer.step(rate)
            self.skipped_in_a_row = 0
            progress.norm = norm if not progress.norm else 0.95 * progress.norm + 0.05 * norm
            return None
        self.skipped_in_a_row, progress.skipped = self.skipped_in_a_row + 1, progress.skipped + 1
        say(f"{self.title}: skipped step {progress.step + 1}: {fault}")
        if self.skipped_in_a_row == MAX_SKIPPED:
            checkpoint = self.state.path if self.state.path.is_file() else "none yet"
            raise UserError(
                f"skipped {self.skipped_in_a_row} steps in a row, the last (step {progress.step + 1}) "
                f"because {fault}; the last good checkpoint: {checkpoint}; restart with a lower "
                f"`learning_rate`"
            )
        return fault

    def _record(self, loss: float, norm: float, rate: float, fault: str | None) -> None:
        """Write the step's line to the metrics and advance the progress bar."""
        row: dict[str, Any] = {
            "step": self.progress.step,
            "loss": loss if math.isfinite(loss) else None,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "learning_rate": self.recipe.learning_rate * rate,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
        }
        if fault is not None:
            row["skipped"] = fault
        self.metrics.write(json.dumps(row) + "\n")
        self.bar.advance(1, f"loss {loss:.3f}")

    def _meet_deadline(self) -> None:
        """Adapt the schedule to the recipe's deadline, where there is one and the run has not ended."""
        progress, deadline = self.progress, self.recipe.deadline
        if deadline is None or progress.step >= self.schedule.steps:
            return
        schedule = _deadline_schedule(self.schedule, self.recipe.schedule, progress, deadline)
        if schedule is None:
            return
        if not progress.shortened:
            say(
                f"{self.title}: the machine is slower than when it was measured; ending near step "
                f"{schedule.steps} instead of {self.schedule.steps} to meet the deadline, so a rerun may "
                f"give different numbers"
            )
        progress.shortened = True
        self.schedule = schedule
        progress.steps, progress.cooldown = schedule.steps, schedule.cooldown
        self.bar.total = schedule.steps


def _gradient_fault(loss: float, norm: float, progress: RunProgress) -> str | None:
    """Return why a step's gradient must not be applied, or None where it may be."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    if progress.step >= SPIKE_CHECK_FROM and norm > SPIKE_RATIO * progress.norm:
        return (
            f"the gradient norm, {norm:.3g}, is more than {SPIKE_RATIO} times the running mean, "
            f"{progress.norm:.3g}"
        )
    return None


def _rows_until(path: Path, progress: RunProgress) -> list[dict[str, Any]]:
    """Return the lines of the metrics up to the state's step; a kill may have torn the last line."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > (progress.step if "loss" in row else progress.evaluated):
            break
        rows.append(row)
    return rows


def _deadline_schedule(
    schedule: Schedule, planned: Schedule, progress: RunProgress, deadline: float
) -> Schedule | None:
    """Return another schedule for the remaining time, or None where ``schedule`` fits the deadline.

    A schedule is shortened when it would end more than a tenth past the deadline. A shortened schedule grows
    again, at most to the planned length, when the machine has become fast enough to end a twentieth early.
    """
    # Measure over a sixth of the time at least: the first steps touch their memory for the first time, and a
    # machine is often busy for a moment.
    if progress.seconds < deadline / 6:
        return None
    pace = progress.seconds / progress.step
    early = schedule.steps < planned.steps and pace * schedule.steps < 0.95 * deadline
    if pace * schedule.steps <= 1.1 * deadline and not early:
        return None
    remaining = int((deadline - progress.seconds) / pace)
    return schedule.ending(progress.step, remaining, planned)
