"""``tercet explain REF TEXT``: what a model thinks at every token, and what may come next."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli import options
from tercet.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from tercet.prompt.explain import Explanation, Step
    from tercet.prompt.llm import Prompt

EXAMPLE = 'tercet explain runs/mine "Once upon a"'
BAR = 30  # characters of the bar of a token that is certain
# Surprise in bits up to which a token has each style: expected, likely, open, unlikely; beyond, the last.
STYLES = ((1.0, "green"), (3.0, "cyan"), (6.0, "yellow"), (10.0, "magenta"), (float("inf"), "bold red"))


def explain(
    ref: Annotated[str, typer.Argument(metavar="REF", help=options.REFERENCE_HELP)],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="What the model reads; - reads standard input.")
    ],
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", metavar="N", help="Tokens to go on for, each with what else may come."),
    ] = 5,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Tokens to show at each place.")] = 5,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Read TEXT as it is, without the model's chat template.")
    ] = False,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    quantize: options.Quantize = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how likely a model found every token it reads, and what it would write next.

    Surprise is -log2 of a token's probability, in bits: 0 for a certain one, 1 for one chance in two.
    """
    from tercet.cli.prompt import standard_input
    from tercet.data.conversation import check_text, conversation

    if not 1 <= top <= 20:
        raise UserError(f"--top is {top}; it must be from 1 to 20")
    asked = check_text(standard_input() if text == "-" else text, "the text")
    llm = options.load_llm(ref, quantize)
    if raw and not llm.is_local:
        raise UserError(f"{llm.name} only chats: leave --raw out")
    message: Prompt = asked
    if llm.has_chat_template and not raw:
        message = conversation(asked, None if system is None else check_text(system, "--system"))
    elif system is not None:
        raise UserError(
            f"--system needs a chat template, and TEXT is read as it is by {llm.name}; put it into TEXT"
        )
    fields = options.sampling_fields(max_tokens=max_tokens, temperature=temperature, seed=seed)
    found = llm.explain(message, top=top, **fields)
    if json:
        from tercet.files import dump_json

        sys.stdout.write(dump_json(asdict(found)))
    else:
        _show(found)


def _show(found: Explanation) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    if found.read:
        console.print(Text("What it reads", style="bold"))
        console.print(_table(found.read))
        if found.bits_per_token is not None:
            mean = found.bits_per_token
            console.print(
                f"mean surprise {mean:.2f} bits a token, as if choosing among {2**mean:,.0f} tokens\n"
            )
    else:
        console.print("(a server does not tell how it reads; what it wrote follows)\n")
    if not found.written:
        return
    console.print(Text("What may come next", style="bold"))
    for one in found.written[0].alternatives:
        bar = "█" * round(BAR * one.probability) or "▏"
        console.print(Text(f"{_quoted(one.token):>18}  {one.probability:7.2%}  ", end="") + Text(bar, "cyan"))
    if (entropy := found.written[0].entropy) is not None:
        console.print(
            f"entropy {entropy:.2f} bits: as open as a choice among {2**entropy:,.1f} equally likely tokens"
        )
    console.print()
    console.print(Text("What it writes", style="bold"))
    console.print(_table(found.written))
    if found.finish_reason == "stop":
        console.print("Here the model ends.")


def _table(steps: list[Step]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    longest = max(len(_quoted(step.token)) for step in steps)
    # The alternatives are what is cut where the terminal is narrow.
    table.add_column("token", no_wrap=True, min_width=longest)
    table.add_column("likely", no_wrap=True, min_width=7, justify="right")
    table.add_column("surprise", no_wrap=True, min_width=9, justify="right")
    table.add_column("instead", no_wrap=True, overflow="ellipsis")
    for step in steps:
        instead = [other for other in step.alternatives if other.id != step.id or other.token != step.token]
        table.add_row(
            _styled(step),
            "" if step.probability is None else f"{step.probability:.2%}",
            "" if step.surprise is None else f"{step.surprise:.1f} bits",
            "  ".join(f"{_quoted(one.token)} {one.probability:.1%}" for one in instead),
        )
    return table


def _styled(step: Step) -> Text:
    from rich.text import Text

    surprise = step.surprise
    style = "" if surprise is None else next(style for most, style in STYLES if surprise <= most)
    return Text(_quoted(step.token), style)


def _quoted(token: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return repr(token) if "'" in token and '"' not in token else '"' + repr(token + '"')[1:-2] + '"'
