"""Build a model from raw text: corpus, tokenizer, shape, training, checkpoint, report."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tercet.data.batches import IGNORED, items_at
from tercet.data.decontaminate import Decontaminator
from tercet.data.documents import read_documents, source_fingerprint
from tercet.data.minimal_pairs import read_pairs, sample_pairs
from tercet.data.packing import batch as packed_batch
from tercet.data.packing import pack
from tercet.errors import UserError
from tercet.files import atomic_directory, fingerprint, read_json, write_json
from tercet.host import peak_memory
from tercet.model.config import ModelConfig
from tercet.model.device import find_device
from tercet.model.loading import save_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.pretrain.chat import Chatted, conversation_texts, learn_to_chat, read_conversations
from tercet.pretrain.corpus import Corpus, open_stream, prepare
from tercet.pretrain.initialize import initialize, look_nearby
from tercet.pretrain.plan import FEW_PASSES, network
from tercet.pretrain.planning import (
    CHAT_SHARE,
    MARGIN,
    Plan,
    for_text,
    kept_plan,
    pretraining_minutes,
    reading_limit,
    rows_at_once,
)
from tercet.pretrain.report import write_build_report
from tercet.pretrain.settings import BuildSettings
from tercet.pretrain.vocabulary import bytes_per_token, load_tokenizer
from tercet.progress import say
from tercet.run_directory import open_run
from tercet.train.calibrate import Speed
from tercet.train.compilation import compile_blocks
from tercet.train.evaluate import heldout_bits, pair_accuracy
from tercet.train.loop import STATE, Recipe, train
from tercet.train.loss import Batch
from tercet.train.optimizer import Rates
from tercet.train.ranks import Ranks, open_ranks
from tercet.train.schedule import Schedule
from tercet.train.state import FileState

if TYPE_CHECKING:
    from tercet.train.sharded import ShardedState

EVALUATIONS = 5  # held-out measurements in a run
EVALUATION_SHARE = (
    0.03  # of the tokens trained on are measured in all of them; a token costs a third of training
)
PAIRS_IN_RUN, PAIRS_AT_END = 5, 50  # minimal pairs of each group that are compared
COMPRESSION_SAMPLE = 2_000_000  # characters of held-out text
HELDOUT_TOKENS = 65_536  # of the last measurement: they pin bits per byte to under 1%
CHAT_EPOCHS = 3.0
LEARNED_BY_HEART = 1.01  # times the least held-out loss, at the end of a run
BASE_RESULT = "pretraining.json"  # of the base, before what comes after it
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
    kept_step: int | None = (
        None  # of which the weights are: the last, or the best where text is seen again and again
    )
    chat: Chatted | None = None  # what made a chat model of the base; the other figures are the base's


Clean = Callable[[BuildSettings, Path], Sequence[str]]


def pretrain(asked: BuildSettings, clean: Clean | None = None) -> Built:
    """Train a tokenizer and a Qwen3-shaped network and write them to ``out/model``; `tercet.build` calls this.

    Args:
        asked: the settings.
        clean: curates the data into a directory and returns the sources to train on; called when the setting
            ``curate`` is not None.

    Raises:
        UserError: bad data, or ``out`` belongs to another run.
        KeyboardInterrupt: interrupted; the same call resumes the run.
    """
    out = Path(asked.out)
    begun = time.monotonic()
    if asked.pairs:
        read_pairs(asked.pairs)  # report a mistake in them before any work
    others = {name: load_tokenizer(name) for name in asked.compare_tokenizers}
    conversations = read_conversations(asked.chat) if asked.chat else []
    key = fingerprint(
        [asked.to_config(), source_fingerprint(asked.sources), list(asked.exclude), conversations]
    )
    with open_ranks() as ranks:
        if asked.parallel is not None and not ranks.launched:
            raise UserError(
                "`parallel` is for several processes: torchrun --nproc-per-node N -m tercet build ..."
            )
        with open_run(out, "build", key, asked.to_config()) if ranks.first else nullcontext():
            if ranks.first_then_all((out / "result.json").is_file):
                say(f"{out} is finished already; delete it or choose another `out` to build again")
                return read_result(out / "result.json")
            plan, corpus = ranks.first_then_all(
                lambda: _prepare(out, asked, ranks, conversations, key, clean)
            )
            if plan.rows < ranks.size:
                raise UserError(
                    f"a step of this run has {plan.rows} rows, fewer than the {ranks.size} processes; start fewer"
                )
            deadline = None
            if asked.minutes is not None and plan.seconds is not None:
                # What reading and the tokenizer really left, should they have taken longer than their share.
                left = 60 * pretraining_minutes(asked, asked.minutes) - (time.monotonic() - begun) - RESERVE
                deadline = max(0.5 * plan.seconds, min(left, plan.seconds * MARGIN))
            kept = out / BASE_RESULT
            if not ranks.first_then_all(kept.is_file):
                directory = out / ("base" if asked.chat else "model")
                base = _pretrain(out, directory, plan, corpus, asked, key, deadline, ranks)
                if base is not None:
                    write_json(kept, asdict(base))
                # What resumes it is not needed any more; the chat stage has a state of its own.
                state_of(out, asked, ranks).remove()
            return ranks.first_then_all(lambda: _finish(out, plan, conversations, others, asked, key, begun))


def _prepare(
    out: Path,
    asked: BuildSettings,
    ranks: Ranks,
    conversations: list[dict[str, Any]],
    key: str,
    clean: Clean | None,
) -> tuple[Plan, Corpus]:
    """The plan and the corpus of a run: made, or found in its directory."""
    plan = kept_plan(out, asked, ranks)
    sources: Sequence[str] = asked.sources
    if asked.curate is not None:
        assert clean is not None
        sources = clean(asked, out / "curated")
    skipped: Counter[str] = Counter()
    corpus = prepare(
        read_documents(sources, skipped),
        out / "corpus",
        planned_vocabulary=plan.vocab_size,
        vocab_size=asked.vocab_size,
        digits=asked.digits,
        whitespace=asked.whitespace,
        limit=reading_limit(plan, asked),
        decontaminator=Decontaminator(asked.exclude) if asked.exclude else None,
        vocabulary=conversation_texts(conversations),
        key=key,
    )
    for reason, count in skipped.most_common():
        say(f"skipped {count:,}: {reason}")
    return for_text(plan, asked, corpus.tokens), corpus


def _finish(
    out: Path,
    plan: Plan,
    conversations: list[dict[str, Any]],
    others: dict[str, Tokenizer],
    asked: BuildSettings,
    key: str,
    begun: float,
) -> Built:
    """The chat stage, where there is one, and the report."""
    if (out / "result.json").is_file():
        return read_result(out / "result.json")
    built = read_result(out / BASE_RESULT)
    if asked.chat:
        spent = (time.monotonic() - begun + RESERVE) / 60
        chat = learn_to_chat(
            out / "base",
            conversations,
            out / "chat",
            out / "model",
            epochs=asked.chat_epochs or CHAT_EPOCHS,
            minutes=None if asked.minutes is None else _chat_minutes(asked.minutes, spent),
            seed=asked.seed,
            key=key,
            device=find_device(asked.device),
        )
        built = replace(built, model=str(out / "model"), chat=chat)
    built = replace(built, compression=_compression(out, others))
    write_build_report(out, built, plan)
    write_json(out / "result.json", asdict(built))
    (out / BASE_RESULT).unlink()
    return built


def state_of(out: Path, asked: BuildSettings, ranks: Ranks) -> FileState | ShardedState:
    """Where a run keeps what it needs to go on."""
    if asked.parallel == "fsdp":
        from tercet.train.sharded import ShardedState

        return ShardedState(out, ranks)
    return FileState(out / STATE, ranks)


def _chat_minutes(minutes: float, spent: float) -> float:
    """What is left for the chat stage: about its share, whatever pre-training took."""
    share = CHAT_SHARE * minutes
    return max(share / 2, min(1.5 * share, minutes - spent))


def _network_of(plan: Plan, tokenizer: Tokenizer) -> ModelConfig:
    config = network(plan.layers, plan.width, tokenizer.vocab_size, plan.context)
    stops = (tokenizer.eos_id,) if tokenizer.eos_id is not None else ()
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_ids=stops, pad_token_id=tokenizer.pad_id)


def _pretrain(
    out: Path,
    directory: Path,
    plan: Plan,
    corpus: Corpus,
    asked: BuildSettings,
    key: str,
    deadline: float | None,
    ranks: Ranks,
) -> Built | None:
    """Train the base and write it to ``directory``; None in all processes but the first."""
    tokenizer = Tokenizer.load(out / "corpus" / "tokenizer")
    config = _network_of(plan, tokenizer)
    model = Transformer(config, compute_dtype=Speed(**plan.speed).dtype)
    initialize(model, asked.seed)
    look_nearby(model)
    device = ranks.device(asked.device)
    model.to(device)
    if plan.speed.get("compiled"):
        compile_blocks(model)
    sharded = asked.parallel == "fsdp"
    if sharded:
        from tercet.train.sharded import shard

        shard(model, ranks)
    stream = open_stream(out / "corpus" / "train.bin", config.vocab_size)
    held = open_stream(out / "corpus" / "heldout.bin", config.vocab_size)
    packing = pack(np.load(out / "corpus" / "train.starts.npy"), plan.context)
    # A pass over less than one step would fill it with copies.
    if packing.rows < plan.rows:
        raise UserError(
            f"the corpus has {len(stream):,} tokens, fewer than one step of {plan.rows} x {plan.context}; "
            f"give more text or a smaller `batch_tokens`"
        )

    most = -(-plan.rows // ranks.size)  # rows that a process has of a step
    at_once = rows_at_once(most, config, device)

    def batches_at(step: int) -> list[Batch]:
        rows = items_at(step, plan.rows, packing.rows, asked.seed)[ranks.rank :: ranks.size]
        found = []
        for begin in range(0, most, at_once):
            # As many parts in every process, since they wait for each other where they share the weights.
            some = rows[begin : begin + at_once] or rows[:1]
            parts = packed_batch(stream, packing, some)
            batch = Batch(*(None if part is None else torch.from_numpy(part) for part in parts))  # type: ignore[arg-type]
            if begin >= len(rows):
                batch.targets.fill_(IGNORED)
            found.append(batch)
        return found

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
        threads=ranks.threads(plan.speed["threads"]),
    )
    # Text that is seen again and again is learned by heart, and what is held out is then foreseen worse.
    keep_best = plan.tokens > FEW_PASSES * len(stream) and not sharded
    trained = train(
        model,
        recipe,
        batches_at,
        out,
        fingerprint=key,
        title="pre-training",
        evaluate=evaluate,
        keep_best=keep_best,
        ranks=ranks,
        sharded=sharded,
    )
    if (
        keep_best
        and trained.best is not None
        and trained.history[-1]["loss"] > LEARNED_BY_HEART * trained.best
    ):
        say(
            f"held-out text was foreseen best at step {trained.best_step} of {trained.steps}, and those weights are "
            f"kept: {trained.tokens / len(stream):.1f} passes over so little text taught this network it by heart; "
            "more text, fewer passes or a smaller network would do better"
        )
    if sharded:
        from tercet.train.sharded import whole

        model = whole(model)
    if not ranks.first:
        return None
    final = measured(HELDOUT_TOKENS, torch.float32)
    bits = final["bits_per_byte"]
    pairs = (
        pair_accuracy(model, tokenizer, sample_pairs(grammar, PAIRS_AT_END), dtype=torch.float32)
        if grammar
        else None
    )
    memory = peak_memory(device)
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
        kept_step=trained.best_step if keep_best else trained.steps,
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
