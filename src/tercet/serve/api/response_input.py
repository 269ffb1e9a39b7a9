"""The input of OpenAI's Responses API, read as messages of chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tercet.data.conversation import PART_SEPARATOR
from tercet.serve.api.field_table import Hint, Ignored, Kinds, Refused, Used, WhereKnown, check_kind
from tercet.serve.api.fields import string_field
from tercet.serve.api.kept_items import KeptItems
from tercet.serve.errors import invalid_value, missing_parameter

Json = dict[str, Any]

_OTHERS_TOOL = "this server has no such tool, so models cannot read its calls"
ITEMS: Kinds = {
    "message": Used("of user, assistant, system or developer"),
    "function_call": Used("an earlier call; part of the assistant's message"),
    "function_call_output": Used("its result, text only"),
    "item_reference": Used("an item of an earlier answer, which is kept for an hour under its id"),
    "reasoning": WhereKnown("its text, for a chat template that shows earlier reasoning"),
    "compaction_trigger": Hint("this server does not compact conversations"),
    "additional_tools": Hint("this server offers the tools in `tools` only"),
    "compaction": Refused("its text is encrypted for another server"),
    **{
        name: Refused(_OTHERS_TOOL)
        for name in (
            "custom_tool_call", "custom_tool_call_output", "local_shell_call", "local_shell_call_output",
            "shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output", "web_search_call",
            "file_search_call", "code_interpreter_call", "computer_call", "computer_call_output",
            "image_generation_call", "tool_search_call", "tool_search_output", "mcp_call", "mcp_list_tools",
            "mcp_approval_request", "mcp_approval_response",
        )
    },
}  # fmt: skip
PARTS: Kinds = {
    "input_text": Used("text"),
    "output_text": Used("text of an earlier answer"),
    "text": Used("text"),
    "summary_text": Used("text of a summary"),
    "reasoning_text": Used("text of reasoning"),
    "refusal": Used("read as text"),
    "input_image": Refused("models of this server read text only"),
    "input_file": Refused("models of this server read text only"),
    "input_audio": Refused("models of this server read text only"),
}
# Keys of items and parts that identify or describe them, and say nothing to a model.
_ITEM_KEYS = (
    "type", "id", "status", "role", "content", "call_id", "name", "arguments", "output", "summary",
    "encrypted_content", "phase", "created_by",
)  # fmt: skip
_PART_KEYS = ("type", "text", "refusal", "annotations", "logprobs")


def input_messages(
    instructions: str | None,
    items: str | list[Json],
    kept: KeptItems,
    shows_reasoning: bool,
    ignored: Ignored,
) -> list[Json]:
    """Return the conversation as messages of chat completions.

    Args:
        instructions: the first system message; None or "" for none.
        items: the request's ``input``.
        kept: the items of earlier answers.
        shows_reasoning: whether the chat template shows the reasoning of earlier answers.
        ignored: receives what has no effect.

    Raises:
        APIError: 400, with the place of a mistake.
    """
    opening = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(items, str):
        return [*opening, {"role": "user", "content": items}]
    reader = _Reader(kept, shows_reasoning, ignored)
    for number, item in enumerate(items):
        reader.add(item, f"input[{number}]")
    if not reader.messages:
        raise invalid_value("input", "has no message")
    return [*opening, *reader.messages]


class _Reader:
    def __init__(self, kept: KeptItems, shows_reasoning: bool, ignored: Ignored) -> None:
        self.messages: list[Json] = []
        self._kept, self._shows_reasoning, self._ignored = kept, shows_reasoning, ignored
        self._reasoning = ""  # before the next message of the assistant

    def add(self, item: Mapping[str, Any], where: str) -> None:
        """Append an item to the messages; calls become part of the assistant's message."""
        if "type" not in item:  # OpenAI's clients leave it out for messages and references
            if "role" not in item and "id" not in item:
                raise missing_parameter(f"{where}.type")
            item = {"type": "message" if "role" in item else "item_reference", **item}
        if not check_kind(ITEMS, item, where, self._ignored):
            return
        kind = item["type"]
        if kind == "item_reference":
            item = self._kept.get(string_field(item, "id", where), where)
            kind = item["type"]
        self._ignored.add_unknown(item, _ITEM_KEYS, where)
        if kind == "message":
            self._add_message(item, where)
        elif kind == "reasoning":
            self._add_reasoning(item, where)
        elif kind == "function_call":
            self._add_call(item, where)
        else:
            text = self._text(item.get("output"), f"{where}.output")
            call_id = string_field(item, "call_id", where)
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _add_message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise invalid_value(
                f"{where}.role", f"is {role!r:.60}; it must be user, assistant, system or developer"
            )
        message = {"role": role, "content": self._text(item.get("content"), f"{where}.content")}
        self.messages.append(message)
        if role == "assistant":
            self._attach_reasoning()
        self._reasoning = ""

    def _add_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        texts = [
            self._text(item[name], f"{where}.{name}") for name in ("content", "summary") if item.get(name)
        ]
        if not texts or not texts[0] or not self._shows_reasoning:
            self._ignored.add(where, "this model's chat template does not show earlier reasoning")
            return
        self._reasoning = PART_SEPARATOR.join([*([self._reasoning] if self._reasoning else []), texts[0]])

    def _add_call(self, item: Mapping[str, Any], where: str) -> None:
        name, call_id, arguments = (
            string_field(item, key, where) for key in ("name", "call_id", "arguments")
        )
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        self._attach_reasoning()
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _attach_reasoning(self) -> None:
        if self._reasoning:
            self.messages[-1]["reasoning_content"] = self._reasoning
            self._reasoning = ""

    def _text(self, content: object, where: str) -> str:
        """Return a string, or the text of typed parts."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise invalid_value(where, "must be a string or a list of parts")
        texts = []
        for number, part in enumerate(content):
            place = f"{where}[{number}]"
            if not isinstance(part, dict):
                raise invalid_value(place, "must be an object")
            check_kind(PARTS, part, place, self._ignored)
            self._ignored.add_unknown(part, _PART_KEYS, place)
            texts.append(string_field(part, "refusal" if part["type"] == "refusal" else "text", place))
        return PART_SEPARATOR.join(texts)
