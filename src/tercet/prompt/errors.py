"""Errors of calls to a model, all UserErrors. Prompts that are too long raise `tercet.errors.ContextOverflow`."""

from __future__ import annotations

from tercet.engine.request import Completion
from tercet.errors import UserError


class OutputError(UserError):
    """An answer that does not match its schema, for example because it was cut off at ``max_tokens``.

    Attributes:
        completion: the answer as the model wrote it; its ``parsed`` is None.
    """

    def __init__(self, message: str, completion: Completion) -> None:
        super().__init__(message)
        self.completion = completion


class HostedError(UserError):
    """A request to a hosted model failed.

    Attributes:
        fatal: whether every other request to this server would fail the same way.
    """

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class BatchError(UserError):
    """Some requests of a batch failed; the answers to the other requests are kept here.

    Attributes:
        completions: in the order of the requests; None for a request without an answer. An answer that does not
            match its schema is included, with ``parsed`` None, and counts as a failure.
        failures: message by the index of the request.
    """

    def __init__(self, completions: list[Completion | None], failures: dict[int, str]) -> None:
        first = min(failures)
        super().__init__(
            f"{len(failures)} of {len(completions)} requests failed; "
            f"the first, number {first + 1}: {failures[first]}"
        )
        self.completions, self.failures = completions, failures
