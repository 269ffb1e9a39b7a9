"""The protocol of a model behind `tercet.LLM`, which `LocalModel` and `HostedModel` implement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tercet.data.conversation import Message
from tercet.engine.request import Completion, Score
from tercet.errors import UserError
from tercet.prompt.explain import Step
from tercet.prompt.settings import CallSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tercet.engine.engine import Engine
    from tercet.model.tokenizer import Tokenizer

CheckedPrompt = str | list[Message]  # a text to continue, or a conversation to answer


class Model(Protocol):
    """A model that runs in this process or on a server. A call that it cannot do raises UserError."""

    @property
    def is_local(self) -> bool:
        """Whether the weights run in this process."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it answers conversations."""

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None where it is unknown."""

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """The publisher's values for sampling fields that a call leaves unset; empty for a hosted model."""

    @property
    def directory(self) -> Path | None:
        """The directory of its files; None for a hosted model."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None for a hosted model."""

    def complete(self, prompt: CheckedPrompt, settings: CallSettings) -> Completion:
        """Continue a text or answer a conversation."""

    def batch(
        self, prompts: Sequence[CheckedPrompt], settings: CallSettings
    ) -> Sequence[Completion | UserError]:
        """Answer every prompt, in order; an error takes the place of an answer that failed alone."""

    def stream(self, prompt: CheckedPrompt, settings: CallSettings) -> Iterator[str | Completion]:
        """Yield pieces of text, then the Completion. Closing the iterator stops the model."""

    def score(self, prompt: CheckedPrompt, continuation: str) -> Score:
        """Return the log-probability of ``continuation`` after ``prompt``."""

    def choose(
        self, prompts: Sequence[CheckedPrompt], choices: Sequence[Sequence[str]], end: bool = False
    ) -> list[list[float]]:
        """Return the total log-probability of every choice after its prompt.

        end: count the end-of-text token as part of every choice.
        """

    def best_choice(
        self,
        prompts: Sequence[CheckedPrompt],
        choices: Sequence[Sequence[str]],
        offsets: Sequence[float] | None = None,
        end: bool = False,
    ) -> list[int]:
        """Return the index of the choice with the largest log-probability plus offset after its prompt."""

    def read(self, prompt: CheckedPrompt, top: int) -> list[Step]:
        """Return the probability of each token of a prompt and of the ``top`` likeliest; [] where unknown."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of length 1 for each text, [N, H]."""

    def count_tokens(self, prompt: CheckedPrompt) -> int:
        """Return how many tokens the model reads for a prompt, special tokens included."""

    def draft_engine(self) -> Engine:
        """Return the engine that drafts tokens for a larger model (speculative decoding)."""
