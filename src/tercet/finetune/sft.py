"""Supervised fine-tuning: all weights, or low-rank adapters beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tercet.data.examples import CHATML, prepare
from tercet.data.rows import read_rows
from tercet.errors import UserError
from tercet.files import atomic_directory, fingerprint, read_json, read_text, write_json
from tercet.finetune.settings import Rows, TuneSettings
from tercet.model.adapter import AdapterConfig, add_lora, merge_lora, save_adapter
from tercet.model.checkpoint import read_config, read_generation_config, weights_identity
from tercet.model.device import find_device
from tercet.model.loading import load_model, save_model
from tercet.model.reference import parse_reference
from tercet.model.source import directory_of
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.progress import duration, say
from tercet.run_directory import open_run
from tercet.settings import keyword_form
from tercet.train.loop import STATE, Trained
from tercet.train.report import write_training_report
from tercet.train.supervised import Supervision, ending_with, fine_tune, full_rate, hold_out


@dataclass(frozen=True)
class Tuned:
    """What `tune` made."""

    model: str  # a checkpoint directory, or an adapter directory
    method: str
    steps: int
    tokens: int  # supervised tokens trained on
    seconds: float
    loss: float  # best held-out loss, nats a token; these weights are the ones written
    best_step: int
    trainable_parameters: int
    shortened: bool  # the clock ended training early, so a rerun may give other numbers
    examples: int
    account: list[str] = field(default_factory=list)


def learning_rate_for(parameters: int, method: str) -> float:
    """Peak AdamW rate by size. LoRA: 5e-3 at 0.6M weights (2e-2 diverged there), 2e-4 at 7B; full: `full_rate`."""
    if method == "lora":
        return float(f"{min(5e-3, 5e-3 * (1e6 / parameters) ** 0.37):.2g}")
    return full_rate(parameters)


def resolve(reference: str | Path) -> Path:
    """The checkpoint directory of a local or Hub reference.

    Raises:
        UserError: it is a hosted model or an adapter, or there is nothing of that name.
    """
    found = parse_reference(str(reference))
    if found.kind == "adapter":
        raise UserError(f"{reference} is an adapter; tune its base, or merge it first (tercet tune --merge)")
    if found.kind == "transformers":
        raise UserError(
            f"{reference} runs through transformers; only models of Tercet's own network can be tuned"
        )
    if not found.is_local:
        raise UserError(f"{reference} is a hosted model: its weights are not here to be tuned")
    return directory_of(found)


def checked_limit(directory: Path, max_tokens: int | None) -> int:
    """The longest example allowed: ``max_tokens``, by default what the model reads but at most 2048."""
    positions = read_config(directory).max_positions
    if max_tokens is not None and max_tokens > positions:
        raise UserError(f"`max_tokens` is {max_tokens}, but {directory} reads at most {positions}")
    return max_tokens or min(2048, positions)


def load_for_tuning(
    directory: str | Path, chat_template: str | Path | None, rows: Sequence[dict[str, Any]]
) -> Tokenizer:
    """The tokenizer of ``directory``, with a chat template where the rows need one.

    Raises:
        UserError: the rows are conversations, the model has no template, and none can be supplied.
    """
    tokenizer = Tokenizer.load(directory)
    if chat_template is not None:
        return tokenizer.with_template(read_text(chat_template))
    conversational = any("messages" in row or isinstance(row.get("prompt"), list) for row in rows)
    if conversational and not tokenizer.chat_template:
        if tokenizer.id_of("<|im_start|>") is None or tokenizer.id_of("<|im_end|>") is None:
            raise UserError(
                f"{directory} has no chat template; pass one with `chat_template`, "
                f"or give prompt and completion instead of messages"
            )
        say("the model has no chat template: using ChatML, whose markers its tokenizer knows")
        return tokenizer.with_template(CHATML)
    return tokenizer


def tune_with(settings: TuneSettings) -> Tuned:
    """Fine-tune a model on rows of examples and write the result to ``out/model``.

    The parameters are the fields of `TuneSettings`. `tercet.data.examples.render_row` lists the forms of a row.
    Without ``dev`` a twentieth of the examples is held out. The weights with the lowest held-out loss are kept.
    An interrupted run resumes with the same call.

    Returns:
        The tuned model's path, its held-out loss and the account of the rows.

    Raises:
        UserError: bad data or settings, or ``out`` belongs to another run.
        KeyboardInterrupt: interrupted; the same call resumes the run.
    """
    device = find_device(settings.device)
    out = Path(settings.out)
    source = resolve(settings.model)
    rows = read_examples(settings.data)
    dev_rows = None if settings.dev is None else read_examples(settings.dev)
    tokenizer = load_for_tuning(source, settings.chat_template, rows)
    config = settings.to_config(source)
    key = fingerprint([config, rows, dev_rows, weights_identity(source), tokenizer.fingerprint])
    with open_run(out, "tune", key, config):
        if (out / "result.json").is_file():
            say(f"{out} is finished already; delete it or choose another `out` to tune again")
            return Tuned(**read_json(out / "result.json"))
        base = (
            str(settings.model)
            if parse_reference(str(settings.model)).kind == "hub"
            else str(source.resolve())
        )
        return _run(source, base, tokenizer, rows, dev_rows, out, settings, device, key)


def read_examples(data: str | Path | Rows) -> list[dict[str, Any]]:
    return read_rows(data) if isinstance(data, str | Path) else list(data)


def _run(
    source: Path,
    base: str,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    dev_rows: list[dict[str, Any]] | None,
    out: Path,
    settings: TuneSettings,
    device: torch.device,
    key: str,
) -> Tuned:
    model = load_model(source, dtype=torch.float32, trainable=True)
    limit = checked_limit(source, settings.max_tokens)
    prepared = prepare(rows, tokenizer, limit, settings.over_length)
    if dev_rows is None:
        examples, held = hold_out(prepared.examples, settings.seed)
    else:
        examples, held = prepared.examples, prepare(dev_rows, tokenizer, limit, "truncate").examples
    for line in prepared.account():
        say(line)

    adapter: AdapterConfig | None = None
    if settings.method == "lora":
        rank = settings.rank or 16
        adapter = AdapterConfig(
            r=rank,
            alpha=settings.alpha or 2 * rank,
            use_rslora=settings.rank_stabilised,
            base_model=base,
        )
        add_lora(model, adapter, settings.seed)
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = settings.learning_rate or learning_rate_for(parameters, settings.method)

    trained = fine_tune(
        model,
        examples,
        held,
        out,
        Supervision(
            settings.epochs,
            settings.batch_size,
            rate,
            settings.weight_decay,
            minutes=settings.minutes,
            seed=settings.seed,
        ),
        pad=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
        key=key,
        title=f"tuning ({settings.method})",
    )
    _write(model, source, tokenizer, prepared.stops, out, adapter, settings)
    tuned = Tuned(
        model=str(out / "model"),
        method=settings.method,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 2),
        loss=trained.best if trained.best is not None else math.nan,
        best_step=trained.best_step,
        trainable_parameters=count,
        shortened=trained.shortened,
        examples=len(examples),
        account=prepared.account(),
    )
    _report(out, tuned, trained, source, rate, parameters)
    write_json(out / "result.json", asdict(tuned))
    (out / STATE).unlink(missing_ok=True)  # nothing is left to resume
    return tuned


def _write(
    model: Transformer,
    source: Path,
    tokenizer: Tokenizer,
    stops: set[str],
    out: Path,
    adapter: AdapterConfig | None,
    settings: TuneSettings,
) -> None:
    generation = ending_with(stops, tokenizer, read_generation_config(source))
    with atomic_directory(out / "model") as directory:
        if adapter is not None and not settings.merge:
            save_adapter(model, directory, adapter)
            write_json(directory / "generation_config.json", generation)
        else:
            if adapter is not None:
                merge_lora(model)
            save_model(model, directory, generation=generation)
        tokenizer.save(directory)


def _report(out: Path, tuned: Tuned, trained: Trained, source: Path, rate: float, parameters: int) -> None:
    facts = {
        "base": str(source),
        "method": f"{tuned.method}: {tuned.trainable_parameters:,} of {parameters:,} weights trained",
        "data": "; ".join(tuned.account),
        "steps": f"{tuned.steps:,}, peak rate {rate:g}",
        "best held-out loss": f"{tuned.loss:.4f} nats a token, after step {tuned.best_step}; these weights were kept",
        "time": duration(tuned.seconds),
    }
    write_training_report(out, title="Tuned", facts=facts, history=trained.history, heldout="loss")


tune = keyword_form(TuneSettings, tune_with, "tune")
