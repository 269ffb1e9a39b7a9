"""``tercet explain REF TEXT``: the probability of each token, and of the tokens that may come next."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli import options
from tercet.cli.command import Json
from tercet.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from tercet.prompt.explain import Explanation, Step
    from tercet.prompt.llm import Prompt

EXAMPLE = 'tercet explain runs/mine "Once upon a"'
BAR = 30  # characters in the bar of a token with probability 1
# The largest surprise in bits of each style: expected, likely, open, unlikely, very unlikely.
STYLES = ((1.0, "green"), (3.0, "cyan"), (6.0, "yellow"), (10.0, "magenta"), (float("inf"), "bold red"))


def explain(
    ref: Annotated[str, typer.Argument(metavar="REF", help=options.REFERENCE_HELP)],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="Text for the model to read; - reads standard input.")
    ],
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", metavar="N", help="Number of tokens to generate, each with its alternatives."
        ),
    ] = 5,
    top: Annotated[
        int, typer.Option("--top", metavar="N", help="Number of alternatives to show for each token.")
    ] = 5,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not apply the model's chat template to TEXT.")
    ] = False,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    quantize: options.Quantize = None,
    json: Json = False,
) -> None:
    """Show the probability of each token, and of the tokens that may come next.

    Surprise is -log2 of a token's probability, in bits: 0 for probability 1, and 1 for probability 1/2.
    """
    from tercet.cli.prompt import standard_input
    from tercet.data.conversation import check_text, conversation

    if not 1 <= top <= 20:
        raise UserError(f"`top` is {top}; it must be from 1 to 20")
    prompt = check_text(standard_input() if text == "-" else text, "the text")
    llm = options.load_llm(ref, quantize)
    if raw and not llm.is_local:
        raise UserError(f"{llm.name} is a hosted model and accepts only conversations; leave `raw` out")
    message: Prompt = prompt
    if llm.has_chat_template and not raw:
        message = conversation(prompt, None if system is None else check_text(system, "`system`"))
    elif system is not None:
        raise UserError(
            f"`system` needs a chat template, and {llm.name} reads TEXT without one; put the message into TEXT"
        )
    fields = options.sampling_fields(max_tokens=max_tokens, temperature=temperature, seed=seed)
    explanation = llm.explain(message, top=top, **fields)
    if json:
        from tercet.files import dump_json

        sys.stdout.write(dump_json(asdict(explanation)))
    else:
        _show(explanation)


def _show(explanation: Explanation) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    if explanation.read:
        console.print(Text("Prompt", style="bold"))
        console.print(_table(explanation.read))
        if explanation.bits_per_token is not None:
            mean = explanation.bits_per_token
            console.print(f"mean surprise {mean:.2f} bits per token (perplexity {2**mean:,.0f})\n")
    else:
        console.print("(a hosted model reports no probabilities of the prompt; the answer follows)\n")
    if not explanation.written:
        return
    console.print(Text("Candidates for the next token", style="bold"))
    for token in explanation.written[0].alternatives:
        bar = "█" * round(BAR * token.probability) or "▏"
        console.print(
            Text(f"{_quoted(token.token):>18}  {token.probability:7.2%}  ", end="") + Text(bar, "cyan")
        )
    if (entropy := explanation.written[0].entropy) is not None:
        console.print(
            f"entropy {entropy:.2f} bits: as uncertain as a choice among {2**entropy:,.1f} equally likely tokens"
        )
    console.print()
    console.print(Text("Answer", style="bold"))
    console.print(_table(explanation.written))
    if explanation.finish_reason == "stop":
        console.print("The model ends its answer here.")


def _table(steps: list[Step]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    longest = max(len(_quoted(step.token)) for step in steps)
    # In a narrow terminal the alternatives are cut off first.
    table.add_column("token", no_wrap=True, min_width=longest)
    table.add_column("probability", no_wrap=True, min_width=11, justify="right")
    table.add_column("surprise", no_wrap=True, min_width=9, justify="right")
    table.add_column("alternatives", no_wrap=True, overflow="ellipsis")
    for step in steps:
        alternatives = [
            token for token in step.alternatives if token.id != step.id or token.token != step.token
        ]
        table.add_row(
            _styled(step),
            "" if step.probability is None else f"{step.probability:.2%}",
            "" if step.surprise is None else f"{step.surprise:.1f} bits",
            "  ".join(f"{_quoted(token.token)} {token.probability:.1%}" for token in alternatives),
        )
    return table


def _styled(step: Step) -> Text:
    from rich.text import Text

    surprise = step.surprise
    style = "" if surprise is None else next(style for limit, style in STYLES if surprise <= limit)
    return Text(_quoted(step.token), style)


def _quoted(token: str) -> str:
    """Return a token in quotes, with visible spaces and line ends."""
    return repr(token) if "'" in token and '"' not in token else '"' + repr(token + '"')[1:-2] + '"'
