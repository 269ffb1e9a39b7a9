"""LoRA adapters that an engine has beside its model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.engine.backend import Backend
from tercet.errors import UserError
from tercet.model.checkpoint import read_generation_config, read_stop_ids
from tercet.model.tokenizer import TOKENIZER, Tokenizer


@dataclass(frozen=True)
class Adapter:
    """One of them.

    number: what chunks and pages know it by.
    tokenizer: its own where its directory has one, say with a chat template; else the base's.
    stop_ids: tokens that end its outputs.
    """

    number: int
    directory: Path
    tokenizer: Tokenizer
    stop_ids: frozenset[int]


def add_adapter(
    backend: Backend, directory: str | Path, tokenizer: Tokenizer, stop_ids: frozenset[int]
) -> Adapter:
    """Give an adapter to the backend. Tokenizer and stop ids: the base's.

    Raises:
        UserError: the directory holds no adapter for this base, or one whose tokenizer has other tokens.
    """
    directory = Path(directory)
    own = tokenizer
    if (directory / TOKENIZER).is_file():
        own = Tokenizer.load(directory)
        mine, theirs = (one.backend.get_vocab(with_added_tokens=True) for one in (tokenizer, own))
        if mine != theirs:
            token = min(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])[0]
            raise UserError(
                f"{directory}: its tokenizer differs from the base's (at {token!r}), so it can't share the "
                "base's engine; load it as a model of its own"
            )
    stops = stop_ids
    if read_generation_config(directory).get("eos_token_id") is not None:
        stops = frozenset(read_stop_ids(directory))
    if own.eos_id is not None:
        stops |= {own.eos_id}
    return Adapter(backend.add_adapter(directory), directory, own, stops)
