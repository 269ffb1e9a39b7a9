"""Supervised fine-tuning of all weights, or of low-rank adapters (LoRA)."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch

from tercet.data.examples import check_embedding, prepare
from tercet.files import read_json, write_json
from tercet.finetune.inputs import Inputs, read_inputs, token_limit
from tercet.finetune.result import Tuned, training_outlook, write_model, write_report
from tercet.finetune.settings import TuneSettings
from tercet.model.adapter import AdapterConfig, add_lora
from tercet.model.checkpoint import read_generation_config
from tercet.model.device import find_device
from tercet.model.gguf_index import holds_gguf
from tercet.model.loading import load_model
from tercet.model.transformer import Transformer
from tercet.progress import say
from tercet.run_directory import open_run
from tercet.settings import keyword_form
from tercet.train.loop import STATE
from tercet.train.supervised import MARGIN, PLAN, Supervision, ending_with, fine_tune, full_rate, hold_out

DEFAULT_RANK = 16


def learning_rate_for(parameters: int, method: str) -> float:
    """Return the peak AdamW rate for a model of this size.

    LoRA: a power law through 5e-3 at 0.6M weights (2e-2 diverged there) and 2e-4 at 7B; full: `full_rate`.
    """
    if method == "lora":
        return float(f"{min(5e-3, 5e-3 * (1e6 / parameters) ** 0.37):.2g}")
    return full_rate(parameters)


def tune_with(settings: TuneSettings) -> Tuned:
    """Fine-tune a model on rows of examples and write the result to ``out/model``.

    The parameters are the fields of `TuneSettings`. `tercet.data.row_forms` describes the forms of
    a row. Without ``dev`` a twentieth of the examples is held out. The result has the weights with the lowest
    held-out loss. An interrupted run resumes with the same call.

    Returns:
        The tuned model's path, its held-out loss and the account of the rows.

    Raises:
        UserError: Bad data or settings, or ``out`` belongs to another run.
        KeyboardInterrupt: Interrupted; the same call resumes the run.
    """
    device = find_device(settings.device)
    out = Path(settings.out)
    inputs = read_inputs(settings)
    config = settings.to_config(_lasting_place(inputs))
    key = inputs.fingerprint(config)
    with open_run(out, "tune", key, config):
        if (out / "result.json").is_file():
            say(f"{out} is already finished; delete it to tune again, or choose another directory")
            return Tuned(**read_json(out / "result.json"))
        return _run(inputs, settings, out, device, key)


def _lasting_place(inputs: Inputs) -> Path:
    """Return what names the model in config.yaml: a GGUF file itself, rather than its directory in the cache."""
    return Path(inputs.base_model) if holds_gguf(inputs.checkpoint) else inputs.checkpoint


def _run(inputs: Inputs, settings: TuneSettings, out: Path, device: torch.device, key: str) -> Tuned:
    """Train, and write the model, the report and the result to ``out``."""
    tokenizer = inputs.tokenizer
    if holds_gguf(inputs.checkpoint):
        result = (
            "an adapter for these weights"
            if settings.method == "lora" and not settings.merge
            else "a checkpoint"
        )
        say(
            f"{inputs.base_model} is a GGUF file: its weights are dequantised to float32, and the result is {result}"
        )
    model = load_model(inputs.checkpoint, dtype=torch.float32, trainable=True)
    limit = token_limit(inputs.checkpoint, settings.max_tokens)
    control = settings.control_tokens
    prepared = prepare(inputs.rows, tokenizer, limit, settings.over_length, control_tokens=control)
    account = prepared.account()
    if inputs.dev_rows is None:
        examples, held_out = hold_out(prepared.examples, settings.seed)
    else:
        prepared_dev = prepare(inputs.dev_rows, tokenizer, limit, "truncate", control_tokens=control)
        examples, held_out = prepared.examples, prepared_dev.examples
        account += [f"held out: {line}" for line in prepared_dev.account()]
    check_embedding([*examples, *held_out], tokenizer, model.config.vocab_size)
    for line in account:
        say(line)

    adapter = _add_adapter(model, inputs.base_model, settings) if settings.method == "lora" else None
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = settings.learning_rate or learning_rate_for(parameters, settings.method)

    trained = fine_tune(
        model,
        examples,
        held_out,
        out,
        Supervision(
            settings.epochs,
            settings.batch_size,
            rate,
            settings.weight_decay,
            minutes=settings.minutes,
            seed=settings.seed,
            patience=settings.patience or 0,
        ),
        key=key,
        title=f"tuning ({settings.method})",
    )
    plan = read_json(out / PLAN)
    pace = MARGIN * plan["seconds_per_step"]
    if trained.shortened:  # the machine was slower than planned
        pace = trained.seconds / max(trained.steps, 1)
    generation = ending_with(prepared.stops, tokenizer, read_generation_config(inputs.checkpoint))
    write_model(model, adapter, tokenizer, generation, out / "model", merge=settings.merge)
    tuned = Tuned(
        model=str(out / "model"),
        method=settings.method,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 2),
        loss=trained.best if trained.best is not None else math.nan,
        best_step=trained.best_step,
        trainable_parameters=trainable_parameters,
        shortened=trained.shortened,
        examples=len(examples),
        account=account,
        whole_steps=plan["whole_steps"],
        outlook=training_outlook(trained, plan["steps"], plan["whole_steps"], pace, settings.epochs),
    )
    if tuned.outlook:
        say(tuned.outlook)
    write_report(out, tuned, trained, inputs.checkpoint, rate, parameters)
    write_json(out / "result.json", asdict(tuned))
    (out / STATE).unlink(missing_ok=True)  # a finished run has nothing to resume
    return tuned


def _add_adapter(model: Transformer, base_model: str, settings: TuneSettings) -> AdapterConfig:
    """Add a low-rank adapter to ``model``, whose own weights are then frozen; return its configuration."""
    rank = settings.rank or DEFAULT_RANK
    adapter = AdapterConfig(
        r=rank,
        alpha=settings.alpha or 2 * rank,
        use_rslora=settings.rank_stabilised,
        base_model=base_model,
    )
    add_lora(model, adapter, settings.seed)
    return adapter


tune = keyword_form(TuneSettings, tune_with, "tune")
