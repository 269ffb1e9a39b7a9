"""The one exception that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, and what to do about it.

    The command line prints the message after ``error:`` and exits with status 2; nothing else
    in Tercet prints or swallows it. Anything that is *our* mistake stays an ordinary exception.
    """


def check_seed(seed: int) -> None:
    """UserError unless every generator in use takes ``seed``: numpy's, torch's and scikit-learn's."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; it must be from 0 to {2**32 - 1}")
