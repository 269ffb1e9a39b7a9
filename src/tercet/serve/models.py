"""The models of a server, by the names that clients call them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tercet.data.prompt_tokens import check_context, conversation_tokens
from tercet.errors import ContextOverflow, UserError, nearest
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import APIError, from_user_error
from tercet.serve.worker import Worker

if TYPE_CHECKING:
    from tercet.prompt.hosted import HostedModel


@dataclass
class Served:
    """One name: a model that runs here, one of its adapters, or one behind another server.

    local: whose engine runs it; ``adapter``: the name that the engine knows it by (``Request.adapter``).
    hosted: the model that requests are passed on to.
    """

    name: str
    local: Worker | None = None
    adapter: str | None = None
    hosted: HostedModel | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def worker(self) -> Worker:
        """``local``. APIError 400 where requests are passed on."""
        if self.local is None:
            raise APIError(
                400,
                f"{self.name} runs on another server, which this endpoint can't ask; use a model that runs here",
                param="model",
                code="unsupported_model",
            )
        return self.local

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, or its adapter's own. APIError 400 for a hosted model."""
        return self.worker.engine.tokenizer_of(self.adapter)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None for a hosted model."""
        return None if self.local is None else self.local.engine.context_length

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be answered."""
        return self.local is None or self.tokenizer.chat_template is not None

    @cached_property
    def fingerprint(self) -> str:
        """What OpenAI calls ``system_fingerprint``: another one where the same seed may answer otherwise."""
        from tercet import __version__

        template = "" if self.local is None else self.tokenizer.fingerprint
        text = "\0".join([__version__, self.name, self.adapter or "", str(self.created), template])
        return "fp_" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def prompt_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The conversation after the chat template, up to where the answer begins.

        messages: their contents are strings (or what the template itself understands). A developer
            message is a system message where the template does not know that role.

        Raises:
            APIError: 400; no template, one that refuses the messages, or a prompt that is too long.
        """
        if not self.has_chat_template:
            raise APIError(
                400,
                f"{self.name} has no chat template (a base model), so it can't chat; use /v1/completions",
                param="messages",
                code="unsupported_model",
            )
        try:
            tokens = conversation_tokens(self.tokenizer, messages, tools, **template_variables)
        except UserError as problem:
            raise from_user_error(problem, "messages") from problem
        self.check_length(tokens, "messages")
        return tokens

    def check_length(self, tokens: Sequence[int], param: str) -> None:
        """APIError 400 ``context_length_exceeded`` for a prompt that leaves no room for an answer."""
        try:
            check_context(tokens, self.context_length, param, self.name)
        except ContextOverflow as problem:
            raise from_user_error(problem, param) from problem

    def answer_room(self, tokens: Sequence[int]) -> int:
        """Tokens that an answer to this prompt may have: the last of them is never read, so needs no room."""
        return (self.context_length or 0) - len(tokens) + 1


class Models:
    """All of them. Names come from the command line only: a request can't name a file or a server."""

    def __init__(self, served: Iterable[Served]) -> None:
        self._by_name: dict[str, Served] = {}
        for one in served:
            if one.name in self._by_name:
                raise UserError(f"two models are called {one.name}; name one of them otherwise: NAME=REF")
            self._by_name[one.name] = one
        if not self._by_name:
            raise UserError("there is no model to serve; name one: tercet serve REF")

    def get(self, name: str) -> Served:
        """APIError 404 ``model_not_found``, with the nearest names."""
        found = self._by_name.get(name)
        if found is not None:
            return found
        near = nearest(name, self._by_name, limit=3)
        there = near or list(self._by_name)[:5]
        raise APIError(
            404,
            f"The model `{name:.200}` does not exist here; {'nearest' if near else 'there is'}: {', '.join(there)}",
            param="model",
            code="model_not_found",
        )

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def default(self) -> Served:
        """The first."""
        return next(iter(self))

    @property
    def workers(self) -> list[Worker]:
        """Each engine once, however many adapters it has."""
        return list({id(one.local): one.local for one in self if one.local is not None}.values())

    def close(self) -> None:
        """End all engines."""
        for worker in self.workers:
            worker.close()
