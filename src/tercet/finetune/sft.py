"""Supervised fine-tuning: all weights, or low-rank adapters beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tercet.data.examples import CHATML, OverLength, prepare
from tercet.data.rows import read_rows
from tercet.errors import UserError, check_seed
from tercet.files import atomic_directory, fingerprint, read_json, read_text, write_json
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
from tercet.train.loop import STATE, Trained
from tercet.train.report import write_training_report
from tercet.train.supervised import Supervision, ending_with, fine_tune, full_rate, hold_out

Method = Literal["lora", "full"]


@dataclass(frozen=True)
class Tuning:
    """Settings of a run. Rates left at None follow from the size of the model."""

    method: Method = "lora"
    epochs: float = 3.0
    batch_size: int = 16  # examples an optimizer step
    learning_rate: float | None = None
    weight_decay: float = 0.0
    rank: int | None = None  # None: 16
    alpha: float | None = None  # None: twice the rank
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    max_tokens: int | None = None  # longest example; None: what the model can read, at most 2048
    over_length: OverLength = "drop"
    minutes: float | None = None  # fewer steps than the epochs ask for where they would take longer
    merge: bool = False  # write a merged checkpoint instead of an adapter
    device: str | None = None  # cuda, cuda:1, mps, cpu; None: the first of those that is there
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise UserError(f"method is {self.method!r}; it must be lora or full")
        checked_policy(self.over_length)
        for name in ("epochs", "batch_size", "learning_rate", "rank", "alpha", "max_tokens", "minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be a positive number")
        adapter = self.merge or self.rank_stabilised or self.alpha is not None or self.rank is not None
        if self.method == "full" and adapter:
            raise UserError(
                "--rank, --alpha, --rslora and --merge belong to --method lora; full tuning has no adapter"
            )
        check_seed(self.seed)


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


def checked_policy(name: str) -> OverLength:
    """The policy for over-long examples called ``name``. UserError when there is no such policy."""
    for policy in get_args(OverLength):
        if name == policy:
            found: OverLength = policy
            return found
    raise UserError(f"--over-length is {name!r}; it must be drop, truncate or error")


def checked_limit(directory: Path, max_tokens: int | None) -> int:
    """The longest example allowed: ``max_tokens``, by default what the model reads but at most 2048."""
    positions = read_config(directory).max_positions
    if max_tokens is not None and max_tokens > positions:
        raise UserError(f"--max-tokens is {max_tokens}, but {directory} reads at most {positions}")
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
                f"{directory} has no chat template; pass one with --chat-template FILE, "
                f"or give prompt and completion instead of messages"
            )
        say("the model has no chat template: using ChatML, whose markers its tokenizer knows")
        return tokenizer.with_template(CHATML)
    return tokenizer


def tune(
    model: str | Path,
    data: str | Path | Sequence[dict[str, Any]],
    out: str | Path,
    *,
    dev: str | Path | Sequence[dict[str, Any]] | None = None,
    chat_template: str | Path | None = None,
    **settings: Any,
) -> Tuned:
    """Fine-tune the checkpoint directory ``model`` on ``data`` and write the result to ``out/model``.

    data, dev: a file or rows in the forms `tercet.data.examples.render_row` lists. Without ``dev`` a
        twentieth of the examples is held out. The weights with the lowest held-out loss are kept.
    settings: fields of `Tuning`.

    Raises:
        UserError: bad data or settings; ``out`` belongs to another run.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    known = Tuning.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise UserError(f"tune has no setting {name!r}; it has {', '.join(known)}")
    tuning = Tuning(**settings)
    device = find_device(tuning.device)
    out = Path(out)
    source = resolve(model)
    rows = _rows(data)
    dev_rows = None if dev is None else _rows(dev)
    tokenizer = load_for_tuning(source, chat_template, rows)
    asked = {
        "model": str(source),
        "data": str(data) if isinstance(data, str | Path) else "rows given in Python",
        "dev": str(dev) if isinstance(dev, str | Path) else None,
        "chat_template": str(chat_template) if chat_template else None,
        **asdict(tuning),
    }
    key = fingerprint([asked, rows, dev_rows, weights_identity(source), tokenizer.fingerprint])
    with open_run(out, "tune", key, asked):
        if (out / "result.json").is_file():
            say(f"{out} is finished already; delete it or choose another --out to tune again")
            return Tuned(**read_json(out / "result.json"))
        base = str(model) if parse_reference(str(model)).kind == "hub" else str(source.resolve())
        return _run(source, base, tokenizer, rows, dev_rows, out, tuning, device, key)


def _rows(data: str | Path | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return read_rows(data) if isinstance(data, str | Path) else list(data)


def _run(
    source: Path,
    base: str,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    dev_rows: list[dict[str, Any]] | None,
    out: Path,
    tuning: Tuning,
    device: torch.device,
    key: str,
) -> Tuned:
    model = load_model(source, dtype=torch.float32, trainable=True)
    limit = checked_limit(source, tuning.max_tokens)
    prepared = prepare(rows, tokenizer, limit, tuning.over_length)
    if dev_rows is None:
        examples, held = hold_out(prepared.examples, tuning.seed)
    else:
        examples, held = prepared.examples, prepare(dev_rows, tokenizer, limit, "truncate").examples
    for line in prepared.account():
        say(line)

    adapter: AdapterConfig | None = None
    if tuning.method == "lora":
        rank = tuning.rank or 16
        adapter = AdapterConfig(
            r=rank,
            alpha=tuning.alpha or 2 * rank,
            use_rslora=tuning.rank_stabilised,
            base_model=base,
        )
        add_lora(model, adapter, tuning.seed)
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = tuning.learning_rate or learning_rate_for(parameters, tuning.method)

    trained = fine_tune(
        model,
        examples,
        held,
        out,
        Supervision(
            tuning.epochs,
            tuning.batch_size,
            rate,
            tuning.weight_decay,
            minutes=tuning.minutes,
            seed=tuning.seed,
        ),
        pad=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
        key=key,
        title=f"tuning ({tuning.method})",
    )
    _write(model, source, tokenizer, prepared.stops, out, adapter, tuning)
    tuned = Tuned(
        model=str(out / "model"),
        method=tuning.method,
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
    tuning: Tuning,
) -> None:
    generation = ending_with(stops, tokenizer, read_generation_config(source))
    with atomic_directory(out / "model") as directory:
        if adapter is not None and not tuning.merge:
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
