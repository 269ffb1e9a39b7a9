"""An answer that is read while the model writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from tercet.engine.request import Completion
from tercet.prompt.output import Output
from tercet.prompt.prices import Price


class Stream:
    """Iterate over the pieces of an answer's text; ``completion`` then holds the whole answer.

    ``close()``, or the end of a ``with`` block, stops the model. ``text`` is the text so far. With a schema,
    OutputError is raised after the last piece where the whole answer does not match it.
    """

    def __init__(
        self,
        pieces: Iterator[str | Completion],
        price: Price | None = None,
        output: Output | None = None,
    ) -> None:
        self._pieces, self._price, self._output = pieces, price, output
        self._completion: Completion | None = None
        self.text = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Completion):
            self._completion = piece
            self.close()
            finish_completion(piece, self._price, self._output)
            raise StopIteration
        self.text += piece
        return piece

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self._completion is not None

    @property
    def completion(self) -> Completion:
        """The whole answer. RuntimeError until the stream is ``finished``."""
        if self._completion is None:
            raise RuntimeError("the stream has not ended: iterate over it first")
        return self._completion

    def close(self) -> None:
        """Stop generating; no more pieces come."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finish_completion(completion: Completion, price: Price | None, output: Output | None) -> None:
    """Set the cost, which follows from the caller's price, and ``parsed``, which follows from its schema.

    Raises:
        OutputError: the answer does not match the schema.
    """
    completion.usage.cost = price.cost(completion.usage) if price else None
    if output is not None:
        output.parse(completion)
