"""A model behind OpenAI's chat protocol: api.openai.com, Anthropic's endpoint, or any other server.

Protocol: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from tercet.data.conversation import Message, conversation, for_protocol
from tercet.data.prompt_tokens import NEW_MESSAGE, PromptEnding
from tercet.engine.request import Completion, Score, TokenLogprob, Usage
from tercet.errors import UserError
from tercet.model.reference import Reference
from tercet.prompt.errors import HostedError
from tercet.prompt.explain import Step
from tercet.prompt.hosted_answer import (
    choices_of,
    echoed_score,
    finish_reason_of,
    logprobs_of,
    text_of,
    usage_of,
)
from tercet.prompt.hosted_client import HostedClient, RequestRefused
from tercet.prompt.model import CheckedPrompt
from tercet.prompt.output import Output
from tercet.prompt.settings import CallSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TIMEOUT = 60.0  # seconds for each try
RETRIES = 2
CONCURRENCY = 8  # requests of one batch in flight; most servers' own default is of this order

# Settings that are no part of OpenAI's protocol and that only some servers know.
_EXTRA = ("top_k", "min_p", "repetition_penalty", "ignore_eos")
# Anthropic's documentation lists these as ignored: https://docs.anthropic.com/en/api/openai-sdk
_IGNORED_BY_ANTHROPIC = ("seed", "presence_penalty", "frequency_penalty", "logprobs", "logit_bias")
_REFUSED = {"http": (), "openai": _EXTRA, "anthropic": (*_EXTRA, *_IGNORED_BY_ANTHROPIC)}


class HostedModel:
    """Chat completions from one model on one server.

    Args:
        reference: of kind openai, anthropic or http.
        timeout: seconds to wait for the server, each try.
        retries: how often a request is tried again after 408, 409, 429, 5xx or a lost connection.

    Raises:
        UserError: no key where one is needed; a server of several models and no name after #.
    """

    is_local = False
    has_chat_template = True
    context_length = None
    directory = None
    tokenizer = None
    sampling_defaults: Mapping[str, float] = MappingProxyType({})  # the server has its own

    def __init__(self, reference: Reference, timeout: float = TIMEOUT, retries: int = RETRIES) -> None:
        self.reference = reference
        self._client = HostedClient(reference, timeout, retries)
        self._usage_in_streams = True

    # For the server, which passes requests on

    @property
    def name(self) -> str:
        """The model's name on its server."""
        return self._client.model

    def async_client(self) -> AsyncOpenAI:
        """Return a client of the same server and key, for coroutines of one event loop."""
        return self._client.asynchronous()

    @property
    def ignored_fields(self) -> frozenset[str]:
        """Fields of a chat completion that this server accepts and documents as ignored."""
        if self.reference.kind != "anthropic":
            return frozenset()
        return frozenset({*_REFUSED["anthropic"], "top_logprobs", "response_format"})

    @property
    def max_tokens_field(self) -> str:
        """The field of a chat completion that limits the answer's length."""
        return "max_completion_tokens" if self.reference.kind == "openai" else "max_tokens"

    # Answers

    def complete(self, prompt: CheckedPrompt, settings: CallSettings) -> Completion:
        """Answer a conversation; a text is sent as one user message."""
        started = time.monotonic()
        body = self._body(prompt, settings)
        answer = self._client.call(lambda: self._client.openai.chat.completions.create(**body))
        return self._completion(answer, settings, time.monotonic() - started)

    def stream(
        self, prompt: CheckedPrompt, settings: CallSettings
    ) -> Generator[str | Completion, None, None]:
        """Yield pieces of the text as they come, then the Completion."""
        started = time.monotonic()
        body = self._body(prompt, settings)
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        reason: str | None = None
        usage = Usage(0, 0)
        chunks = self._open_stream(body)
        try:
            while (chunk := self._client.call(lambda: next(chunks, None))) is not None:
                if (reported := getattr(chunk, "usage", None)) is not None:
                    usage = usage_of(reported)
                for choice in self._client.call(partial(choices_of, chunk)):
                    text = text_of(getattr(choice, "delta", None), self.reference.text)
                    reason = getattr(choice, "finish_reason", None) or reason
                    logprobs += self._client.call(partial(logprobs_of, choice))
                    if text:
                        texts.append(text)
                        yield text
        finally:
            chunks.close()
        if reason is None:
            raise HostedError(f"{self.reference.text}: the connection ended in the middle of the answer")
        checked = self._checked_logprobs(logprobs, settings, bool(texts))
        finish = finish_reason_of(reason, self.reference.text)
        yield Completion("".join(texts), [], checked, usage, finish, time.monotonic() - started)

    def batch(self, prompts: Sequence[CheckedPrompt], settings: CallSettings) -> list[Completion | UserError]:
        """Answer every prompt, at most CONCURRENCY requests at a time.

        A request that fails leaves its error in the list. After an error that every other request would meet
        too, such as a wrong key, the remaining requests are not sent.
        """
        results: list[Completion | UserError] = [
            HostedError("not sent, because the server refuses all requests") for _ in prompts
        ]
        hopeless = threading.Event()

        def answer(index: int) -> None:
            if hopeless.is_set():
                return
            try:
                results[index] = self.complete(prompts[index], settings)
            except UserError as problem:
                results[index] = problem
                if isinstance(problem, HostedError) and problem.fatal:
                    hopeless.set()

        pool = ThreadPoolExecutor(max_workers=max(1, min(CONCURRENCY, len(prompts))))
        try:
            for done in [pool.submit(answer, index) for index in range(len(prompts))]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return results

    # Log-probabilities of given texts

    def score(self, prompt: CheckedPrompt, continuation: str) -> Score:
        """Return the log-probability of ``continuation`` after a text, from /completions with echo.

        vLLM and others support that; OpenAI and Anthropic do not. A server that ignores ``echo`` is
        recognized by its text.
        """
        name = self.reference.text
        if not isinstance(prompt, str):
            raise UserError(f"{name} cannot score answers in a conversation; give the prompt as text")
        if self.reference.kind != "http":
            raise UserError(
                f"{name} returns no log-probabilities of an existing text, so it cannot score; "
                "use a local model or a server that supports `echo`"
            )
        if not continuation:
            raise UserError("the continuation to score is empty")
        whole = prompt + continuation
        answer = self._client.call(
            lambda: self._client.openai.completions.create(
                model=self._client.model, prompt=whole, echo=True, logprobs=1, max_tokens=1, temperature=0
            )
        )
        score = self._client.call(lambda: echoed_score(answer, prompt, whole))
        if score is None:
            raise UserError(f"{name} does not echo log-probabilities, so it cannot score; use a local model")
        return cast(Score, score)

    def choose(
        self, prompts: Sequence[CheckedPrompt], choices: Sequence[Sequence[str]], end: bool = False
    ) -> list[list[float]]:
        """Return the total log-probability of every choice after its prompt, one request for each."""
        if end:
            raise UserError(
                f"{self.reference.text} cannot score the end of an answer; leave out `end`, or use a local model"
            )
        return [
            [self.score(prompt, choice).logprob for choice in row]
            for prompt, row in zip(prompts, choices, strict=True)
        ]

    def best_choice(
        self,
        prompts: Sequence[CheckedPrompt],
        choices: Sequence[Sequence[str]],
        offsets: Sequence[float] | None = None,
        end: bool = False,
    ) -> list[int]:
        """Return the index of the choice with the largest log-probability plus offset, of all that `choose` scores."""
        return [
            max(range(len(row)), key=lambda index: row[index] + (offsets[index] if offsets else 0.0))
            for row in self.choose(prompts, choices, end)
        ]

    def read(self, prompt: CheckedPrompt, top: int) -> list[Step]:
        """Return no steps: servers report the probabilities of the tokens that they wrote only."""
        return []

    def embed(self, texts: Sequence[str]) -> NoReturn:
        """Raise UserError: a hosted chat model gives no embeddings."""
        raise UserError(f"{self.reference.text} gives no embeddings; use a local model")

    def count_tokens(self, prompt: CheckedPrompt) -> NoReturn:
        """Raise UserError: servers report token counts with the answer only."""
        raise UserError(
            f"{self.reference.text} does not count tokens before a call; see the `usage` of its answer"
        )

    def draft_engine(self) -> NoReturn:
        """Raise UserError: drafts need the engine in this process."""
        raise UserError(
            f"{self.reference.text} is a hosted model and cannot be a draft model; use a local model"
        )

    # Requests

    def _body(self, prompt: CheckedPrompt, settings: CallSettings) -> dict[str, Any]:
        """The fields of a chat completion."""
        kind, name = self.reference.kind, self.reference.text
        refused = [field for field in settings.sent if field in _REFUSED[kind]]
        if refused:
            raise UserError(
                f"{name} does not support {', '.join(refused)}; leave it out or use another model"
            )
        if kind == "anthropic" and settings.sent.get("temperature", 0) > 1:
            raise UserError(f"`temperature` is {settings.sent['temperature']}; {name} takes 0 to 1")
        extra = self._ending(settings.ending)
        messages: list[Message] = conversation(prompt) if isinstance(prompt, str) else for_protocol(prompt)
        body: dict[str, Any] = {"model": self._client.model, "messages": messages}
        if settings.output is not None:
            body["response_format"] = self._response_format(settings.output)
        for field, value in settings.sent.items():
            if field == "max_tokens":
                body[self.max_tokens_field] = value
            elif field == "logprobs":
                body |= {"logprobs": True} | ({"top_logprobs": value} if value else {})
            elif field == "stop":
                body |= {"stop": list(value)} if value else {}
            elif field in _EXTRA:
                extra[field] = value
            else:
                body[field] = value
        return body | ({"extra_body": extra} if extra else {})

    def _ending(self, ending: PromptEnding) -> dict[str, Any]:
        """The fields for a conversation that does not end with a new message, which vLLM and others know."""
        if ending == NEW_MESSAGE:
            return {}
        if self.reference.kind != "http":
            raise UserError(
                f"{self.reference.text} has neither `continue_final_message` nor `add_generation_prompt`; leave "
                "them out, or use another model"
            )
        return {
            "continue_final_message": ending.continue_final_message,
            "add_generation_prompt": ending.begins_message,
        }

    def _response_format(self, output: Output) -> dict[str, Any]:
        name = self.reference.text
        if "response_format" in self.ignored_fields:
            raise UserError(
                f"{name} cannot enforce a form: its OpenAI-compatible endpoint ignores schemas; "
                f"leave out `{output.option}`, or use another model"
            )
        if output.schema is None:
            raise UserError(
                f"{name} is a hosted model and supports only `schema`, not `{output.option}`; use a local model"
            )
        return output.response_format()

    def _open_stream(self, body: dict[str, Any]) -> Any:
        def create(**fields: Any) -> Any:
            return self._client.checked_stream(self._client.openai.chat.completions.create(**fields))

        if self._usage_in_streams:
            try:
                return self._client.call(
                    lambda: create(stream=True, stream_options={"include_usage": True}, **body)
                )
            except RequestRefused:
                # Some servers do not know stream_options. If that was the reason, the second try
                # succeeds; otherwise it fails for the true reason.
                chunks = self._client.call(lambda: create(stream=True, **body))
                self._usage_in_streams = False
                return chunks
        return self._client.call(lambda: create(stream=True, **body))

    def _completion(self, answer: Any, settings: CallSettings, seconds: float) -> Completion:
        name = self.reference.text
        choices = self._client.call(partial(choices_of, answer))
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise self._client.no_answer(answer)
        text = text_of(message, name)
        logprobs = self._client.call(lambda: logprobs_of(choices[0]))
        checked = self._checked_logprobs(logprobs, settings, bool(text))
        finish = finish_reason_of(getattr(choices[0], "finish_reason", None) or "stop", name)
        return Completion(text, [], checked, usage_of(getattr(answer, "usage", None)), finish, seconds)

    def _checked_logprobs(
        self, logprobs: list[TokenLogprob], settings: CallSettings, expected: bool
    ) -> list[TokenLogprob] | None:
        if settings.sent.get("logprobs") is None:
            return None
        if expected and not logprobs:
            raise UserError(f"{self.reference.text} returned no log-probabilities; leave out `logprobs`")
        return logprobs
