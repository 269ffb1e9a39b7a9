"""The report page of a build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tercet.pretrain.planning import Plan
from tercet.pretrain.result import Built
from tercet.progress import duration
from tercet.train.report import write_training_report

SOURCES = 8  # shown by name, those with the highest loss first


def write_build_report(out: Path, built: Built, plan: Plan) -> None:
    """Write ``out/report.html``: facts, the plan beside the run, the loss curve, samples."""
    write_training_report(
        out,
        title="Built from raw text",
        facts={**_run_facts(built, plan), **_plan_facts(built, plan), **_exceptions(built)},
        history=built.history,
        heldout="bits_per_byte",
        samples=[*built.samples, *(built.chat.samples if built.chat else ())],
    )


def _run_facts(built: Built, plan: Plan) -> dict[str, str]:
    corpus = built.corpus
    facts = {
        "model": f"{plan.layers} layers, width {plan.width}, vocabulary {corpus.vocab_size:,}, context {plan.context}",
        "parameters": f"{built.parameters:,} ({built.matmul_parameters:,} in matrices)",
        "trained on": f"{built.tokens:,} tokens of {corpus.tokens:,} "
        f"({built.tokens / max(1, corpus.tokens):.2f} epochs)",
        "corpus": f"{corpus.documents:,} documents, {corpus.bytes / 1e6:.1f} MB, "
        f"{corpus.bytes_per_token:.2f} bytes per token"
        + ("" if corpus.complete else "; the rest was not read, because this is enough for the budget"),
        "held out": f"{corpus.heldout_bytes / 1e3:.0f} kB of {corpus.heldout_documents:,} documents",
        "bits per byte (held out)": f"{built.bits_per_byte:.3f}" + _by_source(built.bits_per_byte_by_source),
        "time": f"{duration(built.seconds)} at {built.tokens_per_second:,.0f} tokens/s "
        f"({plan.speed['compute_dtype']}, {plan.speed['threads']} threads)",
        "steps": f"{built.steps:,} of {plan.rows * plan.context:,} tokens",
        "compression (held out)": ", ".join(
            f"{name}: {measured['bytes_per_token']:.2f} bytes per token, vocabulary {measured['vocab_size']:,}"
            for name, measured in built.compression.items()
        ),
    }
    if built.pair_accuracy is not None:
        facts["minimal pairs"] = (
            f"{built.pair_accuracy['accuracy']:.1%} of {built.pair_accuracy['pairs']:,.0f} correct; chance is 50%"
        )
    return facts


def _plan_facts(built: Built, plan: Plan) -> dict[str, str]:
    predicted = plan.predicted
    comparisons = [
        f"training {duration(predicted['seconds'])} (measured {duration(built.seconds)})",
        f"memory {predicted['memory_bytes'] / 1e6:,.0f} MB (measured {built.peak_memory_bytes / 1e6:,.0f})",
    ]
    if predicted["bits_per_byte"] is not None:
        comparisons.append(
            f"{predicted['bits_per_byte']:.3f} bits per byte (measured {built.bits_per_byte:.3f})"
        )
    rules = {rule.name: f"{rule.value} ({rule.why})" for rule in plan.rules}
    return {"predicted": ", ".join(comparisons), **rules}


def _exceptions(built: Built) -> dict[str, str]:
    """Return the facts that only some builds have."""
    facts: dict[str, str] = {}
    if built.kept_step not in (None, built.steps):
        facts["weights"] = f"of step {built.kept_step:,}; the held-out loss rose after it"
    if built.skipped:
        facts["skipped steps"] = (
            f"{built.skipped:,}, because the gradient was not finite or suddenly very large"
        )
    removed = built.corpus.decontamination
    if removed:
        facts["removed test text"] = (
            f"{removed['passages_removed']:,} passages with one of "
            f"{removed['test_examples_found']:,} test examples, or a near-copy of it"
        )
    if built.chat is not None:
        chat = built.chat
        facts["chat"] = (
            f"{'; '.join(chat.account)}; {chat.steps:,} steps in {duration(chat.seconds)}, held-out loss "
            f"{chat.loss:.3f} nats per token; the base model is in {chat.base}"
        )
    return facts


def _by_source(bits: Mapping[str, float]) -> str:
    if len(bits) < 2:
        return ""
    ordered = sorted(bits.items(), key=lambda item: -item[1])
    rest = f" and {len(ordered) - SOURCES} more sources" if len(ordered) > SOURCES else ""
    return " (" + ", ".join(f"{name} {value:.3f}" for name, value in ordered[:SOURCES]) + rest + ")"
