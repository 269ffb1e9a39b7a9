"""LLM: one model, whatever holds it, behind one set of calls.

llm = LLM("runs/mine/model")         # or "org/name", "openai:NAME", "http://host/v1#NAME"
llm.generate("Once upon a time", max_tokens=64).text
llm.chat([{"role": "user", "content": "hi"}], temperature=0).text
llm.generate("A person:", schema=Person).parsed  # Person: a pydantic class
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tercet.data.conversation import Message, check_messages, check_text, conversation
from tercet.engine.grammar import Grammar
from tercet.engine.request import Completion, Sampling, Score
from tercet.errors import UserError, nearest
from tercet.model.reference import parse_reference
from tercet.prompt.output import OPTIONS, Output, OutputError, wanted_output
from tercet.prompt.prices import Price, as_price, known_price

if TYPE_CHECKING:
    from tercet.model.tokenizer import Tokenizer
    from tercet.prompt.explain import Explanation
    from tercet.prompt.hosted import OpenAIModel
    from tercet.prompt.local import LocalModel
    from tercet.prompt.output import Schema

Prompt = str | Sequence[Message]

_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


class Stream:
    """Pieces of text as they come; afterwards ``completion`` holds the whole.

    ``close()`` (or leaving a ``with`` block) stops the model. ``text`` is what has come so far.
    With a schema, OutputError comes after the last piece when the whole is not what was asked for.
    """

    def __init__(
        self,
        pieces: Iterator[str | Completion],
        price: Price | None = None,
        output: Output | None = None,
    ) -> None:
        self._pieces, self._price, self._output = pieces, price, output
        self._completion: Completion | None = None
        self.text = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Completion):
            self._completion = piece
            self.close()
            _finish(piece, self._price, self._output)
            raise StopIteration
        self.text += piece
        return piece

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self._completion is not None

    @property
    def completion(self) -> Completion:
        """The whole answer. RuntimeError while it is not there (``finished`` tells)."""
        if self._completion is None:
            raise RuntimeError("the stream has not ended: iterate over it first")
        return self._completion

    def close(self) -> None:
        """Stop generating; nothing more comes."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LLM:
    """A model to use as it is.

    Args:
        reference: any model reference (see :mod:`tercet.model.reference`).
        device: where a local model runs ("cpu", "cuda"); None: a GPU if there is one.
        quantize: how a local model's weights are kept on a CPU: "int8" (what None means), "int4",
            "bf16", or "none" for as they are on disk.
        dtype: the type of a local model's weights on a GPU ("float32", "bfloat16", "float16"); None: as on
            disk. On a CPU "float32" is another word for "none", "bfloat16" for "bf16".
        threads: threads for a local model on a CPU; None: its physical cores.
        speculation: guess tokens and check several at once, which changes no greedy answer: "ngram"
            guesses what followed the same words before; an LLM of the same tokenizer, smaller, guesses
            with its own network. The completion's ``drafted`` and ``accepted`` tell how well that went.
        price: US dollars per million tokens (read, written); None: from the user's prices file.
        timeout: seconds to wait for a hosted model (60), each try.
        retries: how often a hosted model is tried again (2).

    Every call takes the fields of :class:`~tercet.engine.request.Sampling` as keywords, or
    ``sampling=Sampling(...)``, or both (keywords win). A hosted model is sent the keywords that
    were given and nothing else, so that its own defaults hold; of a Sampling object it is sent
    ``max_tokens``, ``temperature`` and what differs from the defaults.

    ``generate``, ``chat``, ``stream`` and ``batch`` also take the form that an answer must have, at
    most one of:

    - ``schema``: a pydantic class or a JSON Schema (a dict). The answer is JSON, and the completion's
      ``parsed`` the instance of the class or the value of the JSON. When the answer is not that (it
      was cut off at ``max_tokens``, or a validator of the class refuses it), the call raises
      OutputError, which holds the completion.
    - ``regex``: a regular expression that matches the whole answer (Rust's syntax: no look-around).
    - ``choices``: a list of texts, of which the answer is one.
    - ``grammar``: a grammar in llguidance's Lark syntax.

    A local model can only choose tokens that keep to the form. A hosted model takes a schema only, and
    sees to it itself. The prompt stays as it is: say in it what you want, as the model is not told.

    Raises:
        UserError: a wrong reference, a model that can't be loaded, an option that would do nothing.
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
    ) -> None:
        self.reference = parse_reference(str(reference))
        text = self.reference.text
        self.price = (
            known_price(text) if price is None else price if isinstance(price, Price) else as_price(price)
        )
        self._local: LocalModel | None = None
        self._hosted: OpenAIModel | None = None
        if self.reference.is_local:
            if timeout is not None or retries is not None:
                raise UserError(f"timeout and retries are for hosted models; {text} runs here")
            from tercet.prompt.local import LocalModel

            guesses = speculation._drafts() if isinstance(speculation, LLM) else speculation
            self._local = LocalModel(
                self.reference, dtype, device, quantize=quantize, threads=threads, speculation=guesses
            )
        else:
            if any(one is not None for one in (dtype, device, quantize, threads, speculation)):
                raise UserError(
                    f"dtype, device, quantize, threads and speculation are for local models; {text} runs on its server"
                )
            from tercet.prompt.hosted import OpenAIModel

            self._hosted = OpenAIModel(
                self.reference,
                timeout=60 if timeout is None else timeout,
                retries=2 if retries is None else retries,
            )

    def _drafts(self) -> LocalModel:
        if self._local is None:
            raise UserError(f"{self.name} can't guess for another model: it is hosted")
        return self._local

    @property
    def name(self) -> str:
        """The reference as it was written."""
        return self.reference.text

    @property
    def is_local(self) -> bool:
        """Whether the weights run in this process."""
        return self._local is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` works: hosted models always, local ones with a template."""
        return self._local is None or self._local.has_chat_template

    @property
    def context_length(self) -> int | None:
        """How many tokens prompt and answer may have together; None for a hosted model."""
        return self._local.context_length if self._local else None

    @property
    def directory(self) -> Path | None:
        """Where a local model's files are; None for a hosted one."""
        return self._local.directory if self._local else None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of a local model; None for a hosted one."""
        return self._local.tokenizer if self._local else None

    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens a local model reads for a text or conversation, special tokens included.

        Raises:
            UserError: a hosted model; its ``usage`` tells after a call.
        """
        checked = _checked(prompt)
        if self._local:
            return self._local.count_tokens(checked)
        raise UserError(f"{self.name} does not count tokens before a call; the answer's usage tells")

    def generate(
        self,
        prompt: str,
        *,
        sampling: Sampling | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        **fields: Any,
    ) -> Completion:
        """Continue ``prompt``. A hosted model, which only chats, gets it as one user message.

        Raises:
            OutputError: with a schema, an answer that is not what it asks for.
        """
        output = wanted_output(schema, regex, choices, grammar)
        return self._one(check_text(prompt, "prompt"), sampling, fields, output)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        **fields: Any,
    ) -> Completion:
        """The assistant's next message in a conversation.

        Raises:
            UserError: a local model without a chat template (``generate`` continues text instead).
            ContextOverflow: the conversation is longer than the model's context.
            OutputError: with a schema, an answer that is not what it asks for.
        """
        output = wanted_output(schema, regex, choices, grammar)
        return self._one(check_messages(messages), sampling, fields, output)

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        **fields: Any,
    ) -> Stream:
        """As ``generate`` for a string and ``chat`` for messages, piece by piece.

        Whole characters only, and never a part of a stop string.
        """
        checked = _checked(prompt)
        settings = _settings(sampling, fields)
        output = wanted_output(schema, regex, choices, grammar)
        if self._local:
            pieces = self._local.stream(checked, Sampling(**settings), _constraint(output))
        else:
            pieces = self._server.stream(_as_messages(checked), _sent(sampling, fields), output)
        return Stream(pieces, self.price, output)

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """One completion for each prompt or conversation, in order; the same as one by one.

        Raises:
            BatchError: some requests to a hosted model failed, or some answers are not what the
                schema asks for; it holds all completions that came.
        """
        if isinstance(prompts, str):
            raise UserError("batch takes a list of prompts; use generate for one")
        checked = [_checked(prompt, f"prompts[{number}]") for number, prompt in enumerate(prompts)]
        settings = _settings(sampling, fields)
        output = wanted_output(schema, regex, choices, grammar)
        if not checked:
            return []
        from tercet.prompt.hosted import BatchError

        completions: Sequence[Completion | None]
        failures: dict[int, str] = {}
        if self._local:
            completions = self._local.batch(checked, Sampling(**settings), _constraint(output))
        else:
            try:
                conversations = [_as_messages(prompt) for prompt in checked]
                completions = self._server.batch(conversations, _sent(sampling, fields), output)
            except BatchError as problem:
                completions, failures = problem.completions, dict(problem.failures)
        for index, completion in enumerate(completions):
            try:
                if completion is not None:
                    _finish(completion, self.price, output)
            except OutputError as problem:
                failures[index] = str(problem)
        if failures:
            raise BatchError(list(completions), failures)
        return [completion for completion in completions if completion is not None]

    def score(self, prompt: Prompt, continuation: str) -> Score:
        """The log-probability of ``continuation`` after a text, or as the answer in a conversation.

        Raises:
            UserError: a hosted model that gives no log-probabilities of a given text.
        """
        checked = _checked(prompt)
        check_text(continuation, "continuation")
        if self._local:
            return self._local.score(checked, continuation)
        return self._server.score(self._plain(checked), continuation)

    def choose(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        end: bool = False,
    ) -> list[list[float]]:
        """The total log-probability of every choice after every prompt.

        Args:
            prompts: texts, or conversations that the choice would answer.
            choices: one list for all prompts, or a list for each.
            end: count the end-of-text token as part of every choice, for a model that was tuned to
                answer and stop (local models only).

        Raises:
            UserError: as ``score``; a list of choices that does not fit the prompts.
        """
        checked = [_checked(prompt, f"prompts[{number}]") for number, prompt in enumerate(prompts)]
        each = _choices(choices, len(checked))
        if self._local:
            return self._local.choose(checked, each, end)
        if end:
            raise UserError(f"{self.name} cannot score the end of an answer; leave out end")
        return [
            [self._server.score(self._plain(prompt), choice).logprob for choice in row]
            for prompt, row in zip(checked, each, strict=True)
        ]

    def explain(
        self, prompt: Prompt, *, top: int = 5, sampling: Sampling | None = None, **fields: Any
    ) -> Explanation:
        """How the model reads ``prompt`` and goes on from it, token by token.

        top: how many of the likeliest tokens are shown at each place. The other keywords are those of
            ``generate``; without any the likeliest token is taken five times.

        A server tells of the tokens that it wrote only.
        """
        from tercet.prompt.explain import Explanation, step_of

        checked = _checked(prompt)
        read = self._local.read(checked, top) if self._local else []
        given = (
            {"logprobs": top}
            if sampling is not None
            else {"max_tokens": 5, "temperature": 0.0, "logprobs": top}
        )
        completion = self._one(checked, sampling, given | fields, None)
        written = [step_of(entry) for entry in completion.logprobs or []]
        return Explanation(self.name, read, written, completion.finish_reason)

    def _plain(self, prompt: str | list[Message]) -> str:
        if not isinstance(prompt, str):
            raise UserError(f"{self.name} cannot score answers in a conversation; give the prompt as text")
        return prompt

    @property
    def _server(self) -> OpenAIModel:
        assert self._hosted is not None
        return self._hosted

    def _one(
        self,
        prompt: str | list[Message],
        sampling: Sampling | None,
        fields: dict[str, Any],
        output: Output | None,
    ) -> Completion:
        settings = _settings(sampling, fields)
        if self._local:
            completion = self._local.batch([prompt], Sampling(**settings), _constraint(output))[0]
        else:
            completion = self._server.chat(_as_messages(prompt), _sent(sampling, fields), output)
        _finish(completion, self.price, output)
        return completion


def _checked(prompt: Prompt, what: str = "prompt") -> str | list[Message]:
    return check_text(prompt, what) if isinstance(prompt, str) else check_messages(prompt, what)


def _as_messages(prompt: str | list[Message]) -> list[Message]:
    return conversation(prompt) if isinstance(prompt, str) else prompt


def _settings(sampling: Sampling | None, fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of the Sampling that is meant, checked. UserError names the nearest of a wrong one."""
    for name in fields:
        if name not in _FIELDS:
            near = nearest(name, [*_FIELDS, *OPTIONS])
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"there is no sampling setting {name!r}{meant} (settings: {', '.join(_FIELDS)})")
    merged = dataclasses.replace(sampling or Sampling(), **fields)
    return {name: getattr(merged, name) for name in _FIELDS}


def _sent(sampling: Sampling | None, fields: dict[str, Any]) -> dict[str, Any]:
    """What of the settings goes to a server: what was set, and nothing else."""
    every, default = _settings(sampling, fields), Sampling()
    from_object = [
        name
        for name in _FIELDS
        if sampling
        and (name in ("max_tokens", "temperature") or getattr(sampling, name) != getattr(default, name))
    ]
    named = [name for name in _FIELDS if name in from_object or name in fields]
    # None (no seed, no log-probabilities) is the protocol's default too: not sent.
    return {name: every[name] for name in named if every[name] is not None}


def _choices(choices: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[list[str]]:
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


def _constraint(output: Output | None) -> Grammar | None:
    """The grammar for a local model, checked before anything is generated."""
    if output is None:
        return None
    output.grammar.check()
    return output.grammar


def _finish(completion: Completion, price: Price | None, output: Output | None) -> None:
    """Fill in what only the user's side of the model knows: its price, and what the text stands for."""
    completion.usage.cost = price.cost(completion.usage) if price else None
    if output is not None:
        output.parse(completion)
