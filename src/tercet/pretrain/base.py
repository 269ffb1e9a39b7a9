"""Train the base model of a build: its network, its batches, its recipe, and the measured result."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tercet.data.batches import IGNORED, items_at
from tercet.data.minimal_pairs import read_pairs
from tercet.data.packing import Packing, Stream, pack
from tercet.data.packing import batch as packed_batch
from tercet.errors import UserError
from tercet.files import atomic_directory
from tercet.host import peak_memory
from tercet.model.config import ModelConfig
from tercet.model.loading import save_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.pretrain.corpus import Corpus, open_stream
from tercet.pretrain.heldout import FINAL_TOKENS, HeldOut
from tercet.pretrain.initialize import initialize, look_nearby
from tercet.pretrain.plan import FEW_EPOCHS, network
from tercet.pretrain.planning import Plan, rows_at_once
from tercet.pretrain.result import Built
from tercet.pretrain.settings import BuildSettings
from tercet.progress import say
from tercet.train.batch import Batch
from tercet.train.calibrate import Speed
from tercet.train.compilation import compile_blocks
from tercet.train.loop import STATE, Recipe, Trained, train
from tercet.train.optimizer import Rates
from tercet.train.ranks import Ranks
from tercet.train.schedule import Schedule
from tercet.train.state import FileState

if TYPE_CHECKING:
    from tercet.train.sharded import ShardedState

EVALUATIONS = 5  # held-out measurements in a run
# Of the tokens trained on, as many are measured in all evaluations; a token costs a third of training.
EVALUATION_SHARE = 0.03
OVERFIT = 1.01  # final held-out loss over the lowest, from which a run is reported to overfit


@dataclass(frozen=True)
class Run:
    """A build in progress: its directory, its settings, and the processes that train."""

    directory: Path
    settings: BuildSettings
    key: str  # a fingerprint of everything that decides the result
    ranks: Ranks

    @property
    def corpus_directory(self) -> Path:
        """The directory of the tokenizer and the token streams."""
        return self.directory / "corpus"

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights (FSDP)."""
        return self.settings.parallel == "fsdp"

    def training_state(self) -> FileState | ShardedState:
        """Return the store of the state from which training resumes."""
        if self.sharded:
            from tercet.train.sharded import ShardedState

            return ShardedState(self.directory, self.ranks)
        return FileState(self.directory / STATE, self.ranks)


@dataclass(frozen=True)
class TrainingData:
    """The training part of the corpus, packed into rows of the context's length."""

    stream: Stream
    packing: Packing
    rows: int  # of an optimizer step, over all processes
    rows_at_once: int  # of one forward pass
    seed: int
    ranks: Ranks

    @staticmethod
    def open(run: Run, plan: Plan, config: ModelConfig, device: torch.device) -> TrainingData:
        """Open the training stream of the run's corpus and pack it.

        Raises:
            UserError: The corpus has fewer rows than one step.
        """
        stream = open_stream(run.corpus_directory / "train.bin", config.vocab_size)
        packing = pack(np.load(run.corpus_directory / "train.starts.npy"), plan.context)
        # An epoch of less than one step would fill the step with copies.
        if packing.rows < plan.rows:
            raise UserError(
                f"the corpus has {len(stream):,} tokens, fewer than one step of {plan.rows} x {plan.context}; "
                f"give more text or a smaller `batch_tokens`"
            )
        at_once = rows_at_once(-(-plan.rows // run.ranks.size), config, device)
        return TrainingData(stream, packing, plan.rows, at_once, run.settings.seed, run.ranks)

    def batches_at(self, step: int) -> list[Batch]:
        """Return this process's rows of optimizer step ``step``, in parts of one forward pass each.

        Every process gets as many parts, because processes that share the weights wait for each other.
        """
        ranks = self.ranks
        rows = items_at(step, self.rows, self.packing.rows, self.seed)[ranks.rank :: ranks.size]
        batches = []
        for begin in range(0, -(-self.rows // ranks.size), self.rows_at_once):
            part = rows[begin : begin + self.rows_at_once] or rows[:1]
            arrays = packed_batch(self.stream, self.packing, part)
            batch = Batch(*(None if array is None else torch.from_numpy(array) for array in arrays))  # type: ignore[arg-type]
            if begin >= len(rows):
                batch.targets.fill_(IGNORED)  # a copy that only keeps the number of parts equal
            batches.append(batch)
        return batches


def train_base(run: Run, directory: Path, plan: Plan, corpus: Corpus, deadline: float | None) -> Built | None:
    """Train the base model, write its checkpoint and measure it.

    Args:
        run: The build.
        directory: Where the checkpoint is written.
        plan: Shape, steps and rates.
        corpus: What is in the run's corpus directory.
        deadline: Seconds of training after which the run ends early; None: no limit.

    Returns:
        The result in the first process, None in the others.

    Raises:
        UserError: The corpus is smaller than one step, a sentence of ``pairs`` is longer than the context, or
            the loss is not finite.
        KeyboardInterrupt: Stopped; the same call resumes.
    """
    settings, ranks = run.settings, run.ranks
    tokenizer = Tokenizer.load(run.corpus_directory / "tokenizer")
    config = _config(plan, tokenizer)
    device = ranks.device(settings.device)
    model = _initial_model(run, plan, config, device)
    data = TrainingData.open(run, plan, config, device)
    pairs = read_pairs(settings.pairs) if settings.pairs else []
    held_out = HeldOut(run.corpus_directory, tokenizer, plan.context, pairs)
    # During training, evaluation takes a share of the time; the final figure is measured on more text.
    evaluation_tokens = min(FINAL_TOKENS, int(EVALUATION_SHARE * plan.tokens / EVALUATIONS))
    # After several epochs the network overfits, and the weights of an earlier step are better.
    keep_best = plan.tokens > FEW_EPOCHS * len(data.stream) and not run.sharded
    trained = train(
        model,
        _recipe(plan, ranks, deadline),
        data.batches_at,
        run.directory,
        fingerprint=run.key,
        title="pre-training",
        evaluate=lambda: held_out.measure(model, evaluation_tokens),
        keep_best=keep_best,
        ranks=ranks,
        sharded=run.sharded,
    )
    if keep_best:
        _report_overfitting(trained, len(data.stream))
    if run.sharded:
        from tercet.train.sharded import unsharded

        model = unsharded(model)
    if not ranks.first:
        return None
    kept_step = trained.best_step if keep_best else trained.steps
    return _result(model, directory, plan, corpus, held_out, trained, kept_step, peak_device=device)


def _config(plan: Plan, tokenizer: Tokenizer) -> ModelConfig:
    """Return the planned shape with the special tokens of the trained tokenizer."""
    config = network(plan.layers, plan.width, tokenizer.vocab_size, plan.context)
    stops = (tokenizer.eos_id,) if tokenizer.eos_id is not None else ()
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_ids=stops, pad_token_id=tokenizer.pad_id)


def _initial_model(run: Run, plan: Plan, config: ModelConfig, device: torch.device) -> Transformer:
    """Make the network with its initial weights on its device, compiled and sharded as planned."""
    model = Transformer(config, compute_dtype=Speed(**plan.speed).dtype)
    initialize(model, run.settings.seed)
    look_nearby(model)
    model.to(device)
    if plan.speed.get("compiled"):
        compile_blocks(model)
    if run.sharded:
        from tercet.train.sharded import shard

        shard(model, run.ranks)
    return model


def _recipe(plan: Plan, ranks: Ranks, deadline: float | None) -> Recipe:
    """Return the schedule, rates and evaluation interval of the plan."""
    return Recipe(
        Schedule.of(plan.steps, warmup=0.02, cooldown=0.6),
        plan.rates["matrices"],
        rates=Rates(**{**plan.rates, "betas": tuple(plan.rates["betas"])}),
        z_loss=plan.z_loss,
        evaluate_every=max(1, math.ceil(plan.steps / EVALUATIONS)),
        deadline=deadline,
        threads=ranks.threads(plan.speed["threads"]),
    )


def _report_overfitting(trained: Trained, corpus_tokens: int) -> None:
    """Report that the weights of an earlier step were kept, if the final ones are clearly worse."""
    if trained.best is None or trained.history[-1]["loss"] <= OVERFIT * trained.best:
        return
    say(
        f"kept the weights of step {trained.best_step} of {trained.steps}: after "
        f"{trained.tokens / corpus_tokens:.1f} epochs the network overfits this small text; "
        "more text, fewer epochs or a smaller network would help"
    )


def _result(
    model: Transformer,
    directory: Path,
    plan: Plan,
    corpus: Corpus,
    held_out: HeldOut,
    trained: Trained,
    kept_step: int,
    *,
    peak_device: torch.device,
) -> Built:
    """Measure the trained model, write its checkpoint to ``directory`` and sample from it."""
    measured, accuracy = held_out.measure_final(model)
    memory = peak_memory(peak_device)  # of training too: a sharded model was put together on the CPU
    model.compute_dtype = None  # written and sampled in float32
    with atomic_directory(directory) as temporary:
        save_model(model, temporary)
        held_out.tokenizer.save(temporary)
    return Built(
        model=str(directory),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matmul_parameters=model.config.matmul_parameters,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 2),
        tokens_per_second=round(trained.tokens_per_second, 1),
        bits_per_byte=measured["bits_per_byte"],
        bits_per_byte_by_source={
            name: source["bits_per_byte"] for name, source in measured["sources"].items()
        },
        pair_accuracy=accuracy,
        peak_memory_bytes=memory,
        predicted=plan.predicted,
        shortened=trained.shortened,
        corpus=corpus,
        compression={},
        samples=held_out.samples(directory),
        steps=trained.steps,
        skipped=trained.skipped,
        history=trained.history,
        kept_step=kept_step,
    )
