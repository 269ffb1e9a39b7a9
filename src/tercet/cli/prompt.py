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
    schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON Schema file; the answer is JSON that is valid under it."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="R", help="Regular expression that matches the whole answer.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="The texts of which the answer is one.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lark grammar file; the answer is a text of it.")
    ] = None,
    quantize: options.Quantize = None,
    speculate: options.Speculate = None,
    price: options.PriceOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Ask a model once. A chat model answers, a base model continues the text."""
    from tercet.data.conversation import check_text, conversation
    from tercet.engine.grammar import GrammarError

    asked = check_text(_asked(text, template, var or []), "the prompt")
    fields = options.sampling_fields(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    ) | _form(schema, regex, choices, grammar)
    llm = options.load_llm(ref, quantize, speculate, price)
    if llm.has_chat_template:
        message: Prompt = conversation(asked, None if system is None else check_text(system, "--system"))
    elif system is not None:
        raise UserError(f"{llm.name} has no chat template, so it has no place for --system; put it into TEXT")
    else:
        message = asked
    try:
        completion = _json(llm, message, fields) if json else _stream(llm, message, fields)
    except GrammarError as problem:
        file = schema or grammar
        raise UserError(f"{file}: {problem}" if file else str(problem)) from problem
    sys.stderr.write(spent(completion) + "\n")


def _form(
    schema: Path | None, regex: str | None, choices: str | None, grammar: Path | None
) -> dict[str, Any]:
    """The form that the answer must have, as a keyword of `LLM.stream`; none when none is given."""
    from tercet.files import read_json, read_text

    forms = {"--schema": schema, "--regex": regex, "--choices": choices, "--grammar": grammar}
    given = [option for option, value in forms.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; an answer has one form, so give one of them")
    if schema is not None:
        wanted = read_json(schema)
        if not isinstance(wanted, dict):
            raise UserError(f"{schema} holds a {type(wanted).__name__}; a JSON Schema is an object")
        return {"schema": wanted}
    if grammar is not None:
        return {"grammar": read_text(grammar)}
    if choices is not None:
        texts = [choice.strip() for choice in choices.split(",")]
        if not all(texts):
            raise UserError(
                f"--choices is {choices!r}; it must be texts with commas between them, none empty"
            )
        return {"choices": texts}
    return {} if regex is None else {"regex": regex}


def _stream(llm: LLM, message: Prompt, fields: dict[str, Any]) -> Completion:
    from tercet.prompt.output import OutputError

    with llm.stream(message, **fields) as stream:
        try:
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
        except OutputError:
            sys.stdout.write("\n")
            raise
    sys.stdout.write("\n")
    return stream.completion


def _json(llm: LLM, message: Prompt, fields: dict[str, Any]) -> Completion:
    from tercet.prompt.output import OutputError

    try:
        if isinstance(message, str):
            completion = llm.generate(message, **fields)
        else:
            completion = llm.chat(message, **fields)
    except OutputError as problem:  # the text is not lost with it
        _print(llm, problem.completion)
        raise
    _print(llm, completion)
    return completion


def _print(llm: LLM, completion: Completion) -> None:
    from tercet.files import dump_json

    usage = completion.usage
    sys.stdout.write(
        dump_json(
            {
                "model": llm.name,
                "text": completion.text,
                "parsed": completion.parsed,
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


def spent(completion: Completion) -> str:
    """``12 + 64 tokens, 1.3 s, $0.00012``: what an answer took. What is not known is not shown."""
    from tercet.progress import duration

    usage = completion.usage
    counted = usage.prompt_tokens or usage.completion_tokens
    parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"] if counted else []
    parts.append(duration(completion.seconds))
    if completion.drafted:
        parts.append(f"{completion.accepted} of {completion.drafted} guessed tokens right")
    if usage.cost is not None:
        parts.append(f"${usage.cost:.3g}" if usage.cost >= 0.0001 else f"${usage.cost:.2g}")
    if completion.finish_reason == "length":
        parts.append("cut at the token limit (--max-tokens)")
    return ", ".join(parts)


def _asked(text: str | None, template: Path | None, variables: list[str]) -> str:
    """The prompt: TEXT, standard input, or the template with its fields filled."""
    if text == "-":
        text = standard_input()
    if template is None:
        if variables:
            raise UserError("--var fills the fields of a --template FILE; there is none")
        if text is None:
            raise UserError("nothing to ask: give TEXT (- reads standard input) or --template FILE")
        return text
    from tercet.data.template import Template

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


def standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UserError(f"standard input is not UTF-8 text (byte {problem.start})") from problem
