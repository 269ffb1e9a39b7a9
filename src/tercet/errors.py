"""The exception for mistakes that the user can fix, and the form that its messages share.

A message names a Python setting in backticks, exactly as its parameter or dataclass field is called, or
as a setting with its value::

    `rank` is -1; it must be a positive number
    `rank` and `alpha` belong to `method=lora`

The command line translates these into its own options, so no message outside of ``tercet.cli`` names an option.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CUTOFF = 0.5
_LONGEST = 200  # characters of a name that are compared; the comparison takes quadratic time


class UserError(ValueError):
    """Invalid input, reported in one line: what is wrong, where, and how to fix it.

    The command line prints the message after ``error:`` and exits with status 2; nothing else
    in Tercet prints or swallows it. A defect of Tercet itself stays an ordinary exception.
    """


class ContextOverflow(UserError):
    """A prompt that is longer than the model's context. Prompts are never cut off silently.

    Attributes:
        tokens: length of the prompt; None where a hosted model's server did not report it.
        limit: the model's context length in tokens; None likewise.
    """

    def __init__(self, message: str, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.tokens, self.limit = tokens, limit


def nearest(name: str, names: Iterable[str], limit: int = 1) -> list[str]:
    """Return at most ``limit`` of ``names`` that ``name`` may have been meant to be, the most similar first.

    Similarity is `difflib.SequenceMatcher.ratio`, and 0.5 is enough. At this cut-off a name without its
    suffix still matches: ``smollm2`` suggests ``smollm2-135m-instruct`` (0.50), which difflib's default
    of 0.6 rejects. Below it unrelated names begin to match: ``seed`` and ``schema`` (0.40), ``logprobs``
    and ``prompt`` (0.43).
    """
    return difflib.get_close_matches(name[:_LONGEST], list(names), n=limit, cutoff=_CUTOFF)


def check_seed(seed: int) -> None:
    """Raise UserError unless numpy's, torch's and scikit-learn's generators all accept ``seed``."""
    if not 0 <= seed < 2**32:
        raise UserError(f"`seed` is {seed}; it must be from 0 to {2**32 - 1}")
