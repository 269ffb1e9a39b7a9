"""``tercet eval REF TASK``: measure one model on one task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tercet.cli import options
from tercet.cli.command import Json

if TYPE_CHECKING:
    from tercet.evaluate.minimal_pairs import PairResult
    from tercet.evaluate.result import Measurement

EXAMPLE = "tercet eval runs/mine builtin:docs-routing --split dev"

IsTuned = Annotated[
    bool | None,
    typer.Option(
        "--tuned/--as-is",
        help="Whether the model was tuned on this task; default: read from its run directory.",
    ),
]
HarnessTasks = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASK,..",
        help="Comma-separated tasks of lm-evaluation-harness, instead of TASK.",
    ),
]


def eval(
    ref: Annotated[str, typer.Argument(metavar="REF", help=options.REFERENCE_HELP)],
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK", help="Task file (YAML), also of minimal pairs, or builtin:docs-routing."
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(metavar="N", help="Number of solved examples in the prompt; default 0.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="S", help="test (the default) or dev.")] = None,
    tuned: IsTuned = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the choice of shots; default 0.")
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="choices.json of a climb's rung: its wording, shots and calibration."
        ),
    ] = None,
    lm_eval: HarnessTasks = None,
    include_path: Annotated[
        str | None,
        typer.Option("--include-path", metavar="DIR", help="Directory of your own tasks for --lm-eval."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Largest number of documents of each --lm-eval task.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Apply the chat template to --lm-eval tasks.")
    ] = False,
    quantize: options.Quantize = None,
    price: options.PriceOption = None,
    json: Json = False,
) -> None:
    """Measure a model on a task.

    Reports the score with a 95% interval, latency, tokens and cost.
    """
    from tercet.errors import UserError
    from tercet.evaluate.evaluate import evaluate, load_task
    from tercet.evaluate.minimal_pairs import PairTask, evaluate_pairs

    of_task = {
        "--shots": shots,
        "--split": split,
        "--tuned": tuned,
        "--seed": seed,
        "--choices": choices,
        "--price": price,
    }
    of_harness = {"--include-path": include_path, "--limit": limit, "--chat-template": chat_template or None}
    if lm_eval is not None:
        if task is not None:
            raise UserError(f"give TASK ({task}) or --lm-eval, not both")
        _refuse(of_task, "--lm-eval", but=("--shots",))
        harness = {
            "include_path": include_path,
            "limit": limit,
            "shots": shots,
            "chat_template": chat_template,
        }
        return _run_harness(ref, lm_eval, quantize, harness, json)
    if task is None:
        raise UserError(
            "TASK is missing; give a YAML file, builtin:docs-routing, or --lm-eval with the names of its tasks"
        )
    _refuse(of_harness, "a task file")
    loaded = load_task(task)
    if isinstance(loaded, PairTask):
        _refuse(of_task, "minimal pairs")
        pairs = evaluate_pairs(options.load_llm(ref, quantize), loaded)
        return _print(pairs.to_json(), _pair_lines(pairs), json)
    result = evaluate(
        options.load_llm(ref, quantize, price=price),
        loaded,
        shots=shots or 0,
        split="test" if split is None else split,
        tuned=tuned,
        seed=seed or 0,
        choices=choices,
    )
    return _print(result.to_json(), _lines(result), json)


def _run_harness(ref: str, tasks: str, quantize: str | None, settings: dict[str, Any], json: bool) -> None:
    from tercet.evaluate.evaluate import run_lm_eval

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    result = run_lm_eval(ref, names, quantize=quantize, **settings)
    _print(result, _harness_lines(result), json)


def _refuse(options: dict[str, Any], kind: str, but: tuple[str, ...] = ()) -> None:
    """Raise UserError for the first option with a value that the chosen kind of task does not use."""
    from tercet.errors import UserError

    for name, value in options.items():
        if value is not None and name not in but:
            raise UserError(f"{name} has no effect on {kind}; leave it out")


def _print(value: dict[str, Any], lines: list[str], json: bool) -> None:
    from tercet.files import dump_json

    sys.stdout.write(dump_json(value) if json else "\n".join(lines) + "\n")


def _lines(result: Measurement) -> list[str]:
    from tercet.progress import duration

    lines = [
        f"{result.score:.3f} (95% {result.low:.3f} to {result.high:.3f}) on {result.details['examples']} examples",
        f"latency p50 {duration(result.latency_p50 or 0)}, p95 {duration(result.latency_p95 or 0)}",
        f"{result.prompt_tokens:,} prompt and {result.completion_tokens:,} answer tokens",
        f"prompt: {result.details['wording']}; {result.details['shots']} shots; "
        f"calibration: {result.details['calibration']}",
    ]
    if result.cost_per_thousand is not None:
        lines.append(f"${result.cost_per_thousand:.4g} per thousand calls")
    return lines


def _pair_lines(result: PairResult) -> list[str]:
    lines = [
        f"{result.score:.3f} (95% {result.low:.3f} to {result.high:.3f}) on {result.pairs:,} minimal pairs"
    ]
    if len(result.groups) > 1:
        width = max(len(group.group) for group in result.groups)
        lines += [
            f"  {group.group:<{width}}  {group.score:.3f} ({group.low:.3f} to {group.high:.3f}) on {group.pairs:,}"
            for group in sorted(result.groups, key=lambda group: -group.score)
        ]
    return lines


def _harness_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for task, values in result["results"].items():
        for name, value in values.items():
            metric, _, way = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, float | int) or not way:
                continue
            error = values.get(f"{metric}_stderr,{way}")
            lines.append(
                f"{task}  {metric}{'' if way == 'none' else f' ({way})'}  {value:.4f}"
                + ("" if error is None else f" ± {error:.4f} (standard error)")
            )
    return lines
