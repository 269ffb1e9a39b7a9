"""LoRA adapters beside the weights of an engine's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tercet.engine.backend import Backend
from tercet.engine.sampling_defaults import read_sampling_defaults
from tercet.engine.text import differing_token
from tercet.errors import UserError
from tercet.model.checkpoint import read_generation_config, read_stop_ids
from tercet.model.tokenizer import TOKENIZER, Tokenizer


@dataclass(frozen=True)
class Adapter:
    """An adapter that is loaded in a backend.

    Attributes:
        number: identifies the adapter in chunks and pages.
        directory: where it was read from.
        tokenizer: its own if its directory has one, for example with a chat template; else the base's.
        stop_ids: tokens that end its outputs.
        sampling_defaults: values for sampling fields that a request leaves unset; its own where its directory
            holds some, else the base's.
    """

    number: int
    directory: Path
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    sampling_defaults: Mapping[str, float]


def add_adapter(
    backend: Backend,
    directory: str | Path,
    tokenizer: Tokenizer,
    stop_ids: frozenset[int],
    sampling_defaults: Mapping[str, float],
) -> Adapter:
    """Load an adapter into the backend.

    Args:
        backend: computes the base model.
        directory: holds the adapter.
        tokenizer: the base's.
        stop_ids: the base's.
        sampling_defaults: the base's.

    Raises:
        UserError: the directory holds no adapter for this base, or one whose tokenizer has other tokens.
    """
    directory = Path(directory)
    own_tokenizer = tokenizer
    if (directory / TOKENIZER).is_file():
        own_tokenizer = Tokenizer.load(directory)
        token = differing_token(tokenizer, own_tokenizer)
        if token is not None:
            raise UserError(
                f"{directory}: its tokenizer differs from the base's (at {token!r}), so it can't share the "
                "base's engine; load it as a model of its own"
            )
    stops = stop_ids
    if read_generation_config(directory).get("eos_token_id") is not None:
        stops = frozenset(read_stop_ids(directory))
    if own_tokenizer.eos_id is not None:
        stops |= {own_tokenizer.eos_id}
    sampling_defaults = read_sampling_defaults(directory) or sampling_defaults
    return Adapter(backend.add_adapter(directory), directory, own_tokenizer, stops, sampling_defaults)
