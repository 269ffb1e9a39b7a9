"""What is asked of a model for an answer on the page: checked, rendered and counted before anything is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tercet.engine.request import Sampling
from tercet.engine.text import TokenBytes
from tercet.errors import UserError
from tercet.serve.web.records import Details, Json, Message

if TYPE_CHECKING:
    from tercet.serve.models import Served

TOP = 10  # alternatives that are kept for every token
# Of Sampling, what the page sets. An answer of a chat ends by itself; a text goes on until it is told to stop.
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop",
)  # fmt: skip
MAX_TOKENS = {"chat": 1024, "text": 200}


@dataclass
class Plan:
    """One answer to be written.

    kind: "chat" or "text".
    settings: as they are stored with the answer, and are part of its address.
    fields: those of the settings that are sampling fields; all that a hosted model is sent.
    messages, tokens: what the model reads; the tokens of a model here.
    prefix: tokens that the answer begins with, as they are stored.
    stop_ids: tokens that end an answer of a model here.
    ended: the prefix is the whole answer.
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
    """Settings of a conversation with only what is set: model, against, blind, system and FIELDS.

    Raises:
        UserError: an unknown setting, or a value outside of its range.
    """
    found: Json = {}
    for name, value in settings.items():
        if name not in (*FIELDS, "model", "against", "blind", "system"):
            raise UserError(f"there is no setting {name!r}; settings are system, {', '.join(FIELDS)}")
        if value is None or value == "" or value == [] or value is False:
            continue
        if name in ("model", "against", "system") and not isinstance(value, str):
            raise UserError(f"{name} is {value!r}; it must be a text")
        if name == "blind" and value is not True:
            raise UserError(f"blind is {value!r}; it must be true or false")
        if name == "stop" and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise UserError(f"stop is {value!r}; it must be a list of texts")
        found[name] = value
    Sampling(**_fields(found))
    return found


def _fields(settings: Mapping[str, Any]) -> Json:
    return {name: settings[name] for name in FIELDS if name in settings}


def _within(sampling: Sampling, served: Served, read: Sequence[object]) -> Sampling:
    """With the probabilities that are kept, and no more tokens than the context leaves after ``read``."""
    room = max(1, (served.context_length or 0) - len(read) + 1)
    return dataclasses.replace(sampling, logprobs=TOP, max_tokens=min(sampling.max_tokens, room))


def make_plan(
    served: Served,
    kind: str,
    conversation: str,
    parent: str,
    history: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
) -> Plan:
    """A plan for the answer to ``history`` (role and content of each message).

    Raises:
        APIError, UserError: the conversation is too long (with the counts), the model has no chat
            template, or a setting is nothing for it.
    """
    fields = _fields(settings)
    fields.setdefault("max_tokens", MAX_TOKENS[kind])
    stored = dict(fields)
    if settings.get("system") and kind == "chat":
        stored["system"] = settings["system"]
    opening = [{"role": "system", "content": stored["system"]}] if "system" in stored else []
    messages = [*opening, *({"role": role, "content": content} for role, content in history)]
    sampling = Sampling(**fields)
    if served.local is None:
        if kind == "text":
            raise UserError(f"{served.name} only chats; choose a model that runs here to continue a text")
        return Plan(served, kind, conversation, parent, stored, fields, sampling, messages)
    if kind == "text":
        tokens = served.tokenizer.encode("".join(content for _, content in history))
        if not tokens:
            raise UserError("write something first: this model has no token that begins a text")
        room = served.context_length or 0
        if len(tokens) > room:
            raise UserError(f"the text has {len(tokens)} tokens, and {served.name} takes {room}")
    else:
        if not served.has_chat_template:
            raise UserError(
                f"{served.name} is a base model: it has no chat template and continues text; "
                "begin a new text with it, or choose another model"
            )
        tokens = served.prompt_tokens(messages)
    sampling = _within(sampling, served, tokens)
    return Plan(
        served, kind, conversation, parent, stored, fields, sampling, messages, list(tokens),
        stop_ids=frozenset(served.local.engine.stop_ids_of(served.adapter)),
    )  # fmt: skip


def go_on_plan(
    served: Served,
    kind: str,
    conversation: str,
    message: Message,
    details: Details,
    position: int,
    token: int | None,
) -> Plan:
    """A plan for another answer that begins with the first ``position`` tokens of ``message``.

    token: one of the alternatives at that position, which comes next; None: the model chooses.

    Raises:
        UserError: no such position, or the token is not among its alternatives.
    """
    if served.local is None or message.parent is None or not details.prompt:
        raise UserError("only an answer of a model that runs here can be continued from one of its tokens")
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
        raise UserError(
            f"prompt and answer fill the {room} tokens that {served.name} takes; there is no room left"
        )
    sampling = _within(Sampling(**fields), served, [*details.prompt, *prefix])
    return Plan(
        served, kind, conversation, message.parent, dict(message.settings), fields, sampling, [],
        list(details.prompt), prefix, stop_ids, ended,
    )  # fmt: skip


def _picked(
    served: Served, place: Json, before: Sequence[Json], token: int, stop_ids: frozenset[int]
) -> Json:
    """The record of an alternative that the user chose."""
    logprob = next((value for other, _, value in place["top"] if other == token), None)
    if logprob is None:
        raise UserError(f"token {token} is not among the alternatives there")
    bytes_of = TokenBytes(served.tokenizer)
    first = not any(one["bytes"] for one in before)
    data = b"" if token in stop_ids else bytes_of(token, first=first)
    return {
        "id": token,
        "text": bytes_of.text(token, first=first),
        "bytes": data.hex(),
        "logprob": logprob,
        "top": place["top"],
        "entropy": place["entropy"],
        "picked": True,
    }


def prompt_pieces(served: Served | None, prompt: Sequence[int]) -> list[Json]:
    """The tokens of a prompt, to show: id, text, and whether it is one that no text is encoded to."""
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
