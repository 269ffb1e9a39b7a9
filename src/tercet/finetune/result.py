"""The result of a fine-tuning run, and the files that hold it: the model and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tercet.files import atomic_directory, write_json
from tercet.model.adapter import AdapterConfig, merge_lora, save_adapter
from tercet.model.loading import save_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.progress import duration
from tercet.train.forecast import forecast_loss
from tercet.train.loop import Trained
from tercet.train.report import write_training_report


@dataclass(frozen=True)
class Tuned:
    """The result of `tercet.tune`."""

    model: str  # a checkpoint directory, or an adapter directory
    method: str
    steps: int
    tokens: int  # supervised tokens trained on
    seconds: float
    loss: float  # lowest held-out loss, nats per token; the model has the weights of that step
    best_step: int
    trainable_parameters: int
    shortened: bool  # the time limit ended training early, so a rerun may give other numbers
    examples: int
    account: list[str] = field(default_factory=list)  # how many rows became examples, and why not the others
    whole_steps: int = 0  # of all epochs; more than ``steps`` where the time limit allowed fewer
    outlook: str = (
        ""  # what training for longer would give, in words; "" where nothing says that it would help
    )


def training_outlook(
    trained: Trained, planned_steps: int, whole_steps: int, seconds_per_step: float, epochs: float
) -> str:
    """Return what training for longer would give, in words.

    Args:
        trained: The run.
        planned_steps: Steps that the time allows; the run took fewer where its patience was used up.
        whole_steps: Steps of all epochs.
        seconds_per_step: Of a longer run, evaluations included.
        epochs: Number of epochs.
    """
    losses = [entry["loss"] for entry in trained.history]
    falling = len(losses) > 1 and losses[-1] == min(losses)
    if trained.steps < planned_steps and not trained.shortened:
        return ""
    if trained.steps >= whole_steps:
        return "the held-out loss was still falling at the end: more epochs may help" if falling else ""
    share = epochs * trained.steps / whole_steps
    text = (
        f"training reached {share:.2g} of {epochs:g} epochs; all of them take about "
        f"{duration(whole_steps * seconds_per_step)} here"
    )
    if not falling:
        return text
    forecast = forecast_loss(trained.history, whole_steps)
    if forecast.loss is None:
        return f"{text} (no forecast: {forecast.reason})"
    return f"{text}, and the held-out loss, {losses[-1]:.2f} now, would be about {forecast.loss:.2f} by a power law"


def write_model(
    model: Transformer,
    adapter: AdapterConfig | None,
    tokenizer: Tokenizer,
    generation: dict[str, Any],
    target: Path,
    *,
    merge: bool,
) -> None:
    """Write the tuned model to the directory ``target``, which appears complete or not at all.

    Args:
        model: The network, with an adapter where ``adapter`` is not None.
        adapter: The adapter's configuration.
        tokenizer: The model's tokenizer.
        generation: The content of ``generation_config.json``.
        target: The directory to write.
        merge: Merge the adapter into the weights, instead of writing only the adapter.
    """
    with atomic_directory(target) as directory:
        if adapter is not None and not merge:
            save_adapter(model, directory, adapter)
            write_json(directory / "generation_config.json", generation)
        else:
            if adapter is not None:
                merge_lora(model)
            save_model(model, directory, generation=generation)
        tokenizer.save(directory)


def write_report(
    out: Path, tuned: Tuned, trained: Trained, checkpoint: Path, rate: float, parameters: int
) -> None:
    """Write ``out/report.html``.

    Args:
        out: The run directory.
        tuned: The result.
        trained: The result of the training loop, for its history.
        checkpoint: The directory of the base model.
        rate: The peak learning rate.
        parameters: Number of all weights.
    """
    facts = {
        "base": str(checkpoint),
        "method": f"{tuned.method}: {tuned.trainable_parameters:,} of {parameters:,} weights trained",
        "data": "; ".join(tuned.account),
        "steps": f"{tuned.steps:,}, peak learning rate {rate:g}",
        "lowest held-out loss": f"{tuned.loss:.4f} nats per token, after step {tuned.best_step}; "
        "the model has the weights of this step",
        "time": duration(tuned.seconds),
    }
    write_training_report(out, title="Fine-tuning", facts=facts, history=trained.history, heldout="loss")
