"""LLM: the same methods for a model in this process and for one on a server.

llm = LLM("runs/mine/model")         # or "org/name", "openai:NAME", "http://host/v1#NAME"
llm.generate("Once upon a time", max_tokens=64).text
llm.chat([{"role": "user", "content": "hi"}], temperature=0).text
llm.generate("A person:", schema=Person).parsed  # Person: a pydantic class
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from tercet.data.conversation import Message, check_text, read_messages
from tercet.data.prompt_tokens import NEW_MESSAGE, PromptEnding
from tercet.engine.request import Completion, Sampling, SamplingChoice, Score
from tercet.errors import UserError
from tercet.model.control_text import ControlTokenMode
from tercet.model.reference import parse_reference
from tercet.prompt.errors import BatchError
from tercet.prompt.loading import load_model
from tercet.prompt.model import CheckedPrompt, Model
from tercet.prompt.prices import Price, as_price, known_price
from tercet.prompt.settings import CallSettings, SamplingFields, call_settings
from tercet.prompt.stream import Stream, finish_completion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tercet.model.tokenizer import Tokenizer
    from tercet.prompt.explain import Explanation
    from tercet.prompt.output import Schema

Prompt = str | Sequence[Message]


class LLM:
    """A language model that is used without changing it.

    Args:
        reference: any model reference (see :mod:`tercet.model.reference`).
        device: where a local model runs ("cpu", "cuda"); None: a GPU if there is one.
        quantize: the form of a local model's weights in memory on a CPU: "int8" (the default; of a GGUF file
            its own bits), "int4", "bf16", or "none" for the type on disk.
        dtype: the type of a local model's weights on a GPU ("float32", "bfloat16", "float16"); None: as on
            disk. On a CPU "float32" means the same as ``quantize="none"``, "bfloat16" the same as "bf16".
        threads: threads for a local model on a CPU; None: its physical cores.
        speculation: draft tokens and verify several at once, which changes no greedy answer: "ngram"
            drafts the tokens that followed the same words before; a smaller LLM with the same tokenizer
            drafts with its own network. The completion's ``drafted`` and ``accepted`` count the tokens.
        price: US dollars per million tokens (read, written); None: from the user's prices file.
        timeout: seconds to wait for a hosted model (60), each try.
        retries: how often a hosted model is tried again (2).
        control_tokens: what control tokens (``<|im_end|>``) that messages spell become, for a local model:
            "text" (the default) makes them ordinary text, so that no message can end its turn; "control" makes
            them control tokens. In a prompt of ``generate`` they are always control tokens.

    Every call takes the fields of :class:`~tercet.engine.request.Sampling` as keywords, or
    ``sampling=Sampling(...)``, or both (keywords win). A local model uses its publisher's values
    (``generation_config.json``) for the temperature, ``top_k``, ``top_p``, ``min_p`` and
    ``repetition_penalty`` that a call leaves unset, except at temperature 0; ``sampling="greedy"`` always
    takes the most likely token, and ``sampling="neutral"`` samples from the model's own distribution. A
    Sampling object sets every field. A hosted model is sent only the keywords of the call,
    so that its own defaults hold; of a Sampling object it is sent ``max_tokens``, ``temperature`` and the
    fields that differ from the defaults.

    ``generate``, ``chat``, ``stream`` and ``batch`` also take the form that an answer must have, at
    most one of:

    - ``schema``: a pydantic class or a JSON Schema (a dict). The answer is JSON, and the completion's
      ``parsed`` is the instance of the class or the value of the JSON. When the answer does not match (it
      was cut off at ``max_tokens``, or a validator of the class rejects it), the call raises
      OutputError, which holds the completion.
    - ``regex``: a regular expression that matches the whole answer (Rust's syntax: no look-around).
    - ``choices``: a list of texts, one of which is the answer.
    - ``grammar``: a grammar in llguidance's Lark syntax.

    ``chat``, ``stream`` and ``batch`` answer a conversation with a new message. With
    ``continue_final_message=True`` the answer continues the last message, which is usually the assistant's;
    ``add_generation_prompt=True`` begins a new one even after an assistant's message, and False begins none.

    A local model can only choose tokens that keep the answer in this form. A hosted model supports only a
    schema, which its server enforces. The prompt is not changed, and the model does not
    see the schema: describe the form in the prompt.

    Raises:
        UserError: a wrong reference, a model that cannot be loaded, an option that would do nothing.
    """

    def __init__(
        self,
        reference: str | Path,
        *,
        dtype: str | None = None,
        device: str | None = None,
        quantize: str | None = None,
        threads: int | None = None,
        speculation: Literal["ngram"] | LLM | None = None,
        price: Price | tuple[float, float] | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        control_tokens: ControlTokenMode | None = None,
    ) -> None:
        self.reference = parse_reference(str(reference))
        if price is None:
            self.price = known_price(self.reference.text)
        else:
            self.price = price if isinstance(price, Price) else as_price(price)
        self._model: Model = load_model(
            self.reference,
            dtype=dtype,
            device=device,
            quantize=quantize,
            threads=threads,
            speculation=speculation._model if isinstance(speculation, LLM) else speculation,
            timeout=timeout,
            retries=retries,
            control_tokens=control_tokens,
        )

    @property
    def name(self) -> str:
        """The reference as it was written."""
        return self.reference.text

    @property
    def is_local(self) -> bool:
        """Whether the weights run in this process."""
        return self._model.is_local

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` works: hosted models always, local ones with a template."""
        return self._model.has_chat_template

    @property
    def context_length(self) -> int | None:
        """How many tokens prompt and answer may have together; None for a hosted model."""
        return self._model.context_length

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """The publisher's values for sampling fields that a call leaves unset; empty for a hosted model."""
        return self._model.sampling_defaults

    @property
    def directory(self) -> Path | None:
        """The directory of a local model's files; None for a hosted one."""
        return self._model.directory

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of a local model; None for a hosted one."""
        return self._model.tokenizer

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of length 1 for each text, [N, H]: the mean input of the model's output head.

        Raises:
            UserError: a hosted model, a text that is empty or too long, or a model that runs through transformers.
        """
        return self._model.embed([check_text(text, f"texts[{number}]") for number, text in enumerate(texts)])

    def count_tokens(self, prompt: Prompt) -> int:
        """Return how many tokens a local model reads for a text or conversation, special tokens included.

        Raises:
            UserError: a hosted model; see the ``usage`` of its answers.
        """
        return self._model.count_tokens(_checked(prompt))

    def generate(
        self,
        prompt: str,
        *,
        sampling: Sampling | SamplingChoice | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """Continue ``prompt``. A hosted model, which only chats, gets it as one user message.

        Raises:
            ContextOverflow: the prompt is longer than the model's context.
            OutputError: with a schema, an answer that does not match it.
        """
        settings = call_settings(
            sampling, fields, schema=schema, regex=regex, choices=choices, grammar=grammar
        )
        return self._complete(check_text(prompt, "prompt"), settings)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling | SamplingChoice | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """Return the assistant's next message in a conversation.

        The content of a message is a string or a list of text parts.

        Raises:
            UserError: a local model without a chat template (``generate`` continues text instead).
            ContextOverflow: the conversation is longer than the model's context.
            OutputError: with a schema, an answer that does not match it.
        """
        ending = PromptEnding(continue_final_message, add_generation_prompt)
        settings = call_settings(
            sampling,
            fields,
            schema=schema,
            regex=regex,
            choices=choices,
            grammar=grammar,
            ending=ending,
        )
        return self._complete(_answerable(read_messages(messages), ending), settings)

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | SamplingChoice | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Stream:
        """Do as ``generate`` for a string and as ``chat`` for messages, piece by piece.

        Pieces are whole characters and never part of a stop string.
        """
        ending = PromptEnding(continue_final_message, add_generation_prompt)
        settings = call_settings(
            sampling,
            fields,
            schema=schema,
            regex=regex,
            choices=choices,
            grammar=grammar,
            ending=ending,
        )
        return Stream(
            self._model.stream(_answerable(_checked(prompt), ending), settings), self.price, settings.output
        )

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling | SamplingChoice | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool | None = None,
        **fields: Unpack[SamplingFields],
    ) -> list[Completion]:
        """Return one completion for each prompt or conversation, in order, equal to those of single calls.

        Raises:
            BatchError: some requests to a hosted model failed, or some answers do not match the schema;
                it holds all completions that came.
        """
        if isinstance(prompts, str):
            raise UserError("batch takes a list of prompts; use generate for a single prompt")
        ending = PromptEnding(continue_final_message, add_generation_prompt)
        settings = call_settings(
            sampling,
            fields,
            schema=schema,
            regex=regex,
            choices=choices,
            grammar=grammar,
            ending=ending,
        )
        checked = [
            _answerable(_checked(prompt, name), ending, name)
            for name, prompt in ((f"prompts[{number}]", prompt) for number, prompt in enumerate(prompts))
        ]
        if not checked:
            return []
        completions: list[Completion | None] = []
        failures: dict[int, str] = {}
        for index, result in enumerate(self._model.batch(checked, settings)):
            try:
                if isinstance(result, UserError):
                    raise result
                finish_completion(result, self.price, settings.output)
            except UserError as problem:
                failures[index] = str(problem)
            completions.append(None if isinstance(result, UserError) else result)
        if failures:
            raise BatchError(completions, failures)
        return [completion for completion in completions if completion is not None]

    def score(self, prompt: Prompt, continuation: str) -> Score:
        """Return the log-probability of ``continuation`` after a text, or as the answer in a conversation.

        Raises:
            UserError: a hosted model that gives no log-probabilities of a given text.
        """
        return self._model.score(_checked(prompt), check_text(continuation, "continuation"))

    def choose(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        end: bool = False,
    ) -> list[list[float]]:
        """Return the total log-probability of every choice after every prompt.

        Args:
            prompts: texts, or conversations that the choice would answer.
            choices: one list for all prompts, or a list for each.
            end: count the end-of-text token as part of every choice, for a model that was tuned to
                answer and stop (local models only).

        Raises:
            UserError: as ``score``; a list of choices that does not fit the prompts.
        """
        checked = [_checked(prompt, f"prompts[{number}]") for number, prompt in enumerate(prompts)]
        return self._model.choose(checked, _choice_rows(choices, len(checked)), end)

    def best_choice(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        offsets: Sequence[float] | None = None,
        end: bool = False,
    ) -> list[int]:
        """Return the index of the likeliest choice after every prompt, the first of equal ones.

        The result is that of `choose`, in less time: a local model drops a choice as soon as its first tokens
        are less likely than another choice is in total.

        Args:
            prompts: as in ``choose``.
            choices: as in ``choose``.
            offsets: a number for each choice that is added to its log-probability; None: nothing is added.
            end: as in ``choose``.

        Raises:
            UserError: as ``choose``.
        """
        checked = [_checked(prompt, f"prompts[{number}]") for number, prompt in enumerate(prompts)]
        rows = _choice_rows(choices, len(checked))
        if offsets is not None and any(len(row) != len(offsets) for row in rows):
            raise UserError(f"{len(offsets)} offsets do not fit the choices; give one for each choice")
        return self._model.best_choice(checked, rows, offsets, end)

    def explain(
        self,
        prompt: Prompt,
        *,
        top: int = 5,
        sampling: Sampling | SamplingChoice | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Explanation:
        """Return how the model reads ``prompt`` and continues it, token by token.

        A hosted model reports the tokens that it wrote only.

        Args:
            prompt: a text to continue, or a conversation to answer.
            top: how many of the likeliest tokens to list at each place.
            sampling: as for ``generate``; by default the model writes five tokens, the likeliest each time.
            **fields: as for ``generate``.
        """
        from tercet.prompt.explain import Explanation, step_of

        checked = _checked(prompt)
        greedy = {"max_tokens": 5, "temperature": 0.0} if sampling is None else {}
        settings = call_settings(sampling, {**greedy, "logprobs": top, **fields})
        read = self._model.read(checked, top)
        completion = self._complete(checked, settings)
        written = [step_of(entry) for entry in completion.logprobs or []]
        return Explanation(self.name, read, written, completion.finish_reason)

    def _complete(self, prompt: CheckedPrompt, settings: CallSettings) -> Completion:
        completion = self._model.complete(prompt, settings)
        finish_completion(completion, self.price, settings.output)
        return completion


def _checked(prompt: Prompt, name: str = "prompt") -> CheckedPrompt:
    return check_text(prompt, name) if isinstance(prompt, str) else read_messages(prompt, name)


def _answerable(prompt: CheckedPrompt, ending: PromptEnding, name: str = "messages") -> CheckedPrompt:
    """Return the prompt of a call whose settings say how it ends; UserError where they don't fit it."""
    if not isinstance(prompt, str):
        ending.check(prompt, name)
    elif ending != NEW_MESSAGE:
        raise UserError(
            "`continue_final_message` and `add_generation_prompt` are for conversations; a text is always continued"
        )
    return prompt


def _choice_rows(choices: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """A list of choices for each of ``count`` prompts."""
    if isinstance(choices, str) or not choices:
        raise UserError("choices must be a list of strings, or one such list for each prompt")
    rows = [list(row) for row in choices if not isinstance(row, str)]
    if not rows:
        rows = [[str(choice) for choice in choices]] * count
    if len(rows) != count:
        raise UserError(
            f"{len(rows)} lists of choices for {count} prompts; give one list for each, or one for all"
        )
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"choices[{number}] is empty")
        for choice in row:
            if not check_text(choice, f"choices[{number}]"):
                raise UserError(f"choices[{number}] holds an empty string")
    return rows
