"""A text with its origin: the unit that corpora are read, cleaned and packed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text and its origin.

    Attributes:
        text: the text; a line feed ends each line.
        source: the group that statistics count it under: the source as the user named it, or ``stdlib/json``.
        id: its exact place: ``path:line`` (``path:row`` for tables), or the module.
        offset: the byte of the (unpacked) file at which it, or its row, begins; None for tables.
        licence: the row's ``license`` or ``licence``, or that of its ``meta`` or ``metadata`` object.
    """

    text: str
    source: str
    id: str
    offset: int | None = None
    licence: str | None = None
