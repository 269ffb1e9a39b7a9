"""The result of a build, as Python returns it and as `result.json` stores it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.files import read_json
from tercet.pretrain.chat import ChatResult
from tercet.pretrain.corpus import Corpus


@dataclass(frozen=True)
class Built:
    """The model that `build` made, its corpus, and what was measured.

    All figures but ``chat`` are of the base model.
    """

    model: str  # the checkpoint directory
    parameters: int  # of the whole network
    matmul_parameters: int  # of its matrices, the embedding table excluded
    tokens: int  # trained on
    seconds: float  # of training
    tokens_per_second: float
    bits_per_byte: float  # of held-out text
    bits_per_byte_by_source: dict[str, float]
    pair_accuracy: dict[str, float] | None  # accuracy, and the number of minimal pairs; None without pairs
    peak_memory_bytes: int
    predicted: dict[str, Any]  # by the plan: seconds, memory_bytes, bits_per_byte
    shortened: bool  # the clock ended training early, so a rerun may give other numbers
    corpus: Corpus
    compression: dict[str, dict[str, float]]  # of held-out text by tokenizer: vocab_size, bytes_per_token
    samples: list[dict[str, str]]
    steps: int
    skipped: int  # steps that were not applied: the gradient was not finite, or a spike
    history: list[dict[str, Any]]  # held-out measurements during training
    kept_step: int | None = None  # the step of the saved weights: the last, or the best where text repeats
    chat: ChatResult | None = None  # of the chat stage; None: the model is the base model


def read_result(path: Path) -> Built:
    """Read the `result.json` of a finished build."""
    stored = read_json(path)
    chat = stored.get("chat")
    return Built(
        **{**stored, "corpus": Corpus(**stored["corpus"]), "chat": ChatResult(**chat) if chat else None}
    )
