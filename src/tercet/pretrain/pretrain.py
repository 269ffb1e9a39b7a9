"""Build a model from raw text: corpus, tokenizer, shape, training, checkpoint, report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tercet.data.decontaminate import Decontaminator
from tercet.data.documents import read_documents, source_fingerprint
from tercet.data.minimal_pairs import read_pairs
from tercet.errors import UserError
from tercet.files import fingerprint, write_json
from tercet.model.device import find_device
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.base import Run, train_base
from tercet.pretrain.chat import conversation_texts, learn_to_chat, read_conversations
from tercet.pretrain.corpus import Corpus, prepare_corpus
from tercet.pretrain.heldout import compression
from tercet.pretrain.planning import (
    CHAT_SHARE,
    MARGIN,
    Plan,
    fit_to_text,
    pretraining_minutes,
    reading_limit,
    stored_plan,
)
from tercet.pretrain.report import write_build_report
from tercet.pretrain.result import Built, read_result
from tercet.pretrain.settings import BuildSettings
from tercet.pretrain.vocabulary import load_tokenizer
from tercet.progress import say
from tercet.run_directory import open_run
from tercet.train.ranks import open_ranks

CHAT_EPOCHS = 3.0
BASE_RESULT = "pretraining.json"  # of the base model, until the chat stage and the report are finished
RESERVE = 4.0  # seconds at the end for the checkpoint, samples and the report


Clean = Callable[[BuildSettings, Path], Sequence[str]]


def pretrain(settings: BuildSettings, clean: Clean | None = None) -> Built:
    """Train a tokenizer and a Qwen3-shaped network and write them to ``out/model``; `tercet.build` calls this.

    Args:
        settings: Of the build.
        clean: Curates the data into a directory and returns the sources to train on; called when the setting
            ``curate`` is not None.

    Raises:
        UserError: Bad data, or ``out`` belongs to another run.
        KeyboardInterrupt: Interrupted; the same call resumes the run.
    """
    out = Path(settings.out)
    started = time.monotonic()
    if settings.pairs:
        read_pairs(settings.pairs)  # report a mistake in them before any work
    tokenizers = {name: load_tokenizer(name) for name in settings.compare_tokenizers}
    conversations = read_conversations(settings.chat) if settings.chat else []
    key = fingerprint(
        [settings.identity, source_fingerprint(settings.sources), list(settings.exclude), conversations]
    )
    with open_ranks() as ranks:
        if settings.parallel is not None and not ranks.launched:
            raise UserError(
                "`parallel` needs several processes: torchrun --nproc-per-node N -m tercet build ..."
            )
        run = Run(out, settings, key, ranks)
        with open_run(out, "build", key, settings.to_config()) if ranks.first else nullcontext():
            if ranks.first_then_all((out / "result.json").is_file):
                say(f"{out} is already finished; delete it to build again, or choose another directory")
                return read_result(out / "result.json")
            plan, corpus = ranks.first_then_all(lambda: _prepare(run, conversations, clean))
            if plan.rows < ranks.size:
                raise UserError(
                    f"a step of this run has {plan.rows} rows, fewer than the {ranks.size} processes; start fewer processes"
                )
            if not ranks.first_then_all((out / BASE_RESULT).is_file):
                directory = out / ("base" if settings.chat else "model")
                base = train_base(run, directory, plan, corpus, _deadline(settings, plan, started))
                if base is not None:
                    write_json(out / BASE_RESULT, asdict(base))
                # It is not needed any more; the chat stage has a state of its own.
                run.training_state().remove()
            return ranks.first_then_all(lambda: _finish(run, plan, conversations, tokenizers, started))


def _deadline(settings: BuildSettings, plan: Plan, started: float) -> float | None:
    """Return the seconds of training after which the run must end early; None without a budget in minutes.

    Reading and the tokenizer may have taken longer than planned, so the deadline counts what is really left.
    """
    if settings.minutes is None or plan.seconds is None:
        return None
    left = 60 * pretraining_minutes(settings, settings.minutes) - (time.monotonic() - started) - RESERVE
    return max(0.5 * plan.seconds, min(left, plan.seconds * MARGIN))


def _prepare(run: Run, conversations: list[dict[str, Any]], clean: Clean | None) -> tuple[Plan, Corpus]:
    """Make the plan and the corpus of a run, or read them from its directory."""
    settings = run.settings
    plan = stored_plan(run.directory, settings, run.ranks)
    sources: Sequence[str] = settings.sources
    if settings.curate is not None:
        assert clean is not None
        sources = clean(settings, run.directory / "curated")
    skipped: Counter[str] = Counter()
    corpus = prepare_corpus(
        read_documents(sources, skipped, allow_partial=settings.allow_partial),
        run.corpus_directory,
        planned_vocabulary=plan.vocab_size,
        vocab_size=settings.vocab_size,
        digits=settings.digits,
        whitespace=settings.whitespace,
        limit=reading_limit(plan, settings),
        decontaminator=Decontaminator(settings.exclude) if settings.exclude else None,
        vocabulary=conversation_texts(conversations),
        key=run.key,
    )
    for reason, count in skipped.most_common():
        say(f"skipped {count:,}: {reason}")
    return fit_to_text(plan, settings, corpus.tokens), corpus


def _finish(
    run: Run,
    plan: Plan,
    conversations: list[dict[str, Any]],
    tokenizers: dict[str, Tokenizer],
    started: float,
) -> Built:
    """Run the chat stage, if it is configured, and write the report and the result."""
    out, settings = run.directory, run.settings
    if (out / "result.json").is_file():
        return read_result(out / "result.json")
    built = read_result(out / BASE_RESULT)
    if settings.chat:
        spent = (time.monotonic() - started + RESERVE) / 60
        chat = learn_to_chat(
            out / "base",
            conversations,
            out / "chat",
            out / "model",
            epochs=settings.chat_epochs or CHAT_EPOCHS,
            minutes=None if settings.minutes is None else _chat_minutes(settings.minutes, spent),
            seed=settings.seed,
            key=run.key,
            device=find_device(settings.device),
        )
        built = replace(built, model=str(out / "model"), chat=chat)
    built = replace(built, compression=compression(run.corpus_directory, tokenizers))
    write_build_report(out, built, plan)
    write_json(out / "result.json", asdict(built))
    (out / BASE_RESULT).unlink()
    return built


def _chat_minutes(minutes: float, spent: float) -> float:
    """Return the minutes left for the chat stage: about its share, however long pre-training took."""
    share = CHAT_SHARE * minutes
    return max(share / 2, min(1.5 * share, minutes - spent))
