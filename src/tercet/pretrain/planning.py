"""Plan a run from its settings and the speed of the machine; a stored plan is repeated when a run resumes."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tercet.data.documents import source_bytes, source_fingerprint
from tercet.data.python_docs import BUILTIN
from tercet.errors import UserError
from tercet.files import fingerprint, read_json, write_json
from tercet.host import peak_memory
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.pretrain.corpus import TOKENIZER_SAMPLE
from tercet.pretrain.hardware import UTILISATION
from tercet.pretrain.plan import (
    FIRST_GUESS_FLOPS,
    MAX_EPOCHS,
    Rule,
    Shape,
    context_for,
    network,
    rates_for,
    rows_for,
    rules_of,
    shape_for,
    vocabulary_for,
)
from tercet.pretrain.scaling import stored_law
from tercet.pretrain.settings import PretrainSettings
from tercet.progress import duration, say
from tercet.train.calibrate import Speed, calibrate, has_bfloat16
from tercet.train.optimizer import Rates
from tercet.train.ranks import Ranks

# Bytes of English or source code per token of the small vocabularies built here, for planning only.
PLANNED_BYTES_PER_TOKEN = 3.3
# Reading, tokenizer and encoding take a second for about three megabytes; a second of training is about
# NOMINAL_FLOPS operations on two cores. So many bytes may be read for each second of training.
READ_A_SECOND, NOMINAL_FLOPS = 100_000, 1.2e11
# Bytes a second from source to tokens, tokenizer included: of files, and of Python modules, which are parsed
# and searched for test texts. Reading time beyond the share of reading is subtracted from training.
READ_FILES, READ_BUILTIN = 3e6, 1.4e6
# The share of a budget in minutes that is left for training: the rest is for reading and the tokenizer. A few
# seconds more go to measuring the machine, the checkpoint and samples.
TRAINING_SHARE, AROUND_TRAINING = 0.96, 6.0
COMPILING = 15.0  # seconds, on a GPU; always the same, so that a plan repeats where compiled code was cached
# Planned time over measured time, for held-out measurements, checkpoints, and other work on the machine.
# Within it a run is repeatable; beyond it the clock ends the run early.
MARGIN = 1.04
MIN_STEPS = 100  # a short run takes smaller steps rather than fewer
# Memory of a run beyond that of the training step, which the plan measures: evaluation, and counting the
# words of the tokenizer's sample. Runs on 5 and 16 MB took 130 and 220 MB.
MEMORY_BESIDE, MEMORY_A_BYTE = 60 << 20, 8
# Tokens in one forward pass on a GPU: enough to keep it busy, as long as the activations for the backward pass
# fit into half of its memory (KEPT_BYTES for each token, layer and dimension, in bfloat16 and not compiled).
GPU_TOKENS, KEPT_BYTES = 65_536, 60
# Increase it when the same budget gives another loss: stored scaling laws are then ignored.
RECIPE = 2
CHAT_SHARE = 0.15  # of a budget in minutes, for the chat stage
CHAT_CONTEXT = 512  # a conversation needs room for more than one turn


@dataclass(frozen=True)
class Plan:
    """The decisions of a run that depend on measurements; stored, so that a resumed run repeats them."""

    layers: int
    width: int
    vocab_size: int
    context: int
    rows: int  # sequences an optimizer step
    steps: int
    rates: dict[str, Any]
    z_loss: float
    speed: dict[str, Any]
    seconds: float | None  # of training, where the budget is in minutes
    predicted: dict[str, Any]  # seconds of training, peak memory in bytes, bits per byte where a law is known

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.rows * self.context

    @property
    def rules(self) -> list[Rule]:
        """Every number of the run with its reason."""
        config = network(self.layers, self.width, self.vocab_size, self.context)
        return rules_of(config, self.rows, self.steps, Rates(**self.rates))


def pretraining_minutes(settings: PretrainSettings, minutes: float) -> float:
    """Return the part of ``minutes`` that is not reserved for the chat stage."""
    return minutes * (1 - CHAT_SHARE) if settings.chat else minutes


def stored_plan(out: Path, settings: PretrainSettings, ranks: Ranks) -> Plan:
    """Return the plan stored in the run directory, or make, store and print it.

    Sets torch's thread count to that of the plan.
    """
    path = out / "plan.json"
    if path.is_file():
        plan = Plan(**read_json(path))
        # Another number of threads adds in another order, and the last bits differ.
        torch.set_num_threads(ranks.threads(plan.speed["threads"]))
        return plan
    plan = make_plan(settings, ranks)
    write_json(path, asdict(plan))
    for rule in plan.rules:
        say(f"  {rule.name}: {rule.value}  ({rule.why})")
    speed = Speed(**plan.speed)
    say(
        f"this machine trains the network at {speed.tokens_per_second:,.0f} tokens/s in {speed.compute_dtype} on "
        f"{speed.threads} threads: about {duration(plan.predicted['seconds'])}"
    )
    return plan


def make_plan(settings: PretrainSettings, ranks: Ranks | None = None) -> Plan:
    """Plan shape, steps and rates of a build; measures this machine for a few seconds.

    Args:
        settings: Of the build.
        ranks: The processes that will train; each machine is assumed to be as fast as this one.

    Raises:
        UserError: ``batch_tokens`` is smaller than a sequence.
    """
    ranks = ranks or Ranks()
    device = ranks.device(settings.device)
    on_gpu = device.type != "cpu"
    seconds = _training_seconds(settings, on_gpu)
    text = _text_tokens(settings)
    shape = _shape(settings, seconds, gpu_flops(device) if on_gpu else FIRST_GUESS_FLOPS, text)
    context, weights = shape.context, shape.config.matmul_parameters
    at_once = rows_at_once(shape.rows, shape.config, device)
    speed = calibrate(Transformer(shape.config).to(device), at_once, context, settings.optimizer, packed=True)
    pace = speed.tokens_per_second * ranks.workers(on_gpu)
    if seconds is not None:
        seconds = _without_reading(settings, seconds, pace, weights, text)
        tokens = seconds * pace / MARGIN
        if tokens > MAX_EPOCHS * text:
            tokens = MAX_EPOCHS * text
            if text > 1:
                say(_too_little_text(settings, text))
    else:
        tokens = settings.tokens or (settings.flops or 0) / (6 * weights)
    if not settings.batch_tokens:
        shape = replace(shape, rows=min(shape.rows, max(1, int(tokens / (MIN_STEPS * context)))))
    shape = replace(shape, rows=max(shape.rows, ranks.size))  # at least one row for each process
    steps = max(1, int(tokens / shape.step_tokens))
    trained_on = steps * shape.step_tokens
    law = stored_law(law_key(settings))
    plan = Plan(
        layers=shape.config.num_layers,
        width=shape.config.hidden_size,
        vocab_size=shape.config.vocab_size,
        context=context,
        rows=shape.rows,
        steps=steps,
        rates=asdict(_rates(settings, shape.config.hidden_size, steps, trained_on / text)),
        z_loss=settings.z_loss,
        speed=asdict(speed),
        seconds=seconds,
        predicted={
            "seconds": trained_on / pace,
            "bits_per_byte": None if law is None else law.predict(6.0 * weights * trained_on),
        },
    )
    memory = peak_memory(device)
    if not on_gpu:
        sample = min(reading_limit(plan, settings), TOKENIZER_SAMPLE)
        memory += MEMORY_BESIDE + MEMORY_A_BYTE * sample
    return replace(plan, predicted={**plan.predicted, "memory_bytes": memory})


def fit_to_text(plan: Plan, settings: PretrainSettings, tokens: int) -> Plan:
    """Adapt ``plan`` to the number of training tokens, which is only known once the text is read.

    The sizes of files give an estimate that may be wrong, and built-in data gives none.
    """
    step_tokens = plan.rows * plan.context
    steps = plan.steps
    if settings.minutes and plan.tokens > 1.1 * MAX_EPOCHS * tokens:
        say(_too_little_text(settings, tokens))
        steps = max(1, MAX_EPOCHS * tokens // step_tokens)
    rates = _rates(settings, plan.width, steps, steps * step_tokens / tokens)
    return replace(plan, steps=steps, rates=asdict(rates))


def _training_seconds(settings: PretrainSettings, on_gpu: bool) -> float | None:
    """Return the seconds of training that a budget in minutes leaves; None for other budgets."""
    if not settings.minutes:
        return None
    total = 60 * pretraining_minutes(settings, settings.minutes)
    around = AROUND_TRAINING + (COMPILING if on_gpu else 0)
    return max(total / 2, total * TRAINING_SHARE - around)


def _without_reading(
    settings: PretrainSettings, seconds: float, pace: float, weights: int, text: float
) -> float:
    """Subtract the reading time that exceeds reading's share of the budget.

    Args:
        settings: Of the build, with a budget in minutes.
        seconds: Of training, without regard to reading.
        pace: Tokens a second.
        weights: Matrix weights of the network.
        text: Tokens of the text.
    """
    assert settings.minutes is not None
    total = 60 * pretraining_minutes(settings, settings.minutes)
    size = min(_reading(seconds * pace / MARGIN, weights, settings), text * PLANNED_BYTES_PER_TOKEN)
    rate = READ_BUILTIN if BUILTIN in settings.sources else READ_FILES
    excess = size / rate - total * (1 - TRAINING_SHARE)
    return max(seconds / 2, seconds - max(0.0, excess))


def _too_little_text(settings: PretrainSettings, tokens: float) -> str:
    subject = "the text" if settings.read_bytes is None else "the part of the text that is read"
    return (
        f"{subject} has about {tokens:,.0f} tokens: training stops after {MAX_EPOCHS} epochs, before the time limit; "
        "with more text it would use all of the time"
    )


def _text_tokens(settings: PretrainSettings) -> float:
    """Estimate the number of tokens in the text; infinite where its size is not known before reading."""
    size = source_bytes(settings.sources)
    if settings.read_bytes is not None:
        size = min(settings.read_bytes, size or settings.read_bytes)
    return math.inf if size is None else max(1, size) / PLANNED_BYTES_PER_TOKEN


def _shape(settings: PretrainSettings, seconds: float | None, pace: float, text: float) -> Shape:
    """Choose the shape by the settings, and by the budget where they leave it open.

    Args:
        settings: Of the build.
        seconds: Of training; None for a budget in tokens or operations.
        pace: Operations a second.
        text: Tokens of the text.
    """
    max_tokens = MAX_EPOCHS * text if seconds is not None else math.inf
    contexts = [context_for(seconds=seconds, tokens=settings.tokens, flops=settings.flops, pace=pace)]
    if seconds is not None and max_tokens < math.inf:
        contexts.append(context_for(seconds=None, tokens=int(max_tokens), flops=None))
    context = settings.context or max(min(contexts), CHAT_CONTEXT if settings.chat else 0)
    if settings.layers and settings.width:
        config = network(settings.layers, settings.width, 1, context)
        vocab = settings.vocab_size or vocabulary_for(config.matmul_parameters)
        config = replace(config, vocab_size=vocab)
        shape = Shape(config, rows_for(config.matmul_parameters, context), context)
    else:
        shape = shape_for(
            seconds=seconds,
            tokens=settings.tokens,
            flops=settings.flops,
            context=context,
            pace=pace,
            max_tokens=max_tokens,
        )
        if settings.vocab_size:
            shape = replace(shape, config=replace(shape.config, vocab_size=settings.vocab_size))
    if settings.batch_tokens:
        if settings.batch_tokens < context:
            raise UserError(
                f"`batch_tokens` is {settings.batch_tokens}; a step has at least one sequence of {context} tokens"
            )
        shape = replace(shape, rows=settings.batch_tokens // context)
    return shape


def _rates(settings: PretrainSettings, width: int, steps: int, epochs: float) -> Rates:
    rates = rates_for(
        width,
        kind=settings.optimizer,
        learning_rate=settings.learning_rate,
        steps=steps,
        epochs=epochs,
    )
    if settings.embedding_rate:
        rates = replace(rates, embedding=settings.embedding_rate)
    if settings.weight_decay is not None:
        rates = replace(rates, weight_decay=settings.weight_decay)
    return rates


def reading_limit(plan: Plan, settings: PretrainSettings) -> int:
    """Return the bytes of text to read: enough for one epoch, or as many as cost a few hundredths of the run.

    Text beyond what is trained on is useful: steps are drawn from all of it, so that a run does not see only
    the beginning of a corpus. The limit depends on the run's operations and not on this machine's speed, so
    that every machine reads the same text. Twice the text of one epoch is enough, since a GPU would wait.
    """
    weights = network(plan.layers, plan.width, plan.vocab_size, plan.context).matmul_parameters
    return _reading(plan.tokens, weights, settings)


def _reading(tokens: float, weights: int, settings: PretrainSettings) -> int:
    if settings.read_bytes is not None:
        return settings.read_bytes
    one_epoch = int(tokens * PLANNED_BYTES_PER_TOKEN * 1.3) + 500_000
    return max(one_epoch, min(2 * one_epoch, int(READ_A_SECOND * 6 * weights * tokens / NOMINAL_FLOPS)))


def law_key(settings: PretrainSettings) -> str:
    """Return a fingerprint of everything that a scaling law depends on: the corpus and the way of training."""
    return fingerprint([source_fingerprint(settings.sources), settings.context, settings.optimizer, RECIPE])


def rows_at_once(rows: int, config: ModelConfig, device: torch.device) -> int:
    """Return the sequences of one forward pass, of the ``rows`` of an optimizer step.

    On a CPU all of them, since each thread goes row by row; on a GPU as many as fit, in parts of nearly
    equal size.
    """
    if device.type == "cpu":
        return rows
    tokens = GPU_TOKENS
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        kept_bytes = KEPT_BYTES if has_bfloat16(device) else 2 * KEPT_BYTES
        tokens = min(tokens, memory // 2 // (kept_bytes * config.num_layers * config.hidden_size))
    limit = max(1, tokens // config.max_positions)
    return -(-rows // -(-rows // limit))


def gpu_flops(device: torch.device) -> float:
    """Estimate a GPU's operations a second in training: those of one large product, times `UTILISATION`."""
    size = 4096
    dtype = torch.float32 if device.type == "mps" else torch.bfloat16
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    for _ in range(3):
        matrix @ matrix
    torch.accelerator.synchronize(device)
    started = time.monotonic()
    for _ in range(10):
        matrix @ matrix
    torch.accelerator.synchronize(device)
    return UTILISATION * 10 * 2 * size**3 / (time.monotonic() - started)
