"""Build a model from raw text: corpus, tokenizer, shape, training, checkpoint, report."""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tercet.build.chat import Chatted, conversation_texts, learn_to_chat, read_conversations
from tercet.build.corpus import Corpus, open_stream, prepare
from tercet.build.initialize import initialize
from tercet.build.plan import (
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
from tercet.build.report import write_build_report
from tercet.build.scaling import remembered
from tercet.build.settings import Settings
from tercet.build.vocabulary import Digits, Whitespace, bytes_per_token, load_tokenizer
from tercet.data.batches import items_at
from tercet.data.decontaminate import Decontaminator
from tercet.data.documents import read_documents, source_fingerprint
from tercet.data.minimal_pairs import read_pairs, sample_pairs
from tercet.data.packing import batch as packed_batch
from tercet.data.packing import pack
from tercet.errors import UserError
from tercet.files import atomic_directory, fingerprint, read_json, write_json
from tercet.model.config import ModelConfig
from tercet.model.loading import save_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.progress import duration, say
from tercet.run_directory import open_run
from tercet.train.calibrate import Speed, calibrate
from tercet.train.evaluate import heldout_bits, pair_accuracy
from tercet.train.loop import STATE, Recipe, train
from tercet.train.loss import Batch
from tercet.train.optimizer import Rates
from tercet.train.schedule import Schedule

# Bytes of English or source code per token of the small vocabularies built here, for planning only.
PLANNED_BYTES_PER_TOKEN = 3.3
# What a budget in minutes leaves for training: a share goes to reading and the tokenizer, and a few seconds
# to measuring the machine, the checkpoint and samples.
TRAINING_SHARE, AROUND_TRAINING = 0.95, 8.0
# Time planned over time measured: held-out measurements, checkpoints, a machine that has other work.
# Within it a run is repeatable; beyond it the clock ends the run early.
MARGIN = 1.1
FEWEST_STEPS = 100  # a short run takes smaller steps rather than fewer
EVALUATIONS = 5  # held-out measurements in a run
EVALUATION_SHARE = (
    0.03  # of the tokens trained on are measured in all of them; a token costs a third of training
)
PAIRS_IN_RUN, PAIRS_AT_END = 5, 50  # minimal pairs of each group that are compared
COMPRESSION_SAMPLE = 2_000_000  # characters of held-out text
HELDOUT_TOKENS = 65_536  # of the last measurement: they pin bits per byte to under 1%
# Memory of a run over that of the training step alone, which the plan measures: text, tokenizer, evaluation.
MEMORY_BESIDE = 60 << 20
CHAT_SHARE = 0.15  # of a budget in minutes goes to conversations, where there are any
CHAT_EPOCHS = 3.0
BASE_RESULT = "pretraining.json"  # of a build that goes on to chat
CHAT_CONTEXT = 512  # a conversation needs room for more than one turn
RESERVE = 4.0  # seconds at the end for the checkpoint, samples and the report


@dataclass(frozen=True)
class Built:
    """What `build` made. Sizes: parameters in all, tokens trained on, seconds of training."""

    model: str
    parameters: int
    matmul_parameters: int
    tokens: int
    seconds: float
    tokens_per_second: float
    bits_per_byte: float
    bits_per_byte_by_source: dict[str, float]
    pair_accuracy: dict[str, float] | None  # accuracy on minimal pairs, and how many; None: none were given
    peak_memory_bytes: int
    predicted: dict[str, Any]  # what the plan expected: seconds, memory_bytes, bits_per_byte
    shortened: bool  # the clock ended training early, so a rerun may give other numbers
    corpus: Corpus
    compression: dict[str, dict[str, float]]  # of held-out text by tokenizer: vocab_size, bytes_per_token
    samples: list[dict[str, str]]
    steps: int
    skipped: int  # steps whose gradient was not finite or a spike, and was not applied
    history: list[dict[str, Any]]  # held-out measurements of the run
    chat: Chatted | None = None  # what made a chat model of the base; the other figures are the base's


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


def build(
    data: Sequence[str | Path] | str | Path, out: str | Path, *, exclude: Sequence[str] = (), **settings: Any
) -> Built:
    """Train a tokenizer and a Qwen3-shaped network on ``data`` and write them to ``out/model``.

    data: files, directories or ``builtin:python-docs``.
    exclude: texts, and near-copies of them, that are removed from the corpus (a locked test split).
    settings: the fields of `Settings`; ``minutes=5`` is the default budget.

    Raises:
        UserError: bad data or settings; ``out`` belongs to another run.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    asked = Settings.of(data, **settings)
    sources, minutes = list(asked.data), asked.minutes
    out = Path(out)
    begun = time.monotonic()
    if asked.pairs:
        read_pairs(asked.pairs)  # what is wrong with them is told before anything is done
    others = {name: load_tokenizer(name) for name in asked.compare_tokenizers}
    conversations = read_conversations(asked.chat) if asked.chat else []
    key = fingerprint([asdict(asked), source_fingerprint(sources), list(exclude), conversations])
    with open_run(out, "build", key, asked.to_config()):
        if (out / "result.json").is_file():
            say(f"{out} is finished already; delete it or choose another --out to build again")
            return read_result(out / "result.json")
        plan = _plan(out, asked)
        if asked.curate is not None:
            from tercet.build.curate.pipeline import curate

            sources = [curate(sources, out / "curated", preset=asked.curate, seed=asked.seed).data]
        limit = reading_limit(plan.tokens)
        skipped: Counter[str] = Counter()
        corpus = prepare(
            read_documents(sources, skipped),
            out / "corpus",
            planned_vocabulary=plan.vocab_size,
            vocab_size=asked.vocab_size,
            digits=cast(Digits, asked.digits),
            whitespace=cast(Whitespace, asked.whitespace),
            limit=limit,
            decontaminator=Decontaminator(exclude) if exclude else None,
            vocabulary=conversation_texts(conversations),
            key=key,
        )
        for reason, count in skipped.most_common():
            say(f"skipped {count:,}: {reason}")
        deadline = None
        if minutes is not None and plan.seconds is not None:
            # What reading and the tokenizer really left, should they have taken longer than their share.
            left = 60 * _pretraining_minutes(asked, minutes) - (time.monotonic() - begun) - RESERVE
            deadline = max(0.5 * plan.seconds, min(left, plan.seconds * MARGIN))
        if not asked.chat:
            built = _pretrain(out, out / "model", plan, corpus, asked, key, deadline)
        else:
            if not (out / BASE_RESULT).is_file():
                base = _pretrain(out, out / "base", plan, corpus, asked, key, deadline)
                write_json(out / BASE_RESULT, asdict(base))
                (out / STATE).unlink(missing_ok=True)
            spent = (time.monotonic() - begun + RESERVE) / 60
            chat = learn_to_chat(
                out / "base",
                conversations,
                out / "chat",
                out / "model",
                epochs=asked.chat_epochs or CHAT_EPOCHS,
                minutes=None if minutes is None else _chat_minutes(minutes, spent),
                seed=asked.seed,
                key=key,
            )
            built = replace(read_result(out / BASE_RESULT), model=str(out / "model"), chat=chat)
        built = replace(built, compression=_compression(out, others))
        write_build_report(out, built, plan)
        write_json(out / "result.json", asdict(built))
        (out / STATE).unlink(missing_ok=True)  # nothing is left to resume
        return built


def _pretraining_minutes(asked: Settings, minutes: float) -> float:
    """Of ``minutes``, those that are not the chat stage's."""
    return minutes * (1 - CHAT_SHARE) if asked.chat else minutes


def _chat_minutes(minutes: float, spent: float) -> float:
    """What is left for the chat stage: about its share, whatever pre-training took."""
    share = CHAT_SHARE * minutes
    return max(share / 2, min(1.5 * share, minutes - spent))


def _plan(out: Path, asked: Settings) -> Plan:
    """The plan of this run, made once and kept."""
    path = out / "plan.json"
    if path.is_file():
        plan = Plan(**read_json(path))
        # Sums in another order give other last bits.
        torch.set_num_threads(plan.speed["threads"])
        return plan
    plan = make_plan(asked)
    write_json(path, asdict(plan))
    for rule in plan.rules:
        say(f"  {rule.name}: {rule.value}  ({rule.why})")
    speed = Speed(**plan.speed)
    say(
        f"this machine trains it at {speed.tokens_per_second:,.0f} tokens/s in {speed.compute_dtype} on "
        f"{speed.threads} threads: about {duration(plan.predicted['seconds'])}"
    )
    return plan


def make_plan(asked: Settings) -> Plan:
    """Shape, steps and rates for what was asked of `build`; measures this machine."""
    seconds = None
    if asked.minutes:
        whole = 60 * _pretraining_minutes(asked, asked.minutes)
        seconds = max(whole / 2, whole * TRAINING_SHARE - AROUND_TRAINING)
    context = asked.context or max(
        context_for(seconds=seconds, tokens=asked.tokens, flops=asked.flops),
        CHAT_CONTEXT if asked.chat else 0,
    )
    if asked.layers and asked.width:
        config = network(asked.layers, asked.width, 1, context)
        vocab = asked.vocab_size or vocabulary_for(config.matmul_parameters)
        config = replace(config, vocab_size=vocab)
        shape = Shape(config, rows_for(config.matmul_parameters, context), context)
    else:
        shape = shape_for(seconds=seconds, tokens=asked.tokens, flops=asked.flops, context=context)
        if asked.vocab_size:
            shape = replace(shape, config=replace(shape.config, vocab_size=asked.vocab_size))
    if asked.batch_tokens:
        if asked.batch_tokens < context:
            raise UserError(
                f"--batch-tokens is {asked.batch_tokens}; a step has at least one sequence of {context} tokens"
            )
        shape = replace(shape, rows=asked.batch_tokens // context)
    kind = asked.optimizer
    rates = rates_for(shape.config.hidden_size, kind=kind, learning_rate=asked.learning_rate)
    if asked.embedding_rate:
        rates = replace(rates, embedding=asked.embedding_rate)
    if asked.weight_decay is not None:
        rates = replace(rates, weight_decay=asked.weight_decay)
    speed = calibrate(Transformer(shape.config), shape.rows, context, kind)
    if seconds is not None:
        tokens = seconds * speed.tokens_per_second / MARGIN
    else:
        tokens = asked.tokens or (asked.flops or 0) / (6 * shape.config.matmul_parameters)
    if not asked.batch_tokens:
        shape = replace(shape, rows=min(shape.rows, max(1, int(tokens / (FEWEST_STEPS * context)))))
    steps = max(1, int(tokens / shape.step_tokens))
    weights, trained_on = shape.config.matmul_parameters, steps * shape.step_tokens
    law = remembered(law_key(asked))
    return Plan(
        layers=shape.config.num_layers,
        width=shape.config.hidden_size,
        vocab_size=shape.config.vocab_size,
        context=context,
        rows=shape.rows,
        steps=steps,
        rates=asdict(rates),
        z_loss=asked.z_loss,
        speed=asdict(speed),
        seconds=seconds,
        predicted={
            "seconds": trained_on / speed.tokens_per_second,
            "memory_bytes": peak_memory() + MEMORY_BESIDE,
            "bits_per_byte": None if law is None else law.predict(6.0 * weights * trained_on),
        },
    )


def reading_limit(tokens: int) -> int:
    """Bytes of text that are enough to train on so many tokens once."""
    return int(tokens * PLANNED_BYTES_PER_TOKEN * 1.3) + 500_000


def law_key(asked: Settings) -> str:
    """What a scaling law holds for: the corpus, and how it is trained on."""
    return fingerprint([source_fingerprint(asked.data), asked.context, asked.optimizer])


def peak_memory() -> int:
    """The most memory this process has had resident so far, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _network_of(plan: Plan, tokenizer: Tokenizer) -> ModelConfig:
    config = network(plan.layers, plan.width, tokenizer.vocab_size, plan.context)
    stops = (tokenizer.eos_id,) if tokenizer.eos_id is not None else ()
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_ids=stops, pad_token_id=tokenizer.pad_id)


def _pretrain(
    out: Path, directory: Path, plan: Plan, corpus: Corpus, asked: Settings, key: str, deadline: float | None
) -> Built:
    """Train the base and write it to ``directory``."""
    tokenizer = Tokenizer.load(out / "corpus" / "tokenizer")
    config = _network_of(plan, tokenizer)
    model = Transformer(config, compute_dtype=Speed(**plan.speed).dtype)
    initialize(model, asked.seed)
    stream = open_stream(out / "corpus" / "train.bin", config.vocab_size)
    held = open_stream(out / "corpus" / "heldout.bin", config.vocab_size)
    packing = pack(np.load(out / "corpus" / "train.starts.npy"), plan.context)
    # A pass over less than one step would fill it with copies.
    if packing.rows < plan.rows:
        raise UserError(
            f"the corpus has {len(stream):,} tokens, fewer than one step of {plan.rows} x {plan.context}; "
            f"give more text or a smaller --batch-tokens"
        )

    def batches_at(step: int) -> list[Batch]:
        parts = packed_batch(stream, packing, items_at(step, plan.rows, packing.rows, asked.seed))
        return [Batch(*(None if part is None else torch.from_numpy(part) for part in parts))]  # type: ignore[arg-type]

    byte_counts = [tokenizer.byte_length(index) for index in range(config.vocab_size)]
    starts, source_of = (np.load(out / "corpus" / f"heldout.{name}.npy") for name in ("starts", "sources"))
    names = read_json(out / "corpus" / "sources.json")

    def measured(tokens: int, dtype: torch.dtype | None) -> dict[str, Any]:
        each = max(plan.context, tokens // max(1, len(np.unique(source_of))))
        return heldout_bits(
            model,
            held,
            starts,
            source_of,
            names,
            byte_counts,
            plan.context,
            tokens_per_source=each,
            dtype=dtype,
        )

    # In the run a share of its time; the last figure is measured on more, and in float32.
    share = min(HELDOUT_TOKENS, int(EVALUATION_SHARE * plan.tokens / EVALUATIONS))

    grammar = read_pairs(asked.pairs) if asked.pairs else []

    def evaluate() -> dict[str, Any]:
        found = measured(share, None)
        if grammar:
            some = sample_pairs(grammar, PAIRS_IN_RUN)
            found["pair_accuracy"] = pair_accuracy(model, tokenizer, some)["accuracy"]
        return found

    recipe = Recipe(
        Schedule.of(plan.steps, warmup=0.02, cooldown=0.6),
        plan.rates["matrices"],
        rates=Rates(**{**plan.rates, "betas": tuple(plan.rates["betas"])}),
        z_loss=plan.z_loss,
        evaluate_every=max(1, math.ceil(plan.steps / EVALUATIONS)),
        deadline=deadline,
        threads=plan.speed["threads"],
    )
    trained = train(model, recipe, batches_at, out, fingerprint=key, title="pre-training", evaluate=evaluate)
    final = measured(HELDOUT_TOKENS, torch.float32)
    bits = final["bits_per_byte"]
    pairs = (
        pair_accuracy(model, tokenizer, sample_pairs(grammar, PAIRS_AT_END), dtype=torch.float32)
        if grammar
        else None
    )
    memory = peak_memory()
    model.compute_dtype = None  # written and sampled in float32
    with atomic_directory(directory) as temporary:
        save_model(model, temporary)
        tokenizer.save(temporary)
    samples = _samples(directory, held, tokenizer)
    return Built(
        model=str(directory),
        parameters=sum(p.numel() for p in model.parameters()),
        matmul_parameters=config.matmul_parameters,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 2),
        tokens_per_second=round(trained.tokens_per_second, 1),
        bits_per_byte=bits,
        pair_accuracy=None if pairs is None else {"accuracy": pairs["accuracy"], "pairs": pairs["pairs"]},
        bits_per_byte_by_source={name: one["bits_per_byte"] for name, one in final["sources"].items()},
        peak_memory_bytes=memory,
        predicted=plan.predicted,
        shortened=trained.shortened,
        corpus=corpus,
        compression={},
        samples=samples,
        steps=trained.steps,
        skipped=trained.skipped,
        history=trained.history,
    )


def _compression(out: Path, others: dict[str, Tokenizer]) -> dict[str, dict[str, float]]:
    """How many bytes a token holds on held-out text: the model's own, and of other tokenizers."""
    own = Tokenizer.load(out / "corpus" / "tokenizer")
    held = open_stream(out / "corpus" / "heldout.bin", own.vocab_size)
    starts = np.load(out / "corpus" / "heldout.starts.npy")
    texts: list[str] = []
    size = 0
    for begin, end in itertools.pairwise(starts.tolist()):
        texts.append(own.decode([int(token) for token in held[begin : end - 1]]))
        size += len(texts[-1])
        if size > COMPRESSION_SAMPLE:
            break
    return {
        name: {"vocab_size": tokenizer.vocab_size, "bytes_per_token": bytes_per_token(tokenizer, texts)}
        for name, tokenizer in {"this model": own, **others}.items()
    }


def _samples(
    directory: Path, held: NDArray[np.unsignedinteger], tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """Four continuations of held-out beginnings, to be read by a person."""
    from tercet.engine.load import load_engine
    from tercet.engine.request import Request, Sampling

    engine = load_engine(directory)
    ends = [0, *(np.flatnonzero(np.asarray(held) == tokenizer.eos_id) + 1).tolist()]
    prompts = [[int(token) for token in held[start : start + 16]] for start in ends[:4]]
    prompts = [prompt for prompt in prompts if len(prompt) == 16 and tokenizer.eos_id not in prompt] or [
        [int(token) for token in held[:16]]
    ]
    sampling = Sampling(max_tokens=80, temperature=0.7, top_p=0.95, seed=0)
    completions = engine.generate([Request(tuple(prompt), sampling) for prompt in prompts])
    return [
        {"prompt": tokenizer.decode(prompt), "continuation": completion.text}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def read_result(path: Path) -> Built:
    """What a finished run made, from its `result.json`."""
    stored = read_json(path)
    chat = stored.get("chat")
    return Built(
        **{**stored, "corpus": Corpus(**stored["corpus"]), "chat": Chatted(**chat) if chat else None}
    )
