"""Texts to measure a model on: documents of a file, or the docstrings of Python's standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from tercet.data.documents import read_documents
from tercet.data.python_docs import read_docstrings, stdlib_files
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

_CHARACTERS = 40_000  # more than 2,000 tokens in any vocabulary
ROW = 500  # tokens of a row at most; each row is read alone


@cache
def docstrings() -> tuple[str, ...]:
    """Return docstrings of Python's standard library, which every machine has, a text for each module."""
    files = sorted(stdlib_files(), key=lambda file: hashlib.sha256(file.module.encode()).digest())
    texts, size = list[str](), 0
    for file in files:
        text = "\n\n".join(f"{docstring.name}\n\n{docstring.text}" for docstring in read_docstrings(file))
        texts, size = [*texts, text], size + len(text)
        if size > _CHARACTERS:
            break
    return tuple(text for text in texts if text)


def texts_of(path: Path) -> Iterator[str]:
    """Yield the documents of a file.

    Raises:
        UserError: it is missing, of an unknown kind, or has no text.
    """
    return (document.text for document in read_documents([str(path)]))


def token_rows(
    tokenizer: Tokenizer, texts: Iterable[str], tokens: int, context: int, vocabulary: int
) -> Tensor:
    """Return rows of token ids [rows, length]: texts one after another, divided into rows of equal length.

    Each row begins with BOS if the tokenizer puts it before a text.

    Args:
        tokenizer: the model's tokenizer.
        texts: read until there are enough tokens.
        tokens: number of tokens at most.
        context: longest row that the model takes.
        vocabulary: rows of the embedding; a token beyond them is left out.

    Raises:
        UserError: the texts have not even two tokens.
    """
    length = max(2, min(ROW, context, tokens))
    begin = _beginning(tokenizer)
    own = length - len(begin)
    stream = (
        token for text in texts for token in tokenizer.encode(text, special=False) if token < vocabulary
    )
    ids = list(islice(stream, tokens // length * own))
    if len(ids) < 2:
        raise UserError("the text has less than two tokens")
    if len(ids) < own:
        return torch.tensor([begin + ids])
    return torch.tensor([begin + ids[at : at + own] for at in range(0, len(ids) - own + 1, own)])


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    plain, full = tokenizer.encode("a", special=False), tokenizer.encode("a")
    at = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    return full[:at]
