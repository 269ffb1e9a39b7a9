"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

REFERENCE_HELP = (
    "Checkpoint, adapter or run directory, org/name, openai:NAME, anthropic:NAME or http://HOST/v1#NAME."
)

System = Annotated[str | None, typer.Option("--system", metavar="S", help="System message.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="End after N tokens.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 always takes the likeliest token.")
]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Draw from the likeliest share P.")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Draw from the K likeliest tokens.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Drop tokens under P times the likeliest one's share."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same answer.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="S", help="End before S; may be given more than once.")
]
PriceOption = Annotated[
    str | None, typer.Option("--price", metavar="IN,OUT", help="USD per million tokens read and written.")
]


def sampling_fields(**fields: Any) -> dict[str, Any]:
    """The sampling settings that were given on the command line, and only those."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return given
