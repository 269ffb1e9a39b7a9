"""``tercet prompt REF TEXT``: one answer, streamed to standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tercet.cli import options
from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.engine.request import Completion
    from tercet.prompt.llm import LLM, Prompt

EXAMPLE = 'tercet prompt runs/mine "Once upon a time" --max-tokens 64'


def prompt(
    ref: Annotated[str, typer.Argument(metavar="REF", help=options.REFERENCE_HELP)],
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="What to ask; - reads standard input. In a template: {text}."),
    ] = None,
    system: options.System = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with {field} places that makes the prompt.")
    ] = None,
    var: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Value of the template's field K; may be repeated."),
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    price: options.PriceOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Ask a model once. A chat model answers, a base model continues the text."""
    from tercet.prompt.llm import LLM
    from tercet.prompt.messages import check_text, conversation
    from tercet.prompt.prices import parse_price

    asked = check_text(_asked(text, template, var or []), "the prompt")
    fields = options.sampling_fields(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    llm = LLM(ref, price=parse_price(price) if price is not None else None)
    if llm.has_chat_template:
        message: Prompt = conversation(asked, None if system is None else check_text(system, "--system"))
    elif system is not None:
        raise UserError(f"{llm.name} has no chat template, so it has no place for --system; put it into TEXT")
    else:
        message = asked
    completion = _json(llm, message, fields) if json else _stream(llm, message, fields)
    sys.stderr.write(spent(completion) + "\n")


def _stream(llm: LLM, message: Prompt, fields: dict[str, Any]) -> Completion:
    with llm.stream(message, **fields) as stream:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return stream.completion


def _json(llm: LLM, message: Prompt, fields: dict[str, Any]) -> Completion:
    from tercet.files import dump_json

    completion = llm.batch([message], **fields)[0]
    usage = completion.usage
    sys.stdout.write(
        dump_json(
            {
                "model": llm.name,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "cost": usage.cost,
                },
                "seconds": round(completion.seconds, 3),
            }
        )
    )
    return completion


def spent(completion: Completion) -> str:
    """``12 + 64 tokens, 1.3 s, $0.00012``: what an answer took. What is not known is not shown."""
    from tercet.progress import duration

    usage = completion.usage
    counted = usage.prompt_tokens or usage.completion_tokens
    parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"] if counted else []
    parts.append(duration(completion.seconds))
    if usage.cost is not None:
        parts.append(f"${usage.cost:.3g}" if usage.cost >= 0.0001 else f"${usage.cost:.2g}")
    if completion.finish_reason == "length":
        parts.append("cut at the token limit (--max-tokens)")
    return ", ".join(parts)


def _asked(text: str | None, template: Path | None, variables: list[str]) -> str:
    """The prompt: TEXT, standard input, or the template with its fields filled."""
    if text == "-":
        text = _standard_input()
    if template is None:
        if variables:
            raise UserError("--var fills the fields of a --template FILE; there is none")
        if text is None:
            raise UserError("nothing to ask: give TEXT (- reads standard input) or --template FILE")
        return text
    from tercet.prompt.template import Template

    values = {} if text is None else {"text": text}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise UserError(f"--var {variable!r} must be K=V, such as --var city=Oslo")
        if name in values:
            raise UserError(
                f"{name} is given twice" + (" (TEXT is the field text)" if name == "text" else "")
            )
        values[name] = value
    return Template.load(template).render(values, all_used=True)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UserError(f"standard input is not UTF-8 text (byte {problem.start})") from problem
