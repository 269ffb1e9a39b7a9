"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tercet.serve.settings import ServeSettings
from tercet.settings import options_of

if TYPE_CHECKING:
    from tercet.prompt.llm import LLM

REFERENCE_HELP = (
    "Checkpoint, adapter or run directory, GGUF file, builtin:smollm2, org/name[:QUANTISATION] on the Hub, "
    "ollama:NAME, lmstudio:NAME, package:NAME, transformers:REF, openai:NAME, anthropic:NAME or http://HOST/v1#NAME."
)

_SERVING = options_of(ServeSettings)  # the server has the same settings of its own

System = Annotated[str | None, typer.Option("--system", metavar="S", help="System message.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Stop after N tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", metavar="T", help="Sampling temperature; 0 always takes the most likely token."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Sample from the most likely tokens with total probability P."),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="K", help="Sample from the K most likely tokens.")
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", metavar="P", help="Drop tokens less probable than P times the most likely token."
    ),
]
SamplingHow = Annotated[
    str | None,
    typer.Option(
        "--sampling",
        metavar="HOW",
        help="default: the publisher's settings; greedy: the most likely token; neutral: temperature 1, no limit.",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Random seed; the same seed gives the same answer.")
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="S", help="Stop before the text S; may be repeated.")
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="Q", help=_SERVING["quantize"].help),
]
Speculation = Annotated[
    str | None,
    typer.Option("--speculate", metavar="HOW", help=_SERVING["speculation"].help),
]
ControlTokens = Annotated[
    str | None,
    typer.Option(
        "--control-tokens",
        metavar="text|control",
        help="What control tokens that messages spell become: ordinary text (the default), or these tokens.",
    ),
]
PriceOption = Annotated[
    str | None,
    typer.Option(
        "--price", metavar="IN,OUT", help="USD per million input tokens, and per million output tokens."
    ),
]


def load_llm(
    ref: str,
    quantize: str | None = None,
    speculation: str | None = None,
    price: str | None = None,
    control_tokens: str | None = None,
) -> LLM:
    """Return the model that the options describe."""
    from tercet.model.control_text import check_mode
    from tercet.prompt.llm import LLM
    from tercet.prompt.prices import parse_price

    draft: Literal["ngram"] | LLM | None = None
    if speculation is not None:
        draft = "ngram" if speculation == "ngram" else LLM(speculation)
    dollars = parse_price(price) if price is not None else None
    mode = None if control_tokens is None else check_mode(control_tokens)
    return LLM(ref, quantize=quantize, speculation=draft, price=dollars, control_tokens=mode)


def sampling_fields(**fields: Any) -> dict[str, Any]:
    """Return only the sampling settings that the command line gave."""
    settings = {name: value for name, value in fields.items() if value is not None}
    if "stop" in settings:
        settings["stop"] = tuple(settings["stop"])
    return settings
