"""The connection to a server of OpenAI's protocol: key, client, list of models, and errors in one line.

Connections, retries with backoff (honouring Retry-After) and server-sent events are the ``openai`` client's
work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tercet.errors import ContextOverflow, UserError, nearest
from tercet.model.reference import Reference
from tercet.prompt.errors import HostedError
from tercet.prompt.hosted_answer import reason_in

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    # Not OPENAI_API_KEY: the operator of an arbitrary server should not receive OpenAI's key.
    "http": ("TERCET_API_KEY",),
}


class RequestRefused(HostedError):
    """Status 400 or 422: the cause is this request, not the server."""


class HostedClient:
    """One server, the key for it, and the name of one model on it.

    Args:
        reference: of kind openai, anthropic or http.
        timeout: seconds to wait for the server, each try.
        retries: how often a request is tried again after 408, 409, 429, 5xx or a lost connection.

    Attributes:
        openai: the client that sends the requests; use it inside `call`.
        model: the model's name on the server.

    Raises:
        UserError: no key where one is needed; a server of several models and no name after #.
    """

    def __init__(self, reference: Reference, timeout: float, retries: int) -> None:
        if timeout <= 0 or retries < 0:
            raise UserError(
                f"`timeout` is {timeout} and `retries` is {retries}; they must be above 0 seconds and at least 0"
            )
        from openai import OpenAI

        self.reference, self.timeout, self.retries = reference, timeout, retries
        keys = [os.environ.get(name, "").strip() for name in _KEYS[reference.kind]]
        self._key = next((key for key in keys if key), "")
        if not self._key.isascii():
            raise UserError(
                f"the key in {' or '.join(_KEYS[reference.kind])} contains a character that is not ASCII"
            )
        if not self._key and reference.kind != "http":
            raise UserError(
                f"{reference.text} needs a key: set {_KEYS[reference.kind][0]} in the environment"
            )
        self.openai = OpenAI(
            # The client insists on a key; a server without authentication ignores this one.
            api_key=self._key or "none",
            base_url=reference.base_url,
            timeout=timeout,
            max_retries=retries,
        )
        if reference.kind != "openai":  # the client would send OpenAI's identities to other companies
            self.openai.organization = self.openai.project = None
        self.model = reference.name
        if not self.model:
            self.model = self._only_model()

    def asynchronous(self) -> AsyncOpenAI:
        """Return a client of the same server and key, for coroutines of one event loop."""
        from openai import AsyncOpenAI

        client = AsyncOpenAI(
            api_key=self.openai.api_key,
            base_url=self.reference.base_url,
            timeout=self.timeout,
            max_retries=self.retries,
        )
        client.organization, client.project = self.openai.organization, self.openai.project
        return client

    def call(self, request: Callable[[], Any]) -> Any:
        """Return ``request()``, with every failure turned into an error of one line.

        Raises:
            ContextOverflow: the server reports that the conversation is too long for the model.
            HostedError: any other failure.
        """
        import openai

        name, host = self.reference.text, self.reference.base_url
        try:
            return request()
        except openai.APITimeoutError as problem:
            raise HostedError(
                f"{name}: no answer from {host} within {self.timeout:g} s{self._tries}; "
                "raise `timeout` or try again"
            ) from problem
        except openai.APIConnectionError as problem:
            cause = one_line(problem.__cause__ or problem)
            raise HostedError(
                f"{name}: cannot reach {host} ({cause}){self._tries}; is the server running?", fatal=True
            ) from problem
        except openai.APIStatusError as problem:
            raise self._status_error(problem.status_code, problem) from problem
        except openai.APIError as problem:  # an error in the middle of a stream
            raise HostedError(f"{name}: {self._message(problem)}") from problem
        except (ValueError, TypeError, AttributeError) as problem:
            if isinstance(problem, UserError):
                raise
            # Not JSON, or JSON of another shape: the client parses before we can look.
            raise HostedError(
                f"{name}: {host} did not answer in OpenAI's protocol ({one_line(problem)})"
            ) from problem

    def _status_error(self, status: int, problem: Any) -> UserError:
        name, message = self.reference.text, self._message(problem)
        if status == 401:
            key = " or ".join(_KEYS[self.reference.kind])
            hint = f"the server rejects the key; check {key}" if self._key else f"a key is needed; set {key}"
            return HostedError(f"{name}: {hint} (401: {message})", fatal=True)
        if status == 403:
            return HostedError(f"{name}: not permitted (403: {message})", fatal=True)
        if status == 404:
            return HostedError(
                f"{name}: no such model at {self.reference.base_url}{self._nearest_models()} (404: {message})",
                fatal=True,
            )
        if status == 429:
            return HostedError(f"{name}: rate limit or quota reached{self._tries} (429: {message})")
        if status in (400, 422):
            if problem.code == "context_length_exceeded":
                return ContextOverflow(f"{name}: {message}")
            return RequestRefused(f"{name}: the request was refused ({status}: {message})")
        return HostedError(f"{name}: the server failed{self._tries} ({status}: {message})")

    def no_answer(self, answer: Any) -> HostedError:
        """Return the error for an answer with status 200 that holds none: the server's own reason, if it gives one."""
        body = {**(getattr(answer, "model_extra", None) or {})}
        reason = reason_in(body)
        if reason is not None:
            return HostedError(f"{self.reference.text}: the server failed ({self._without_key(reason)})")
        return HostedError(
            f"{self.reference.text}: the answer contains no message; check the address {self.reference.base_url}"
        )

    def checked_stream(self, stream: Any) -> Any:
        """Return a stream. HostedError where its body is one of JSON that reports an error."""
        if "json" in stream.response.headers.get("content-type", ""):
            reason = reason_in(json.loads(stream.response.read()))
            if reason is not None:
                stream.close()
                raise HostedError(f"{self.reference.text}: the server failed ({self._without_key(reason)})")
        return stream

    @property
    def _tries(self) -> str:
        return f", tried {self.retries + 1} times" if self.retries else ""

    def _message(self, problem: Any) -> str:
        """The server's message, without the key, which some servers repeat."""
        body = problem.body
        text = body.get("message") if isinstance(body, dict) else None
        return self._without_key(text or problem.message)

    def _without_key(self, text: str) -> str:
        line = one_line(text)
        return line.replace(self._key, "(key)") if self._key else line

    # The server's models

    def _model_names(self) -> list[str]:
        page = self.openai.models.list()
        data = getattr(page, "data", None)
        return [entry.id for entry in data if isinstance(getattr(entry, "id", None), str)] if data else []

    def _only_model(self) -> str:
        names: list[str] = self.call(self._model_names)
        if len(names) == 1:
            return names[0]
        base = self.reference.text.rstrip("#")
        if not names:
            raise UserError(f"{base} lists no models; name one: {base}#NAME")
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{base} serves {len(names)} models; choose one with {base}#NAME: {shown}")

    def _nearest_models(self) -> str:
        """The names nearest to the model's, for an error; "" where the server does not list its models."""
        import openai

        if not self.model:  # the list of models itself gave 404
            return ""
        try:
            names = self._model_names()  # not through `call`: a 404 here would ask for the list once more
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return ""
        near = nearest(self.model, names, limit=3) or names[:3]
        return f"; nearest: {', '.join(near)}" if near else ""


def one_line(problem: object) -> str:
    """Return one line of at most 300 characters."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
