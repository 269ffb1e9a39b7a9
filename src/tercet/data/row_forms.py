"""The forms of a training row: what data sets and other trainers write, read into one form.

A row is a conversation (``messages``; ShareGPT's ``conversations``; lists in ``prompt`` and ``completion``; Alpaca's
``instruction``, ``input``, ``output``), a prompt with its completion, or a text. Fields that change what is learned
are honoured or refused, never ignored; columns that no form reads are listed in `TrainingRow.unused`.

The fields are those of OpenAI's fine-tuning formats, TRL, axolotl, LLaMA-Factory, ms-swift, mistral-finetune,
torchtune and NeMo, as their documentation describes them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tercet.errors import UserError

Json = dict[str, Any]

# Fields of a message that say whether it is trained on: OpenAI and mistral-finetune, axolotl, ms-swift.
FLAGS = ("weight", "train", "training", "loss")
# Fields of a message that choose parts of it, or weigh it, in a way that can't be honoured.
_REFUSED_IN_MESSAGES = {
    **dict.fromkeys(
        ("train_detail", "training_detail"), "chooses parts of a message; split it into messages"
    ),
    **dict.fromkeys(
        ("mask", "masked", "loss_mask", "loss_scale", "loss_weight"), "is not read; use weight with 0 or 1"
    ),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "holds no text; only text is trained on"
    ),
}
_PREFERENCE = "belongs to preference data; keep the good answer as completion and remove this column"
_TOKENIZED = "is for tokenized rows; give the text, which is tokenized and masked here"
# Columns of a row that change what is learned and can't be honoured.
_REFUSED = {
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "holds no text; only text is trained on"
    ),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages", "preferred_output"), _PREFERENCE
    ),
    **dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids", "seq_lengths", "completion_mask", "prompt_mask"),
        _TOKENIZED,
    ),
    **dict.fromkeys(("assistant_masks", "assistant_mask", "loss_mask"), _TOKENIZED),
    **dict.fromkeys(
        ("sample_weight", "loss_weight", "loss_scale"), "weighs a row; repeat rows or remove them instead"
    ),
    "segments": "is a form without a template; give messages, or prompt and completion",
    "chat_template": "is a template for each row; set `chat_template` for all of them",
}
# ShareGPT's names of the speakers. A function call is a message of the assistant, see `_turn`.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function": "tool", "function_call": "assistant",
}  # fmt: skip
_SYSTEM = ("system", "system_prompt")
FIELD_OF_MESSAGE = "messages."  # begins the name of a message's field in `TrainingRow.unused`
FORMS = "messages, conversations, prompt and completion, instruction and output, or text"


@dataclass(frozen=True)
class TrainingRow:
    """What a row trains on: a conversation, or plain text.

    Attributes:
        messages: the conversation, without the fields that only training reads; None for plain text.
        supervised: the indices of the messages that are trained on.
        context: number of answers that are not trained on because the row says so (weight 0).
        tools: of the conversation, as the row has them.
        variables: of the chat template.
        prompt: the plain text before ``completion``, which is context only.
        completion: the plain text that is trained on.
        dropped: why the row gives no example; None: it gives one.
        unused: the columns that are not read, and the fields of messages as ``messages.NAME`` that only
            a chat template could read.
    """

    messages: list[Json] | None = None
    supervised: frozenset[int] = frozenset()
    context: int = 0
    tools: Any = None
    variables: Json = field(default_factory=dict)
    prompt: str = ""
    completion: str = ""
    dropped: str | None = None
    unused: tuple[str, ...] = ()


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Return whether a row is rendered with a chat template."""
    if row.get("messages") is not None or row.get("conversations") is not None:
        return True
    if row.get("prompt") is not None and row.get("completion") is not None:
        return isinstance(row["prompt"], list)
    return row.get("text") is None and row.get("instruction") is not None


def read_row(row: Mapping[str, Any]) -> TrainingRow:
    """Read a row of any form. Fields that are null count as left out, as tables write them.

    Raises:
        UserError: the row has no known form, a field has a wrong value, or one that changes what is learned
            can't be honoured.
    """
    given = {name: value for name, value in row.items() if value is not None}
    used: set[str] = set()
    _refuse_columns(given)
    used.update(name for name in _REFUSED if name in given)  # those that are left are empty
    messages, first = _messages(given, used)
    if messages is None:
        read = _plain(given, used)
    else:
        read = _conversation(given, used, messages, first)
    if _weight(given, used) == 0:
        read = replace(read, dropped=read.dropped or "weight 0")
    unused = (*(name for name in given if name not in used), *read.unused)
    return replace(read, unused=unused)


def _refuse_columns(given: Json) -> None:
    for name, reason in _REFUSED.items():
        if given.get(name) not in (None, [], {}, ""):
            raise UserError(f"{name} {reason}")
    if isinstance(given.get("labels"), list):
        raise UserError(f"labels {_TOKENIZED}")
    for name in ("label", "kto_tag"):
        answered = "completion" in given or name == "kto_tag"
        if answered and isinstance(given.get(name), bool | int) and not given[name]:
            raise UserError(f"{name} is {given[name]!r}, which marks a bad answer; remove such rows")
    if given.get("type") in ("TEXT_TO_VALUE", "VALUE_TO_TEXT"):
        raise UserError(f"type {given['type']} asks for attribute labels in the text, which are not written")


def _weight(given: Json, used: set[str]) -> int:
    """Return the weight of a row, 0 or 1."""
    weight = given.get("weight", 1)
    if isinstance(weight, str) or weight not in (0, 1):
        raise UserError(
            f"weight is {weight!r}; a row is trained on or not (1 or 0), so repeat it to weigh it more"
        )
    used.add("weight")
    return int(weight)


def _messages(given: Json, used: set[str]) -> tuple[list[Any] | None, int]:
    """Return the messages of a conversation, and the index of the first that may be trained on."""
    name = next((name for name in ("messages", "conversations") if name in given), None)
    if name is not None:
        used.add(name)
        return _list(given[name], name), 0
    if "prompt" in given and "completion" in given:
        used.update(("prompt", "completion"))
        prompt, completion = given["prompt"], given["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return [*prompt, *completion], len(prompt)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise UserError("prompt and completion must both be strings or both be lists of messages")
        return None, 0
    if "text" not in given and "instruction" in given and "output" in given:
        return list(_alpaca(given, used)), 0
    return None, 0


def _list(value: object, name: str) -> list[Any]:
    if isinstance(value, str):  # a column of a table may hold the list as JSON text
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list of objects with role and content")
    return value


def _alpaca(given: Json, used: set[str]) -> Iterator[Json]:
    used.update(("instruction", "input", "output", "history"))
    for pair in given.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError("history must be a list of pairs of a question and its answer")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}
    for name in ("instruction", "input", "output"):
        if not isinstance(given.get(name, ""), str):
            raise UserError(f"{name} is a {type(given[name]).__name__}, not a string")
    question = [given[name] for name in ("instruction", "input") if given.get(name)]
    yield {"role": "user", "content": "\n".join(question)}
    yield {"role": "assistant", "content": given["output"]}


def _plain(given: Json, used: set[str]) -> TrainingRow:
    """Read a prompt with its completion, or a text."""
    for name in (*_SYSTEM, "tools", "functions", "history", "chat_template_kwargs"):
        if given.get(name) not in (None, [], {}, ""):
            raise UserError(f"{name} is for conversations; write the row as messages")
        used.add(name)
    if "completion" in used:
        empty = None if given["completion"].strip() else "empty completion"
        return TrainingRow(prompt=given["prompt"], completion=given["completion"], dropped=empty)
    if "text" in given:
        used.add("text")
        if not isinstance(given["text"], str):
            raise UserError(f"text is a {type(given['text']).__name__}, not a string")
        return TrainingRow(completion=given["text"], dropped=None if given["text"].strip() else "empty text")
    raise UserError(f"needs {FORMS}; it has {', '.join(given) or 'nothing'}{_hint(given)}")


def _hint(given: Json) -> str:
    if "non_preferred_output" in given or ("prompt" in given and "label" in given):
        return f" (a column {_PREFERENCE})"
    if {"input", "output"} <= set(given) or {"prompt", "response"} <= set(given):
        return "; rename its columns"
    return ""


def _conversation(given: Json, used: set[str], turns: list[Any], first: int) -> TrainingRow:
    messages: list[Json] = []
    supervised: set[int] = set()
    unused: dict[str, None] = {}
    context = 0
    for number, turn in enumerate(turns):
        message, trained = _turn(turn, f"messages[{number}]", unused)
        if message["role"] == "assistant" and number >= first:
            context += trained is False
            if trained is not False:
                supervised.add(number)
        messages.append(message)
    shift = _add_system(given, used, messages)
    used.update(("tools", "functions", "chat_template_kwargs", "mask"))
    if str(given.get("mask", "User")).lower() not in ("user", "human"):
        raise UserError(f"mask is {given['mask']!r}; only answers are trained on (mask User)")
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise UserError(f"chat_template_kwargs is a {type(variables).__name__}; it must be an object")
    dropped = None
    if not supervised:
        dropped = "no answer to train on (weight 0)" if context else "no assistant message"
    if "output" in used and not given["output"].strip():
        dropped = "empty completion"
    return TrainingRow(
        messages=messages,
        supervised=frozenset(number + shift for number in supervised),
        context=context,
        tools=_tools(given),
        variables=variables,
        dropped=dropped if turns else "empty conversation",
        unused=tuple(unused),
    )


def _turn(turn: Any, where: str, unused: dict[str, None]) -> tuple[Json, bool | None]:
    """Return a message with role and content, and whether it is trained on; None: as its role."""
    if not isinstance(turn, Mapping) or ("role" not in turn and "from" not in turn):
        raise UserError(f"messages must be a list of objects with role and content; {where} is none")
    message = {name: value for name, value in turn.items() if value is not None}
    trained = _trained(message, where)
    for name, reason in _REFUSED_IN_MESSAGES.items():
        if message.get(name) not in (None, [], {}, ""):
            raise UserError(f"{where}.{name} {reason}")
        message.pop(name, None)
    if "role" not in message:  # ShareGPT
        speaker = str(message.pop("from", ""))
        role = _ROLES.get(speaker.lower().replace("-", "_"))
        if role is None:
            raise UserError(f"{where}.from is {speaker!r}; it must be one of {', '.join(_ROLES)}")
        value = message.pop("value", "")
        message = {"role": role, "content": value, **message}
        if speaker.lower().replace("-", "_") == "function_call":
            message |= {"content": "", "tool_calls": _calls(value, f"{where}.value")}
    if trained and message["role"] != "assistant":
        raise UserError(
            f"{where} is trained on as it says, but only answers (role assistant) can be trained on"
        )
    for name in message:
        if name not in ("role", "content", "name", "tool_calls", "function_call", "tool_call_id"):
            unused[FIELD_OF_MESSAGE + name] = None
    return message, trained


def _trained(message: Json, where: str) -> bool | None:
    """Remove the fields that say whether a message is trained on, and return what they say."""
    flags = {name: message.pop(name) for name in FLAGS if name in message}
    for name, value in flags.items():
        if isinstance(value, str) or value not in (0, 1):
            raise UserError(f"{where}.{name} is {value!r}; it must be 0 or 1 (false or true)")
    if len(set(map(bool, flags.values()))) > 1:
        raise UserError(f"{where} has {' and '.join(flags)}, which contradict each other")
    return next((bool(value) for value in flags.values()), None)


def _calls(value: object, where: str) -> list[Json]:
    """Return the calls that LLaMA-Factory's ``function_call`` holds as JSON text: one, or a list."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where} is not JSON ({problem})") from problem
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"{where} must hold function calls with name and arguments")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _add_system(given: Json, used: set[str], messages: list[Json]) -> int:
    """Put the system text of a column before the messages; return by how much their indices moved."""
    texts = [given[name] for name in _SYSTEM if given.get(name)]
    used.update(_SYSTEM)
    if not texts:
        return 0
    if not all(isinstance(text, str) for text in texts):
        raise UserError("system must be a string")
    own = [message for message in messages if message["role"] in ("system", "developer")]
    if len(set(texts)) > 1 or any(message.get("content") != texts[0] for message in own):
        raise UserError("there are two system texts, in a column and in a message; keep one of them")
    if own:
        return 0
    messages.insert(0, {"role": "system", "content": texts[0]})
    return 1


def _tools(given: Json) -> Any:
    """Return the tools, from ``tools`` or from OpenAI's older ``functions``."""
    tools, functions = given.get("tools"), given.get("functions")
    if not functions:
        return tools
    if tools:
        raise UserError("tools and functions are two forms of one field; keep tools")
    functions = _list(functions, "functions")
    return [{"type": "function", "function": function} for function in functions]
