"""The cost of a call in US dollars, from its usage and the user's prices.

No prices are built in: they would be wrong within months. They come from ``LLM(price=(in, out))``, from
the command line, or from ``$XDG_CONFIG_HOME/tercet/prices.yaml`` (``~/.config`` by default)::

    openai:some-model: [0.15, 0.60]    # USD per million tokens read, written

Without a price the cost is None, never 0.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.engine.request import Usage
from tercet.errors import UserError
from tercet.files import read_text


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    prompt: float  # read
    completion: float  # written

    def cost(self, usage: Usage) -> float | None:
        """Return dollars for ``usage``; None when the server reported no usage."""
        if usage.prompt_tokens == 0 and usage.completion_tokens == 0:
            return None
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


def as_price(value: Any, where: str = "price") -> Price:
    """Return two numbers as a Price. UserError unless they are finite and 0 or more."""
    numbers = list(value) if isinstance(value, list | tuple) else []
    good = len(numbers) == 2 and all(
        isinstance(number, int | float)
        and not isinstance(number, bool)
        and math.isfinite(number)
        and number >= 0
        for number in numbers
    )
    if not good:
        raise UserError(
            f"{where} is {value!r}; it must be two numbers, USD per million tokens read and written, "
            "such as 0.15,0.60"
        )
    return Price(float(numbers[0]), float(numbers[1]))


def parse_price(text: str) -> Price:
    """Return the Price for a text such as ``0.15,0.60``. UserError for any other text."""
    try:
        return as_price([float(part) for part in text.split(",")])
    except ValueError as problem:
        raise UserError(
            f"`price` is {text!r}; it must be IN,OUT in USD per million tokens, such as 0.15,0.60"
        ) from problem


def prices_file() -> Path:
    """Return the path of the user's prices file."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "tercet" / "prices.yaml"


def known_price(reference: str) -> Price | None:
    """Return the price of ``reference`` (exactly as written) in the user's prices file, or None.

    Raises:
        UserError: the file is not YAML, or its entry is not two numbers.
    """
    path = prices_file()
    if not path.is_file():
        return None
    import yaml

    try:
        table = yaml.safe_load(read_text(path))
    except yaml.YAMLError as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from problem
    if table is None:
        return None
    if not isinstance(table, dict):
        raise UserError(f"{path} must map model references to [in, out], such as openai:NAME: [0.15, 0.60]")
    return as_price(table[reference], f"{path}: {reference}") if reference in table else None
