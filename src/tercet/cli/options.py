"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from tercet.prompt.llm import LLM

REFERENCE_HELP = (
    "Checkpoint, adapter or run directory, org/name, transformers:REF, openai:NAME, anthropic:NAME or "
    "http://HOST/v1#NAME."
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
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="Q", help="Weights on a CPU: int8 (the default), int4, bf16 or none."),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="HOW",
        help="Guess ahead: ngram (from the text so far), or a smaller model's REF.",
    ),
]
PriceOption = Annotated[
    str | None, typer.Option("--price", metavar="IN,OUT", help="USD per million tokens read and written.")
]


def load_llm(
    ref: str, quantize: str | None = None, speculate: str | None = None, price: str | None = None
) -> LLM:
    """The model that the options describe."""
    from tercet.prompt.llm import LLM
    from tercet.prompt.prices import parse_price

    guesses: Literal["ngram"] | LLM | None = None
    if speculate is not None:
        guesses = "ngram" if speculate == "ngram" else LLM(speculate)
    known = parse_price(price) if price is not None else None
    return LLM(ref, quantize=quantize, speculation=guesses, price=known)


def sampling_fields(**fields: Any) -> dict[str, Any]:
    """The sampling settings that were given on the command line, and only those."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return given
