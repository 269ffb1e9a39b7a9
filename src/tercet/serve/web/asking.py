"""The plan of an answer on the page: checked, rendered and counted before anything is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tercet.data.prompt_tokens import check_context
from tercet.engine.request import Sampling
from tercet.engine.sampling_defaults import with_defaults
from tercet.engine.text import TokenBytes
from tercet.errors import UserError
from tercet.serve.web.records import Details, Json, Message

if TYPE_CHECKING:
    from tercet.serve.models import Served

TOP = 10  # alternatives to store for every token
# The fields of Sampling that the page sets. A chat model ends its answer itself; a text has no end of its own.
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop",
)  # fmt: skip
MAX_TOKENS = {"chat": 1024, "text": 200}


@dataclass
class Plan:
    """The plan of one answer.

    Attributes:
        kind: "chat" or "text".
        settings: stored with the answer, and part of its address.
        fields: the sampling settings among them; a hosted model is sent these and no others.
        messages: the conversation that the model reads.
        tokens: the same as token ids; empty for a hosted model.
        prefix: tokens that the answer begins with, as they are stored.
        stop_ids: tokens that end an answer; empty for a hosted model.
        ended: whether the prefix is the whole answer.
        comparison: id, side and ``hidden`` of the comparison that the answer belongs to.
    """

    served: Served
    kind: str
    conversation: str
    parent: str
    settings: Json
    fields: Json
    sampling: Sampling
    messages: list[Json]
    tokens: list[int] = field(default_factory=list)
    prefix: list[Json] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    ended: bool = False
    comparison: Json | None = None


def check_settings(settings: Mapping[str, Any]) -> Json:
    """Return the settings of a conversation that have a value: model, against, blind, system and FIELDS.

    Raises:
        UserError: an unknown setting, or a value out of its range.
    """
    checked: Json = {}
    for name, value in settings.items():
        if name not in (*FIELDS, "model", "against", "blind", "system"):
            raise UserError(f"there is no setting {name!r}; settings are system, {', '.join(FIELDS)}")
        if value is None or value == "" or value == [] or value is False:
            continue
        if name in ("model", "against", "system") and not isinstance(value, str):
            raise UserError(f"{name} is {value!r}; it must be a text")
        if name == "blind" and value is not True:
            raise UserError(f"blind is {value!r}; it must be true or false")
        if name == "stop" and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise UserError(f"stop is {value!r}; it must be a list of texts")
        checked[name] = value
    Sampling(**_fields(checked))
    return checked


def _fields(settings: Mapping[str, Any]) -> Json:
    return {name: settings[name] for name in FIELDS if name in settings}


def _within(sampling: Sampling, served: Served, prompt: Sequence[object]) -> Sampling:
    """Return the settings with log-probabilities, and at most the tokens that the context leaves."""
    room = max(1, (served.context_length or 0) - len(prompt) + 1)
    return dataclasses.replace(sampling, logprobs=TOP, max_tokens=min(sampling.max_tokens, room))


def make_plan(
    served: Served,
    kind: str,
    conversation: str,
    parent: str,
    history: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
) -> Plan:
    """Return a plan for the answer to ``history`` (role and content of each message).

    Raises:
        APIError: the conversation is too long for the model; the message has both counts.
        UserError: the model has no chat template, or does not support a setting.
    """
    fields = _fields(settings)
    fields.setdefault("max_tokens", MAX_TOKENS[kind])
    stored = dict(fields)
    if settings.get("system") and kind == "chat":
        stored["system"] = settings["system"]
    opening = [{"role": "system", "content": stored["system"]}] if "system" in stored else []
    messages = [*opening, *({"role": role, "content": content} for role, content in history)]
    sampling = Sampling(**with_defaults(fields, served.sampling_defaults))
    if served.local is None:
        if kind == "text":
            raise UserError(
                f"{served.name} is hosted and takes conversations only; choose a local model to continue a text"
            )
        return Plan(served, kind, conversation, parent, stored, fields, sampling, messages)
    if kind == "text":
        tokens = served.tokenizer.encode("".join(content for _, content in history))
        if not tokens:
            raise UserError(
                "the text is empty, and this model has no token that begins a text; write something"
            )
        check_context(tokens, served.context_length, "text", served.name)
    else:
        if not served.has_chat_template:
            raise UserError(
                f"{served.name} is a base model without a chat template, so it continues text only; "
                "start a new text with it, or choose another model"
            )
        tokens = served.prompt_tokens(messages)
    sampling = _within(sampling, served, tokens)
    return Plan(
        served, kind, conversation, parent, stored, fields, sampling, messages, list(tokens),
        stop_ids=frozenset(served.local.engine.stop_ids_of(served.adapter)),
    )  # fmt: skip


def continuation_plan(
    served: Served,
    kind: str,
    conversation: str,
    message: Message,
    details: Details,
    position: int,
    token: int | None,
) -> Plan:
    """Return a plan for another answer that begins with the first ``position`` tokens of ``message``.

    ``token`` is the alternative at that position that follows them; None: the model chooses.

    Raises:
        UserError: there is no such position, or the token is not among its alternatives.
    """
    if served.local is None or message.parent is None or not details.prompt:
        raise UserError("only an answer of a local model can be continued from one of its tokens")
    if not 0 <= position <= len(details.tokens) or (token is not None and position == len(details.tokens)):
        raise UserError(f"there is no token {position}; the answer has {len(details.tokens)}")
    stop_ids = frozenset(served.local.engine.stop_ids_of(served.adapter))
    prefix = list(details.tokens[:position])
    if token is None:
        while prefix and prefix[-1]["id"] in stop_ids:
            prefix.pop()
    else:
        prefix.append(_picked(served, details.tokens[position], prefix, token, stop_ids))
    fields = _fields(message.settings)
    room = served.context_length or 0
    ended = bool(prefix) and prefix[-1]["id"] in stop_ids
    if not ended and len(details.prompt) + len(prefix) > room:
        raise UserError(f"prompt and answer fill the context of {served.name}, which has {room} tokens")
    sampling = Sampling(**with_defaults(fields, served.sampling_defaults))
    sampling = _within(sampling, served, [*details.prompt, *prefix])
    return Plan(
        served, kind, conversation, message.parent, dict(message.settings), fields, sampling, [],
        list(details.prompt), prefix, stop_ids, ended,
    )  # fmt: skip


def _picked(
    served: Served, replaced: Json, prefix: Sequence[Json], token: int, stop_ids: frozenset[int]
) -> Json:
    """Return the record of the alternative to ``replaced`` that the user chose."""
    logprob = next((value for alternative, _, value in replaced["top"] if alternative == token), None)
    if logprob is None:
        raise UserError(f"token {token} is not among the alternatives at this position")
    bytes_of = TokenBytes(served.tokenizer)
    first = not any(record["bytes"] for record in prefix)
    data = b"" if token in stop_ids else bytes_of(token, first=first)
    return {
        "id": token,
        "text": bytes_of.text(token, first=first),
        "bytes": data.hex(),
        "logprob": logprob,
        "top": replaced["top"],
        "entropy": replaced["entropy"],
        "picked": True,
    }


def prompt_pieces(served: Served | None, prompt: Sequence[int]) -> list[Json]:
    """Return the tokens of a prompt for the page: id, text, bytes, and whether it is a special token."""
    if served is None or served.local is None:
        return [{"id": token, "text": "", "bytes": "", "special": False} for token in prompt]
    bytes_of = TokenBytes(served.tokenizer)
    pieces, first = list[Json](), True
    for token in prompt:
        data = bytes_of(token, first=first)
        first = first and not data
        text = bytes_of.text(token, first=first) if not data else data.decode(errors="replace")
        pieces.append({"id": token, "text": text, "bytes": data.hex(), "special": not data})
    return pieces
