"""Tiny checkpoints with a tokenizer, as an export needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.corpus import train_tokenizer
from tiny_checkpoints import save_random

TEXT = "Once upon a time there was a king, and the king had 3 daughters.\n\n"
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 50], 300)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Checkpoint:
    """``checkpoint("llama", head_dim=16)``: the directory of a random model whose predictions are sharp."""

    def save(family: str, **fields: Any) -> Path:
        directory = tmp_path / family
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}
        save_random(directory, family, **{"vocab_size": tokenizer.vocab_size, **ids, **sizes, **fields})
        tokenizer.save(directory)
        return directory

    return save
