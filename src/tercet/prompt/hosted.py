"""A model behind OpenAI's chat protocol: api.openai.com, Anthropic's endpoint, or any server.

Protocol: https://platform.openai.com/docs/api-reference/chat. Connections, retries with backoff
(honouring Retry-After) and server-sent events are the ``openai`` client's work; here are what is
sent, what came back and what went wrong, each mistake in one line.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from tercet.data.conversation import Message
from tercet.engine.request import Completion, FinishReason, Score, TokenLogprob, Usage
from tercet.errors import ContextOverflow, UserError, nearest
from tercet.model.reference import Reference
from tercet.prompt.output import Output

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONCURRENCY = 8  # requests of one batch in flight; most servers' own default is of this order

# Settings under another name in the protocol, and those that only some servers know.
_EXTRA = ("top_k", "min_p", "repetition_penalty", "ignore_eos")
REFUSED = {
    "http": (),
    "openai": _EXTRA,
    # Its documentation lists these as ignored: https://docs.anthropic.com/en/api/openai-sdk
    "anthropic": (*_EXTRA, "seed", "presence_penalty", "frequency_penalty", "logprobs", "logit_bias"),
}
_KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    # Not OPENAI_API_KEY: whoever runs a server at some address should not be handed OpenAI's key.
    "http": ("TERCET_API_KEY",),
}


class HostedError(UserError):
    """A request failed. ``fatal``: every other request to this server would fail the same way."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class BatchError(UserError):
    """Some requests of a batch failed; the answers of the others are here.

    Attributes:
        completions: in the order of the requests; None where no answer came. An answer that is not
            what its schema asked for is here, with ``parsed`` None, and counts as a failure.
        failures: message by the index of the request.
    """

    def __init__(self, completions: list[Completion | None], failures: dict[int, str]) -> None:
        first = min(failures)
        super().__init__(
            f"{len(failures)} of {len(completions)} requests failed; "
            f"the first, number {first + 1}: {failures[first]}"
        )
        self.completions, self.failures = completions, failures


class OpenAIModel:
    """Chat completions from one model on one server.

    Args:
        reference: of kind openai, anthropic or http.
        timeout: seconds to wait for the server, each try.
        retries: how often a request is tried again after 408, 409, 429, 5xx or a lost connection.

    Raises:
        UserError: no key where one is needed; a server of several models and no name after #.
    """

    def __init__(self, reference: Reference, timeout: float = 60, retries: int = 2) -> None:
        if timeout <= 0 or retries < 0:
            raise UserError(f"timeout {timeout} and retries {retries}: seconds above 0 and a count from 0")
        from openai import OpenAI

        self.reference, self.timeout, self.retries = reference, timeout, retries
        keys = [os.environ.get(name, "").strip() for name in _KEYS[reference.kind]]
        self._key = next((key for key in keys if key), "")
        if not self._key.isascii():
            raise UserError(f"the key in {' or '.join(_KEYS[reference.kind])} holds a character no key has")
        if not self._key and reference.kind != "http":
            raise UserError(
                f"{reference.text} needs a key: set {_KEYS[reference.kind][0]} in the environment"
            )
        self._client = OpenAI(
            # The client insists on a key; a server without authentication ignores this one.
            api_key=self._key or "none",
            base_url=reference.base_url,
            timeout=timeout,
            max_retries=retries,
        )
        if reference.kind != "openai":  # the client would send OpenAI's identities to other companies
            self._client.organization = self._client.project = None
        self.model = reference.name or self._only_model()
        self._usage_in_streams = True

    def async_client(self) -> AsyncOpenAI:
        """The same server and key, for coroutines of one event loop."""
        from openai import AsyncOpenAI

        client = AsyncOpenAI(
            api_key=self._client.api_key,
            base_url=self.reference.base_url,
            timeout=self.timeout,
            max_retries=self.retries,
        )
        client.organization, client.project = self._client.organization, self._client.project
        return client

    # What is asked

    def chat(
        self, messages: Sequence[Message], settings: dict[str, Any], output: Output | None = None
    ) -> Completion:
        """One answer. ``settings``: the fields of Sampling that the user set, and only those."""
        started = time.monotonic()
        body = self._body(messages, settings, output)
        answer = self._call(lambda: self._client.chat.completions.create(**body))
        return self._completion(answer, settings, time.monotonic() - started)

    def stream(
        self, messages: Sequence[Message], settings: dict[str, Any], output: Output | None = None
    ) -> Iterator[str | Completion]:
        """Pieces of the text as they come, then the Completion."""
        started = time.monotonic()
        body = self._body(messages, settings, output)
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        reason: str | None = None
        usage = Usage(0, 0)
        chunks = self._open_stream(body)
        try:
            while (chunk := self._call(lambda: next(chunks, None))) is not None:
                if (reported := getattr(chunk, "usage", None)) is not None:
                    usage = _usage(reported)
                for choice in self._call(partial(_choices, chunk)):
                    text = self._text(getattr(choice, "delta", None))
                    reason = getattr(choice, "finish_reason", None) or reason
                    logprobs += self._call(partial(_logprobs, choice))
                    if text:
                        texts.append(text)
                        yield text
        finally:
            chunks.close()
        if reason is None:
            raise HostedError(f"{self._called}: the connection ended in the middle of the answer")
        found = self._checked_logprobs(logprobs, settings, bool(texts))
        yield Completion("".join(texts), [], found, usage, self._finish(reason), time.monotonic() - started)

    def batch(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: dict[str, Any],
        output: Output | None = None,
    ) -> list[Completion]:
        """The answers in order, at most CONCURRENCY requests at a time.

        Raises:
            BatchError: after all were tried (or one proved that none can succeed); it holds the
                answers that came.
        """
        completions: list[Completion | None] = [None] * len(conversations)
        failures: dict[int, str] = {}
        hopeless = threading.Event()

        def one(index: int) -> None:
            if hopeless.is_set():
                failures[index] = "not sent, since the server refuses all requests"
                return
            try:
                completions[index] = self.chat(conversations[index], settings, output)
            except UserError as problem:
                failures[index] = str(problem)
                if isinstance(problem, HostedError) and problem.fatal:
                    hopeless.set()

        pool = ThreadPoolExecutor(max_workers=max(1, min(CONCURRENCY, len(conversations))))
        try:
            for done in [pool.submit(one, index) for index in range(len(conversations))]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise BatchError(completions, failures)
        return [completion for completion in completions if completion is not None]

    def score(self, prompt: str, continuation: str) -> Score:
        """The log-probability of ``continuation`` after ``prompt``, by /completions with echo.

        vLLM and others answer that; OpenAI and Anthropic do not. A server that ignores ``echo`` is
        found out by its text.
        """
        if self.reference.kind != "http":
            raise UserError(
                f"{self._called} gives no log-probabilities of a given text, so it cannot score; "
                "use a local model or a server with echo"
            )
        if not continuation:
            raise UserError("the continuation to score is empty")
        whole = prompt + continuation
        answer = self._call(
            lambda: self._client.completions.create(
                model=self.model, prompt=whole, echo=True, logprobs=1, max_tokens=1, temperature=0
            )
        )
        score = self._call(lambda: _echoed(answer, prompt, whole))
        if score is None:
            raise UserError(
                f"{self._called} does not echo log-probabilities, so it cannot score; use a local model"
            )
        return cast(Score, score)

    # How it is sent

    @property
    def _called(self) -> str:
        return self.reference.text

    def _body(
        self, messages: Sequence[Message], settings: dict[str, Any], output: Output | None
    ) -> dict[str, Any]:
        kind = self.reference.kind
        refused = [name for name in settings if name in REFUSED[kind]]
        if refused:
            raise UserError(
                f"{self._called} has no {', '.join(refused)}; leave it out, or use a model that has it"
            )
        if kind == "anthropic" and settings.get("temperature", 0) > 1:
            raise UserError(f"temperature is {settings['temperature']}; {self._called} takes 0 to 1")
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if output is not None:
            body["response_format"] = self._response_format(output)
        extra: dict[str, Any] = {}
        for name, value in settings.items():
            if name == "max_tokens":
                body["max_completion_tokens" if kind == "openai" else "max_tokens"] = value
            elif name == "logprobs":
                if value is not None:
                    body |= {"logprobs": True} | ({"top_logprobs": value} if value else {})
            elif name == "stop":
                body |= {"stop": list(value)} if value else {}
            elif name in _EXTRA:
                extra[name] = value
            elif value is not None:  # seed=None: no seed
                body[name] = value
        return body | ({"extra_body": extra} if extra else {})

    def _response_format(self, output: Output) -> dict[str, Any]:
        if self.reference.kind == "anthropic":  # documented as ignored, as those of REFUSED
            raise UserError(
                f"{self._called} can't be held to a form: its OpenAI protocol ignores schemas; "
                f"leave out {output.option}, or use another model"
            )
        if output.schema is None:
            raise UserError(
                f"{self._called} takes a schema and no {output.option}, as all hosted models; "
                "use a local model, or a schema"
            )
        return output.response_format()

    def _open_stream(self, body: dict[str, Any]) -> Any:
        create = self._client.chat.completions.create
        if self._usage_in_streams:
            try:
                return self._call(lambda: create(stream=True, stream_options={"include_usage": True}, **body))
            except _Refused as refusal:
                # Some servers do not know stream_options. If that was the reason the second try
                # works; if not, it fails for the true one.
                chunks = self._call(lambda: create(stream=True, **body))
                self._usage_in_streams = False
                del refusal
                return chunks
        return self._call(lambda: create(stream=True, **body))

    def _only_model(self) -> str:
        names = self._served()
        if len(names) == 1:
            return names[0]
        base = self.reference.text.rstrip("#")
        if not names:
            raise UserError(f"{base} lists no models; name one: {base}#NAME")
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{base} serves {len(names)} models; choose one with {base}#NAME: {shown}")

    def _served(self) -> list[str]:
        page = self._call(lambda: self._client.models.list())
        data = getattr(page, "data", None)
        return [entry.id for entry in data if isinstance(getattr(entry, "id", None), str)] if data else []

    # What came back

    def _completion(self, answer: Any, settings: dict[str, Any], seconds: float) -> Completion:
        choices = self._call(partial(_choices, answer))
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise HostedError(
                f"{self._called}: the answer holds no message; is {self.reference.base_url} right?"
            )
        text = self._text(message)
        logprobs = self._call(lambda: _logprobs(choices[0]))
        found = self._checked_logprobs(logprobs, settings, bool(text))
        finish = self._finish(getattr(choices[0], "finish_reason", None) or "stop")
        return Completion(text, [], found, _usage(getattr(answer, "usage", None)), finish, seconds)

    def _text(self, message: Any) -> str:
        text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
        if not isinstance(text, str):
            raise HostedError(f"{self._called}: the answer's content is a {type(text).__name__}, not text")
        return text

    def _finish(self, reason: str) -> FinishReason:
        if reason == "content_filter":
            raise HostedError(f"{self._called}: the server's content filter stopped the answer")
        return "length" if reason in ("length", "max_tokens", "model_length") else "stop"

    def _checked_logprobs(
        self, found: list[TokenLogprob], settings: dict[str, Any], expected: bool
    ) -> list[TokenLogprob] | None:
        if settings.get("logprobs") is None:
            return None
        if expected and not found:
            raise UserError(f"{self._called} gave no log-probabilities; ask without logprobs")
        return found

    def _call(self, request: Callable[[], Any]) -> Any:
        """``request()``, with every way it can fail turned into one line."""
        import openai

        try:
            return request()
        except openai.APITimeoutError as problem:
            raise HostedError(
                f"{self._called}: no answer from {self._host} within {self.timeout:g} s{self._tries}; "
                "raise the timeout or try again"
            ) from problem
        except openai.APIConnectionError as problem:
            cause = _line(problem.__cause__ or problem)
            raise HostedError(
                f"{self._called}: cannot reach {self._host} ({cause}){self._tries}; is the server running?",
                True,
            ) from problem
        except openai.APIStatusError as problem:
            raise self._status(problem.status_code, problem) from problem
        except openai.APIError as problem:  # an error in the middle of a stream
            raise HostedError(f"{self._called}: {self._said(problem)}") from problem
        except (ValueError, TypeError, AttributeError) as problem:
            if isinstance(problem, UserError):
                raise
            # Not JSON, or JSON of another shape: the client parses before we can look.
            raise HostedError(
                f"{self._called}: {self._host} did not answer in OpenAI's protocol ({_line(problem)})"
            ) from problem

    def _status(self, status: int, problem: Any) -> UserError:
        said = self._said(problem)
        if status == 401:
            key = " or ".join(_KEYS[self.reference.kind])
            what = f"the key is not accepted; check {key}" if self._key else f"a key is needed; set {key}"
            return HostedError(f"{self._called}: {what} (401: {said})", True)
        if status == 403:
            return HostedError(f"{self._called}: not permitted (403: {said})", True)
        if status == 404:
            return HostedError(
                f"{self._called}: no such model at {self._host}{self._nearest()} (404: {said})", True
            )
        if status == 429:
            return HostedError(f"{self._called}: rate limit or quota reached{self._tries} (429: {said})")
        if status in (400, 422):
            if problem.code == "context_length_exceeded":
                return ContextOverflow(f"{self._called}: {said}")
            return _Refused(f"{self._called}: the request was refused ({status}: {said})")
        return HostedError(f"{self._called}: the server failed{self._tries} ({status}: {said})")

    @property
    def _host(self) -> str:
        return self.reference.base_url

    @property
    def _tries(self) -> str:
        return f", tried {self.retries + 1} times" if self.retries else ""

    def _nearest(self) -> str:
        if not hasattr(self, "model"):  # it was the list of models that gave 404
            return ""
        try:
            names = self._served()
        except UserError:
            return ""
        near = nearest(self.model, names, limit=3) or names[:3]
        return f"; nearest: {', '.join(near)}" if near else ""

    def _said(self, problem: Any) -> str:
        body = problem.body
        text = body.get("message") if isinstance(body, dict) else None
        line = _line(text or problem.message)
        return line.replace(self._key, "(key)") if self._key else line


class _Refused(HostedError):
    """400 or 422: this request, not the server, is the problem."""


def _choices(chunk: Any) -> list[Any]:
    return list(getattr(chunk, "choices", None) or [])


def _usage(reported: Any) -> Usage:
    """Usage as the server counted; zeros when it did not (a prompt is never 0 tokens)."""
    prompt, completion = (
        getattr(reported, "prompt_tokens", None),
        getattr(reported, "completion_tokens", None),
    )
    return Usage(prompt if isinstance(prompt, int) else 0, completion if isinstance(completion, int) else 0)


def _logprobs(choice: Any) -> list[TokenLogprob]:
    """The choice's log-probabilities; the protocol has no token ids, so they are -1."""
    entries = getattr(getattr(choice, "logprobs", None), "content", None) or []
    return [
        TokenLogprob(
            token_id=-1,
            token=entry.token,
            logprob=entry.logprob,
            bytes=bytes(getattr(entry, "bytes", None) or entry.token.encode("utf-8", "replace")),
            top=[(-1, other.token, other.logprob) for other in getattr(entry, "top_logprobs", None) or []],
        )
        for entry in entries
    ]


def _echoed(answer: Any, prompt: str, whole: str) -> Score | None:
    """The score of ``whole`` after ``prompt`` from an echo; None when the server did not echo."""
    choice = answer.choices[0]
    found = choice.logprobs
    if not choice.text.startswith(whole) or not found or not found.token_logprobs or not found.text_offset:
        return None
    starts, values, best = found.text_offset, found.token_logprobs, found.top_logprobs
    ends = [*starts[1:], len(choice.text)]
    # A token that crosses the boundary belongs to the continuation, as in the local engine.
    # The first tokens of a character begin where it does, and end there too.
    inside = [
        i
        for i, start in enumerate(starts)
        if start < len(whole) and (ends[i] > len(prompt) or (start >= len(prompt) and values[i] is not None))
    ]
    if any(values[i] is None for i in inside):
        raise UserError("the first token of a text has no probability; score needs a prompt before it")
    greedy = bool(best) and all(best[i] and values[i] >= max(best[i].values()) for i in inside)
    picked = [float(values[i]) for i in inside]
    return Score(logprob=sum(picked), token_logprobs=picked, tokens=[], is_greedy=greedy)


def _line(problem: object) -> str:
    """One line of at most 300 characters."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
