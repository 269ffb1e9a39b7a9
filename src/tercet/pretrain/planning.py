"""The plan of a run: made once from what was asked and what the machine does, then kept and repeated."""

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
    MOST_PASSES,
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
from tercet.pretrain.scaling import remembered
from tercet.pretrain.settings import PretrainSettings
from tercet.progress import duration, say
from tercet.train.calibrate import Speed, calibrate, has_bfloat16
from tercet.train.optimizer import Rates
from tercet.train.ranks import Ranks

# Bytes of English or source code per token of the small vocabularies built here, for planning only.
PLANNED_BYTES_PER_TOKEN = 3.3
# Reading, tokenizer and encoding take a second for some three megabytes; a second of training is about so many
# operations on two cores.
READ_A_SECOND, NOMINAL_FLOPS = 100_000, 1.2e11
# Bytes a second from source to tokens, tokenizer included: of files, and of modules that are parsed and searched for
# test texts. What takes longer than its share of the time is taken from training.
READ_FILES, READ_BUILTIN = 3e6, 1.4e6
# What a budget in minutes leaves for training: a share goes to reading and the tokenizer, and a few seconds
# to measuring the machine, the checkpoint and samples.
TRAINING_SHARE, AROUND_TRAINING = 0.96, 6.0
COMPILING = 15.0  # seconds, on a GPU; always as many, so that a plan repeats where compiled code was kept
# Time planned over time measured: held-out measurements, checkpoints, a machine that has other work.
# Within it a run is repeatable; beyond it the clock ends the run early.
MARGIN = 1.04
FEWEST_STEPS = 100  # a short run takes smaller steps rather than fewer
# Memory of a run over that of the training step alone, which the plan measures: evaluation, and counting the
# words of the text that the tokenizer is made from. Runs on 5 and 16 MB took 130 and 220 MB.
MEMORY_BESIDE, MEMORY_A_BYTE = 60 << 20, 8
# In one forward pass on a GPU: enough tokens to keep it busy, and what is kept of them for the backward pass
# fits into half of its memory (bytes for each token, layer and dimension, in bfloat16 and not compiled).
GPU_TOKENS, KEPT_BYTES = 65_536, 60
# Another number when the same budget comes to another loss: a law that was fitted before is forgotten.
RECIPE = 2
CHAT_SHARE = 0.15  # of a budget in minutes goes to conversations, where there are any
CHAT_CONTEXT = 512  # a conversation needs room for more than one turn


@dataclass(frozen=True)
class Plan:
    """Everything about a run that was decided from measurements; kept, so that a resumed run repeats it."""

    layers: int
    width: int
    vocab_size: int
    context: int
    rows: int
    steps: int
    rates: dict[str, Any]
    z_loss: float
    speed: dict[str, Any]
    seconds: float | None  # of training, where the budget is in minutes
    predicted: dict[str, Any]  # seconds of training, peak memory in bytes, bits per byte where a law is known

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.context

    @property
    def rules(self) -> list[Rule]:
        """Every number of the run with the rule it comes from."""
        config = network(self.layers, self.width, self.vocab_size, self.context)
        return rules_of(config, self.rows, self.steps, Rates(**self.rates))


def pretraining_minutes(asked: PretrainSettings, minutes: float) -> float:
    """Of ``minutes``, those that are not the chat stage's."""
    return minutes * (1 - CHAT_SHARE) if asked.chat else minutes


def kept_plan(out: Path, asked: PretrainSettings, ranks: Ranks) -> Plan:
    """The plan of this run, made once and kept."""
    path = out / "plan.json"
    if path.is_file():
        plan = Plan(**read_json(path))
        # Sums in another order give other last bits.
        torch.set_num_threads(ranks.threads(plan.speed["threads"]))
        return plan
    plan = make_plan(asked, ranks)
    write_json(path, asdict(plan))
    for rule in plan.rules:
        say(f"  {rule.name}: {rule.value}  ({rule.why})")
    speed = Speed(**plan.speed)
    say(
        f"this machine trains it at {speed.tokens_per_second:,.0f} tokens/s in {speed.compute_dtype} on "
        f"{speed.threads} threads: about {duration(plan.predicted['seconds'])}"
    )
    return plan


def make_plan(asked: PretrainSettings, ranks: Ranks | None = None) -> Plan:
    """Shape, steps and rates for what was asked of `build`; measures this machine.

    ranks: the processes that will train; each machine among them is taken to be as fast as this one.
    """
    ranks = ranks or Ranks()
    device = ranks.device(asked.device)
    on_gpu = device.type != "cpu"
    seconds = None
    if asked.minutes:
        whole = 60 * pretraining_minutes(asked, asked.minutes)
        around = AROUND_TRAINING + (COMPILING if on_gpu else 0)
        seconds = max(whole / 2, whole * TRAINING_SHARE - around)
    text = _text_tokens(asked)
    shape = _shape(asked, seconds, gpu_flops(device) if on_gpu else FIRST_GUESS_FLOPS, text)
    context, kind = shape.context, asked.optimizer
    at_once = rows_at_once(shape.rows, shape.config, device)
    speed = calibrate(Transformer(shape.config).to(device), at_once, context, kind, packed=True)
    weights, pace = shape.config.matmul_parameters, speed.tokens_per_second * ranks.workers(on_gpu)
    if seconds is not None:
        tokens = seconds * pace / MARGIN
        read = min(_reading(tokens, weights, asked), text * PLANNED_BYTES_PER_TOKEN)
        late = read / (READ_BUILTIN if BUILTIN in asked.sources else READ_FILES) - whole * (
            1 - TRAINING_SHARE
        )
        seconds = max(seconds / 2, seconds - max(0.0, late))
        tokens = seconds * pace / MARGIN
        if tokens > MOST_PASSES * text:
            tokens = MOST_PASSES * text
            if text > 1:
                say(_too_little(asked, text))
    else:
        tokens = asked.tokens or (asked.flops or 0) / (6 * weights)
    if not asked.batch_tokens:
        shape = replace(shape, rows=min(shape.rows, max(1, int(tokens / (FEWEST_STEPS * context)))))
    shape = replace(shape, rows=max(shape.rows, ranks.size))  # a row for each at least
    steps = max(1, int(tokens / shape.step_tokens))
    trained_on = steps * shape.step_tokens
    law = remembered(law_key(asked))
    plan = Plan(
        layers=shape.config.num_layers,
        width=shape.config.hidden_size,
        vocab_size=shape.config.vocab_size,
        context=context,
        rows=shape.rows,
        steps=steps,
        rates=asdict(_rates(asked, shape.config.hidden_size, steps, trained_on / text)),
        z_loss=asked.z_loss,
        speed=asdict(speed),
        seconds=seconds,
        predicted={
            "seconds": trained_on / pace,
            "bits_per_byte": None if law is None else law.predict(6.0 * weights * trained_on),
        },
    )
    memory = peak_memory(device)
    if not on_gpu:
        sample = min(reading_limit(plan, asked), TOKENIZER_SAMPLE)
        memory += MEMORY_BESIDE + MEMORY_A_BYTE * sample
    return replace(plan, predicted={**plan.predicted, "memory_bytes": memory})


def for_text(plan: Plan, asked: PretrainSettings, tokens: int) -> Plan:
    """``plan`` when it is known that there are ``tokens`` to train on, and files' sizes said otherwise or nothing."""
    a_step = plan.rows * plan.context
    steps = plan.steps
    if asked.minutes and plan.tokens > 1.1 * MOST_PASSES * tokens:
        say(_too_little(asked, tokens))
        steps = max(1, MOST_PASSES * tokens // a_step)
    rates = _rates(asked, plan.width, steps, steps * a_step / tokens)
    return replace(plan, steps=steps, rates=asdict(rates))


def _too_little(asked: PretrainSettings, tokens: float) -> str:
    which = "`read_bytes` leaves" if asked.read_bytes is not None else "the text is"
    return (
        f"{which} about {tokens:,.0f} tokens: after {MOST_PASSES} passes over them the run ends, before the time "
        "is up; more text would use all of it"
    )


def _text_tokens(asked: PretrainSettings) -> float:
    """How many tokens there are to train on, roughly; infinite where nothing is known before reading."""
    size = source_bytes(asked.sources)
    if asked.read_bytes is not None:
        size = min(asked.read_bytes, size or asked.read_bytes)
    return math.inf if size is None else max(1, size) / PLANNED_BYTES_PER_TOKEN


def _shape(asked: PretrainSettings, seconds: float | None, pace: float, text: float) -> Shape:
    """What was asked for, and what the budget feeds where nothing was; ``text``: tokens there are."""
    most = MOST_PASSES * text if seconds is not None else math.inf
    contexts = [context_for(seconds=seconds, tokens=asked.tokens, flops=asked.flops, pace=pace)]
    if seconds is not None and most < math.inf:
        contexts.append(context_for(seconds=None, tokens=int(most), flops=None))
    context = asked.context or max(min(contexts), CHAT_CONTEXT if asked.chat else 0)
    if asked.layers and asked.width:
        config = network(asked.layers, asked.width, 1, context)
        vocab = asked.vocab_size or vocabulary_for(config.matmul_parameters)
        config = replace(config, vocab_size=vocab)
        shape = Shape(config, rows_for(config.matmul_parameters, context), context)
    else:
        shape = shape_for(
            seconds=seconds,
            tokens=asked.tokens,
            flops=asked.flops,
            context=context,
            pace=pace,
            most_tokens=most,
        )
        if asked.vocab_size:
            shape = replace(shape, config=replace(shape.config, vocab_size=asked.vocab_size))
    if asked.batch_tokens:
        if asked.batch_tokens < context:
            raise UserError(
                f"`batch_tokens` is {asked.batch_tokens}; a step has at least one sequence of {context} tokens"
            )
        shape = replace(shape, rows=asked.batch_tokens // context)
    return shape


def _rates(asked: PretrainSettings, width: int, steps: int, passes: float) -> Rates:
    rates = rates_for(
        width,
        kind=asked.optimizer,
        learning_rate=asked.learning_rate,
        steps=steps,
        passes=passes,
    )
    if asked.embedding_rate:
        rates = replace(rates, embedding=asked.embedding_rate)
    if asked.weight_decay is not None:
        rates = replace(rates, weight_decay=asked.weight_decay)
    return rates


def reading_limit(plan: Plan, asked: PretrainSettings) -> int:
    """Bytes of text that are read: enough to train on once, or as many as cost a few hundredths of the run.

    Text beyond what is trained on is not wasted: steps are drawn from all of it, so that a run does not
    see the beginning of a corpus alone. The run's length is reckoned from its operations and not from
    this machine's speed: the same text is read anywhere. Twice what is needed is enough: a GPU would wait.
    """
    weights = network(plan.layers, plan.width, plan.vocab_size, plan.context).matmul_parameters
    return _reading(plan.tokens, weights, asked)


def _reading(tokens: float, weights: int, asked: PretrainSettings) -> int:
    if asked.read_bytes is not None:
        return asked.read_bytes
    once = int(tokens * PLANNED_BYTES_PER_TOKEN * 1.3) + 500_000
    return max(once, min(2 * once, int(READ_A_SECOND * 6 * weights * tokens / NOMINAL_FLOPS)))


def law_key(asked: PretrainSettings) -> str:
    """What a scaling law holds for: the corpus, and how it is trained on."""
    return fingerprint([source_fingerprint(asked.sources), asked.context, asked.optimizer, RECIPE])


def rows_at_once(rows: int, config: ModelConfig, device: torch.device) -> int:
    """Sequences in one forward pass, of the ``rows`` of a step: all of them, or on a GPU parts as even as can be.

    On a CPU each thread goes row by row by itself.
    """
    if device.type == "cpu":
        return rows
    tokens = GPU_TOKENS
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        kept = KEPT_BYTES if has_bfloat16(device) else 2 * KEPT_BYTES
        tokens = min(tokens, memory // 2 // (kept * config.num_layers * config.hidden_size))
    most = max(1, tokens // config.max_positions)
    return -(-rows // -(-rows // most))


def gpu_flops(device: torch.device) -> float:
    """Operations a second to expect of training there: what one large product reaches, times `UTILISATION`."""
    size = 4096
    dtype = torch.float32 if device.type == "mps" else torch.bfloat16
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    for _ in range(3):
        matrix @ matrix
    torch.accelerator.synchronize(device)
    begun = time.monotonic()
    for _ in range(10):
        matrix @ matrix
    torch.accelerator.synchronize(device)
    return UTILISATION * 10 * 2 * size**3 / (time.monotonic() - begun)
