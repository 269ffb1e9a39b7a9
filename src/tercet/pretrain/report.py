"""The page a build leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tercet.progress import duration
from tercet.train.report import write_training_report

if TYPE_CHECKING:
    from tercet.pretrain.planning import Plan
    from tercet.pretrain.pretrain import Built


def write_build_report(out: Path, built: Built, plan: Plan) -> None:
    """Write ``out/report.html``: facts, the plan beside the run, the loss curve, samples."""
    corpus = built.corpus
    facts = {
        "model": f"{plan.layers} layers, width {plan.width}, vocabulary {corpus.vocab_size:,}, context {plan.context}",
        "parameters": f"{built.parameters:,} ({built.matmul_parameters:,} in matrices)",
        "trained on": f"{built.tokens:,} tokens of {corpus.tokens:,} "
        f"({built.tokens / max(1, corpus.tokens):.2f} passes)",
        "corpus": f"{corpus.documents:,} documents, {corpus.bytes / 1e6:.1f} MB, "
        f"{corpus.bytes_per_token:.2f} bytes a token"
        + ("" if corpus.complete else "; the rest was not read, there was enough for the budget"),
        "held out": f"{corpus.heldout_bytes / 1e3:.0f} kB of {corpus.heldout_documents:,} documents",
        "bits per byte (held out)": f"{built.bits_per_byte:.3f}" + _by_source(built.bits_per_byte_by_source),
        "time": f"{duration(built.seconds)} at {built.tokens_per_second:,.0f} tokens/s "
        f"({plan.speed['compute_dtype']}, {plan.speed['threads']} threads)",
        "steps": f"{built.steps:,} of {plan.rows * plan.context:,} tokens",
    }
    facts["compression (held out)"] = ", ".join(
        f"{name}: {one['bytes_per_token']:.2f} bytes a token of {one['vocab_size']:,}"
        for name, one in built.compression.items()
    )
    if built.pair_accuracy is not None:
        facts["minimal pairs"] = (
            f"{built.pair_accuracy['accuracy']:.1%} of {built.pair_accuracy['pairs']:,.0f} right, 50% is chance"
        )
    expected = plan.predicted
    comparisons = [
        f"training {duration(expected['seconds'])} (took {duration(built.seconds)})",
        f"memory {expected['memory_bytes'] / 1e6:,.0f} MB (took {built.peak_memory_bytes / 1e6:,.0f})",
    ]
    if expected["bits_per_byte"] is not None:
        comparisons.append(
            f"{expected['bits_per_byte']:.3f} bits per byte (reached {built.bits_per_byte:.3f})"
        )
    facts["predicted"] = ", ".join(comparisons)
    facts |= {rule.name: f"{rule.value} ({rule.why})" for rule in plan.rules}
    if built.kept_step not in (None, built.steps):
        facts["weights"] = f"those of step {built.kept_step:,}: after it held-out text was foreseen worse"
    if built.skipped:
        facts["steps left out"] = f"{built.skipped:,}, whose gradient was not finite or a spike"
    if corpus.decontamination:
        facts["removed as test text"] = (
            f"{corpus.decontamination['passages_removed']:,} passages that hold one of "
            f"{corpus.decontamination['test_examples_found']:,} test examples, or a near-copy"
        )
    if built.chat is not None:
        chat = built.chat
        facts["chat"] = (
            f"{'; '.join(chat.account)}; {chat.steps:,} steps in {duration(chat.seconds)}, held-out loss "
            f"{chat.loss:.3f} nats a token; the base is in {chat.base}"
        )
    write_training_report(
        out,
        title="Built from raw text",
        facts=facts,
        history=built.history,
        heldout="bits_per_byte",
        samples=[*built.samples, *(built.chat.samples if built.chat else ())],
    )


def _by_source(bits: dict[str, float]) -> str:
    if len(bits) < 2:
        return ""
    shown = sorted(bits.items(), key=lambda item: -item[1])
    rest = f" and {len(shown) - 8} more sources" if len(shown) > 8 else ""
    return " (" + ", ".join(f"{name} {value:.3f}" for name, value in shown[:8]) + rest + ")"
