"""The models of a server, by the names that clients call them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tercet.data.conversation import ConversationError
from tercet.data.prompt_tokens import check_context, conversation_tokens
from tercet.engine.request import Sampling, SamplingChoice
from tercet.engine.sampling_defaults import FIELDS, chosen_defaults
from tercet.errors import ContextOverflow, UserError, nearest
from tercet.model.control_text import ControlTokenMode
from tercet.model.reference import Reference
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import APIError, from_user_error, invalid_value, missing_parameter
from tercet.serve.worker import Worker

if TYPE_CHECKING:
    from tercet.model.store import StoredModel
    from tercet.prompt.hosted import HostedModel


@dataclass
class Served:
    """A model under one name: a local model, an adapter of one, or a hosted model.

    name: the name that clients use.
    local: the worker whose engine runs it; None for a hosted model.
    adapter: the engine's name of the adapter (``Request.adapter``); None for the model itself.
    hosted: the model that requests are passed on to; None for a local model.
    sampling: what chooses the next token where a request does not say: the publisher's settings, or others.
    control_tokens: what control tokens that messages spell become.
    reference: where a local model comes from; None: unknown.
    created: when it was loaded, in seconds since 1970.
    """

    name: str
    local: Worker | None = None
    adapter: str | None = None
    hosted: HostedModel | None = None
    sampling: SamplingChoice = "default"
    control_tokens: ControlTokenMode = "text"
    reference: Reference | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def worker(self) -> Worker:
        """The worker of a local model. APIError 400 for a hosted one."""
        if self.local is None:
            raise APIError(
                400,
                f"{self.name} is hosted on another server, which has no such endpoint; use a local model",
                param="model",
                code="unsupported_model",
            )
        return self.local

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model, or the adapter's own. APIError 400 for a hosted model."""
        return self.worker.engine.tokenizer_of(self.adapter)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None for a hosted model."""
        return None if self.local is None else self.local.engine.context_length

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """Values for sampling fields that a request leaves unset; none for a hosted model, which has its own."""
        if self.local is None:
            return {}
        return chosen_defaults(self.sampling, self.local.engine.sampling_defaults_of(self.adapter))

    @property
    def sampling_values(self) -> dict[str, float]:
        """What applies to a request that sets none of these fields: the defaults, then Tercet's own values."""
        sampling = Sampling(**self.sampling_defaults)  # type: ignore[arg-type]
        return {name: getattr(sampling, name) for name in FIELDS}

    @cached_property
    def stored(self) -> StoredModel | None:
        """Its files: their size, family and type; None for a hosted model, or where the files do not say."""
        from tercet.model.store import fetch_model

        if self.reference is None:
            return None
        try:
            return fetch_model(self.reference)
        except UserError:  # the files have gone since they were loaded
            return None

    @property
    def has_chat_template(self) -> bool:
        """Whether it answers conversations."""
        return self.local is None or self.tokenizer.chat_template is not None

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``: it differs where the same seed may give another answer."""
        from tercet import __version__

        template = "" if self.local is None else self.tokenizer.fingerprint
        text = "\0".join([__version__, self.name, self.adapter or "", str(self.created), template])
        return "fp_" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def prompt_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the tokens of a conversation after the chat template, up to where the answer begins.

        The arguments are those of `tercet.data.prompt_tokens.conversation_text`.

        Raises:
            APIError: 400; no template, one that refuses the messages, or a prompt that is too long.
        """
        if not self.has_chat_template:
            raise APIError(
                400,
                f"{self.name} has no chat template (a base model), so it cannot chat; use /v1/completions",
                param="messages",
                code="unsupported_model",
            )
        try:
            tokens = conversation_tokens(
                self.tokenizer, messages, tools, control_tokens=self.control_tokens, **options
            )
        except ConversationError as problem:
            raise invalid_value(problem.place, problem.problem) from problem
        except UserError as problem:
            raise from_user_error(problem, "messages") from problem
        self.check_length(tokens, "messages")
        return tokens

    def check_length(self, tokens: Sequence[int], param: str) -> None:
        """Raise APIError 400 ``context_length_exceeded`` for a prompt that leaves no room for an answer."""
        try:
            check_context(tokens, self.context_length, param, self.name)
        except ContextOverflow as problem:
            raise from_user_error(problem, param) from problem

    def answer_room(self, tokens: Sequence[int]) -> int:
        """Return how many tokens an answer may have. Its last token is never read, so it needs no room."""
        return (self.context_length or 0) - len(tokens) + 1


def check_names(names: Sequence[str]) -> None:
    """Raise UserError unless there is a name, and none twice."""
    if not names:
        raise UserError("there is no model to serve; name one: tercet serve REF")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name}; give one of them another name: NAME=REF")


class Models:
    """The models of one server. Requests choose by these names only, never by a file or an address."""

    def __init__(self, models: Iterable[Served]) -> None:
        listed = list(models)
        check_names([model.name for model in listed])
        self._by_name = {model.name: model for model in listed}

    def get(self, name: str | None) -> Served:
        """Return the model called ``name``; None: the only one.

        Raises:
            APIError: 404 ``model_not_found``, which names the nearest ones; 400 for no name and several models.
        """
        if name is None:
            if len(self) > 1:
                raise missing_parameter("model")
            return self.default
        model = self._by_name.get(name)
        if model is not None:
            return model
        near = nearest(name, self._by_name, limit=3)
        names = near or list(self._by_name)[:5]
        raise APIError(
            404,
            f"The model `{name:.200}` does not exist; {'nearest' if near else 'available'}: {', '.join(names)}",
            param="model",
            code="model_not_found",
        )

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def default(self) -> Served:
        """The first model."""
        return next(iter(self))

    @property
    def workers(self) -> list[Worker]:
        """The workers of the local models, each once, however many adapters it has."""
        return list({id(model.local): model.local for model in self if model.local is not None}.values())

    def close(self) -> None:
        """Stop all engines."""
        for worker in self.workers:
            worker.close()
