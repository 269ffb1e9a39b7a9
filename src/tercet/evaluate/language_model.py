"""The calls that an evaluation makes to a language model.

`tercet.prompt.llm.LLM` satisfies this protocol. Evaluation and prompting are packages of the same layer, so neither
imports the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tercet.data.conversation import Message
from tercet.engine.request import Completion
from tercet.model.tokenizer import Tokenizer

Prompt = str | Sequence[Message]  # a text to continue, or a conversation to answer


@runtime_checkable
class LanguageModel(Protocol):
    """A model that continues texts, and if it has a chat template answers conversations."""

    @property
    def name(self) -> str:
        """The model reference."""

    @property
    def is_local(self) -> bool:
        """Whether the weights run in this process, so that ``choose`` and ``count_tokens`` work."""

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be conversations."""

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None if unknown."""

    @property
    def directory(self) -> Path | None:
        """The directory of a local model's files; None for a hosted model."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of a local model; None for a hosted model."""

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt, special tokens included."""

    def batch(
        self, prompts: Sequence[Prompt], *, max_tokens: int, temperature: float, stop: Sequence[str] = ...
    ) -> list[Completion]:
        """Return one completion for each prompt, in order."""

    def choose(
        self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], *, end: bool = False
    ) -> list[list[float]]:
        """Return the log-probability of each prompt's choices; ``end`` adds the end-of-text token to each."""

    def best_choice(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[Sequence[str]],
        *,
        offsets: Sequence[float] | None = None,
        end: bool = False,
    ) -> list[int]:
        """Return the index of each prompt's likeliest choice; ``offsets`` are added to the log-probabilities."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, [N, H]; UserError for a model that gives none."""
