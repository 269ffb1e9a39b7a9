"""A model whose weights run in this process: a reference and conversations in front of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from tercet.data.prompt_tokens import NEW_MESSAGE, PromptEnding, check_context, conversation_text
from tercet.engine.engine import Engine
from tercet.engine.grammar import Grammar
from tercet.engine.load import load_reference
from tercet.engine.request import Completion, Request, Sampling, Score
from tercet.errors import UserError
from tercet.model.control_text import ControlTokenMode, check_mode
from tercet.model.reference import Reference
from tercet.model.source import directory_of
from tercet.prompt.explain import Step, steps_read
from tercet.prompt.model import CheckedPrompt
from tercet.prompt.settings import CallSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class LocalModel:
    """A checkpoint, an adapter on its base, or a download from the Hub.

    Args:
        reference: of a local kind.
        dtype: type of the weights, as for `tercet.LLM`; the same holds for the next three.
        device: where the weights run.
        quantize: form of the weights on a CPU.
        threads: threads on a CPU.
        speculation: "ngram", or the engine of a smaller model that drafts tokens.
        control_tokens: what control tokens that messages spell become: ordinary text, or these tokens.

    Raises:
        UserError: the directory contains no model that can be loaded.
    """

    is_local = True

    def __init__(
        self,
        reference: Reference,
        dtype: str | None = None,
        device: str | None = None,
        *,
        quantize: str | None = None,
        threads: int | None = None,
        speculation: Literal["ngram"] | Engine | None = None,
        control_tokens: ControlTokenMode = "text",
    ) -> None:
        self.control_tokens = check_mode(control_tokens)
        self.reference = reference
        self.directory = directory_of(reference)
        self.engine: Engine = load_reference(
            reference,
            self.directory,
            dtype,
            device,
            quantize=quantize,
            threads=threads,
            speculation=speculation,
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

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """The publisher's values for sampling fields that a call leaves unset."""
        return self.engine.sampling_defaults

    def complete(self, prompt: CheckedPrompt, settings: CallSettings) -> Completion:
        """Continue a text or answer a conversation."""
        return self.batch([prompt], settings)[0]

    def batch(self, prompts: Sequence[CheckedPrompt], settings: CallSettings) -> list[Completion]:
        """Answer all prompts in one batch of the engine."""
        grammar = _grammar(settings)
        sampling = settings.for_local(self.sampling_defaults)
        return self.engine.generate(
            [self._request(prompt, sampling, grammar, settings.ending) for prompt in prompts]
        )

    def stream(self, prompt: CheckedPrompt, settings: CallSettings) -> Iterator[str | Completion]:
        """Yield pieces of text, then the Completion. Closing the iterator stops the engine."""
        sampling = settings.for_local(self.sampling_defaults)
        return self._pieces(prompt, sampling, _grammar(settings), settings.ending)

    def _pieces(
        self, prompt: CheckedPrompt, sampling: Sampling, grammar: Grammar | None, ending: PromptEnding
    ) -> Iterator[str | Completion]:
        for delta in self.engine.stream([self._request(prompt, sampling, grammar, ending)]):
            if delta.text:
                yield delta.text
            if delta.completion is not None:
                yield delta.completion

    def score(self, prompt: CheckedPrompt, continuation: str) -> Score:
        """Return the log-probability of the continuation."""
        text, special = self._text(prompt)
        return self.engine.score([(text, continuation)], special=special)[0]

    def choose(
        self, prompts: Sequence[CheckedPrompt], choices: Sequence[Sequence[str]], end: bool = False
    ) -> list[list[float]]:
        """Return the log-probability of each choice after its prompt.

        end: count the end-of-text token as part of every choice.
        """

        def score(texts: list[str], rows: list[int], special: bool) -> list[list[float]]:
            return self.engine.choose(texts, [choices[row] for row in rows], end=end, special=special)

        return self._by_kind(prompts, score)

    def best_choice(
        self,
        prompts: Sequence[CheckedPrompt],
        choices: Sequence[Sequence[str]],
        offsets: Sequence[float] | None = None,
        end: bool = False,
    ) -> list[int]:
        """Return the index of the choice with the largest log-probability plus offset after its prompt."""

        def choose(texts: list[str], rows: list[int], special: bool) -> list[int]:
            added = None if offsets is None else [offsets] * len(rows)
            own = [choices[row] for row in rows]
            return self.engine.best_choice(texts, own, added, end=end, special=special)

        return self._by_kind(prompts, choose)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of length 1 for each text, [N, H]: the mean input of the output head."""
        return self.engine.embed([self.encode(text) for text in texts])

    def _by_kind(
        self, prompts: Sequence[CheckedPrompt], compute: Callable[[list[str], list[int], bool], list[T]]
    ) -> list[T]:
        """Return a result for each prompt: one call for all, unless texts and conversations are mixed."""
        results: dict[int, T] = {}
        texts = [self._text(prompt) for prompt in prompts]
        for kind in {special for _, special in texts}:
            rows = [number for number, (_, special) in enumerate(texts) if special == kind]
            results |= dict(zip(rows, compute([texts[row][0] for row in rows], rows, kind), strict=True))
        return [results[number] for number in range(len(texts))]

    def read(self, prompt: CheckedPrompt, top: int) -> list[Step]:
        """Return the probability of each token of a prompt, with the ``top`` likeliest in its place."""
        tokens = self._fitting_tokens(prompt)
        texts = [text for text, _ in self.engine.token_pieces(tokens)]
        return steps_read(tokens, texts, self.engine.prompt_logprobs([tokens], top)[0])

    def count_tokens(self, prompt: CheckedPrompt) -> int:
        """Return how many tokens the model reads for a prompt, special tokens included."""
        return len(self.encode(prompt))

    def encode(self, prompt: CheckedPrompt, ending: PromptEnding | None = None) -> list[int]:
        """Return the token ids that the model reads for a prompt."""
        text, special = self._text(prompt, ending)
        return self.tokenizer.encode(text, special=special)

    def draft_engine(self) -> Engine:
        """Return the engine, which drafts tokens for a larger model."""
        return self.engine

    def _text(self, prompt: CheckedPrompt, ending: PromptEnding | None = None) -> tuple[str, bool]:
        """The prompt as text, and whether encoding adds special tokens: a template writes its own."""
        if isinstance(prompt, str):
            return prompt, True
        if not self.has_chat_template:
            raise UserError(
                f"{self.reference.text} has no chat template (it is a base model), so it cannot chat; "
                "use generate to continue text, or tune it on conversations"
            )
        text = conversation_text(
            self.tokenizer, prompt, control_tokens=self.control_tokens, ending=ending or NEW_MESSAGE
        )
        return text, False

    def _request(
        self, prompt: CheckedPrompt, sampling: Sampling, grammar: Grammar | None, ending: PromptEnding
    ) -> Request:
        return Request(tuple(self._fitting_tokens(prompt, ending)), sampling, grammar)

    def _fitting_tokens(self, prompt: CheckedPrompt, ending: PromptEnding | None = None) -> list[int]:
        """The prompt's tokens. UserError where there are none, ContextOverflow where they do not fit."""
        tokens = self.encode(prompt, ending)
        if not tokens:
            raise UserError(
                "the prompt is empty, and this model has no beginning-of-text token; give a prompt with text"
            )
        kind = "prompt" if isinstance(prompt, str) else "conversation"
        check_context(tokens, self.context_length, kind, self.reference.text)
        return tokens


def _grammar(settings: CallSettings) -> Grammar | None:
    """The form of the answers, checked before anything is generated."""
    if settings.output is None:
        return None
    settings.output.grammar.check()
    return settings.output.grammar
