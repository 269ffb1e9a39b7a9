"""A model whose weights run here: references and conversations in front of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from tercet.data.conversation import Message
from tercet.data.prompt_tokens import check_context, conversation_text
from tercet.engine.engine import Engine
from tercet.engine.grammar import Grammar
from tercet.engine.load import load_reference
from tercet.engine.request import Completion, Request, Sampling, Score
from tercet.errors import UserError
from tercet.model.reference import Reference
from tercet.model.source import directory_of
from tercet.prompt.explain import Step, steps_read

Prompt = str | list[Message]


class LocalModel:
    """A checkpoint, an adapter on its base, or a download from the Hub.

    Raises:
        UserError: the directory holds no model that can be loaded.
    """

    def __init__(
        self,
        reference: Reference,
        dtype: str | None = None,
        device: str | None = None,
        *,
        quantize: str | None = None,
        threads: int | None = None,
        speculation: LocalModel | Literal["ngram"] | None = None,
    ) -> None:
        self.reference = reference
        self.directory = directory_of(reference)
        draft_model = speculation.engine if isinstance(speculation, LocalModel) else speculation
        self.engine: Engine = load_reference(
            reference,
            self.directory,
            dtype,
            device,
            quantize=quantize,
            threads=threads,
            speculation=draft_model,
        )
        self.tokenizer = self.engine.tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.tokenizer.chat_template is not None

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.context_length

    def batch(
        self, prompts: Sequence[Prompt], sampling: Sampling, constraint: Grammar | None = None
    ) -> list[Completion]:
        """All prompts in one batch; ``constraint``: the form that every answer must have."""
        return self.engine.generate([self._request(prompt, sampling, constraint) for prompt in prompts])

    def stream(
        self, prompt: Prompt, sampling: Sampling, constraint: Grammar | None = None
    ) -> Iterator[str | Completion]:
        """Pieces of text, then the Completion. Closing the iterator stops the engine."""
        for delta in self.engine.stream([self._request(prompt, sampling, constraint)]):
            if delta.text:
                yield delta.text
            if delta.completion is not None:
                yield delta.completion

    def score(self, prompt: Prompt, continuation: str) -> Score:
        """Log-probability of the continuation."""
        text, special = self._text(prompt)
        return self.engine.score([(text, continuation)], special=special)[0]

    def choose(
        self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], end: bool = False
    ) -> list[list[float]]:
        """Log-probability of each choice after its prompt; ``end``: with the end-of-text token after it."""
        found: dict[int, list[float]] = {}
        texts = [self._text(prompt) for prompt in prompts]
        for kind in {special for _, special in texts}:  # one call for all, unless kinds are mixed
            rows = [number for number, (_, special) in enumerate(texts) if special == kind]
            scores = self.engine.choose(
                [texts[row][0] for row in rows], [choices[row] for row in rows], end=end, special=kind
            )
            found |= dict(zip(rows, scores, strict=True))
        return [found[number] for number in range(len(texts))]

    def read(self, prompt: Prompt, top: int) -> list[Step]:
        """How likely each token of a prompt was, with the ``top`` likeliest in its place."""
        tokens = self._fitting_tokens(prompt)
        texts = [text for text, _ in self.engine.token_pieces(tokens)]
        return steps_read(tokens, texts, self.engine.prompt_logprobs([tokens], top)[0])

    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens the model reads for a prompt, special tokens included."""
        return len(self.encode(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids that the model reads for a prompt."""
        text, special = self._text(prompt)
        return self.tokenizer.encode(text, special=special)

    def _text(self, prompt: Prompt) -> tuple[str, bool]:
        """The prompt as text, and whether encoding adds special tokens: a template writes its own."""
        if isinstance(prompt, str):
            return prompt, True
        if not self.has_chat_template:
            raise UserError(
                f"{self.reference.text} has no chat template (a base model), so it cannot chat; "
                "use generate to continue text, or tune it on conversations"
            )
        return conversation_text(self.tokenizer, prompt), False

    def _request(self, prompt: Prompt, sampling: Sampling, constraint: Grammar | None) -> Request:
        return Request(tuple(self._fitting_tokens(prompt)), sampling, constraint)

    def _fitting_tokens(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens; UserError where there are none, or more than the model takes."""
        tokens = self.encode(prompt)
        if not tokens:
            raise UserError(
                "the prompt is empty, and this model has no token to begin a text with; write something"
            )
        kind = "prompt" if isinstance(prompt, str) else "conversation"
        check_context(tokens, self.context_length, kind, self.reference.text)
        return tokens
