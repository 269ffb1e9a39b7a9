"""``tercet prompt REF TEXT``: print the answer of a model as it is generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tercet.cli import options
from tercet.cli.command import Json
from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.engine.request import Completion
    from tercet.prompt.llm import LLM, Prompt

EXAMPLE = 'tercet prompt runs/mine "Once upon a time" --max-tokens 64'


def prompt(
    ref: Annotated[str, typer.Argument(metavar="REF", help=options.REFERENCE_HELP)],
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT", help="The prompt; - reads standard input. A template uses it as {text}."
        ),
    ] = None,
    system: options.System = None,
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Template file for the prompt, with {field} placeholders."),
    ] = None,
    var: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Value of field K of the template; may be repeated."),
    ] = None,
    max_tokens: options.MaxTokens = None,
    sampling: options.SamplingHow = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON Schema file; the answer is valid JSON under this schema."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="R", help="Regular expression that the whole answer matches.")
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Comma-separated texts; the answer is one of them."),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lark grammar file; the answer is a sentence of this grammar."),
    ] = None,
    quantize: options.Quantize = None,
    speculation: options.Speculation = None,
    control_tokens: options.ControlTokens = None,
    price: options.PriceOption = None,
    json: Json = False,
) -> None:
    """Answer one prompt.

    A chat model answers; a base model continues the text.
    """
    from tercet.data.conversation import check_text, conversation
    from tercet.engine.grammar import GrammarError

    filled = check_text(_prompt(text, template, var or []), "the prompt")
    fields = options.sampling_fields(
        sampling=sampling,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    ) | _form(schema, regex, choices, grammar)
    llm = options.load_llm(ref, quantize, speculation, price, control_tokens)
    if llm.has_chat_template:
        message: Prompt = conversation(filled, None if system is None else check_text(system, "`system`"))
    elif system is not None:
        raise UserError(
            f"{llm.name} has no chat template, so it cannot use `system`; put the message into TEXT"
        )
    else:
        message = filled
    try:
        completion = _json(llm, message, fields) if json else _stream(llm, message, fields)
    except GrammarError as problem:
        file = schema or grammar
        raise UserError(f"{file}: {problem}" if file else str(problem)) from problem
    sys.stderr.write(spent(completion) + "\n")


def _form(
    schema: Path | None, regex: str | None, choices: str | None, grammar: Path | None
) -> dict[str, Any]:
    """Return the required form of the answer as a keyword of `LLM.stream`; empty where no form is given."""
    from tercet.files import read_json, read_text

    forms = {"--schema": schema, "--regex": regex, "--choices": choices, "--grammar": grammar}
    chosen = [option for option, value in forms.items() if value is not None]
    if len(chosen) > 1:
        raise UserError(
            f"{' and '.join(chosen)} contradict each other: an answer has one form; give only one"
        )
    if schema is not None:
        json_schema = read_json(schema)
        if not isinstance(json_schema, dict):
            raise UserError(f"{schema} holds a {type(json_schema).__name__}; a JSON Schema is an object")
        return {"schema": json_schema}
    if grammar is not None:
        return {"grammar": read_text(grammar)}
    if choices is not None:
        texts = [choice.strip() for choice in choices.split(",")]
        if not all(texts):
            raise UserError(f"--choices is {choices!r}; write comma-separated texts, none of them empty")
        return {"choices": texts}
    return {} if regex is None else {"regex": regex}


def _stream(llm: LLM, message: Prompt, fields: dict[str, Any]) -> Completion:
    from tercet.prompt.errors import OutputError

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
    from tercet.prompt.errors import OutputError

    try:
        if isinstance(message, str):
            completion = llm.generate(message, **fields)
        else:
            completion = llm.chat(message, **fields)
    except OutputError as problem:  # print the text all the same
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
    """Return the cost of an answer, such as ``12 + 64 tokens, 1.3 s, $0.00012``, as far as it is known."""
    from tercet.progress import duration

    usage = completion.usage
    counted = usage.prompt_tokens or usage.completion_tokens
    parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"] if counted else []
    parts.append(duration(completion.seconds))
    if completion.drafted:
        parts.append(f"{completion.accepted} of {completion.drafted} draft tokens accepted")
    if usage.cost is not None:
        parts.append(f"${usage.cost:.3g}" if usage.cost >= 0.0001 else f"${usage.cost:.2g}")
    if completion.finish_reason == "length":
        parts.append("stopped at the token limit (--max-tokens)")
    return ", ".join(parts)


def _prompt(text: str | None, template: Path | None, variables: list[str]) -> str:
    """Return the prompt: TEXT, standard input, or the filled template."""
    if text == "-":
        text = standard_input()
    if template is None:
        if variables:
            raise UserError("--var needs --template FILE, whose fields it fills")
        if text is None:
            raise UserError("the prompt is missing: give TEXT (- reads standard input) or --template FILE")
        return text
    from tercet.data.template import Template

    values = {} if text is None else {"text": text}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise UserError(f"--var is {variable!r}; write K=V, such as --var city=Oslo")
        if name in values:
            raise UserError(
                f"{name} is given twice" + (" (TEXT is the field text)" if name == "text" else "")
            )
        values[name] = value
    return Template.load(template).render(values, all_used=True)


def standard_input() -> str:
    """Read standard input; raise UserError where it is not UTF-8 text."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UserError(f"standard input is not UTF-8 text (byte {problem.start})") from problem
