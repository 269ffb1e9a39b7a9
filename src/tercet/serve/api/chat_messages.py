"""Check the messages of chat completions and convert them for chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.data.conversation import ConversationError
from tercet.data.prompt_tokens import PromptEnding, hidden_names
from tercet.serve.api.field_table import Hint, Ignored, OpenBody, Refused, Used, WhereKnown
from tercet.serve.errors import invalid_value, missing_parameter, unsupported
from tercet.serve.models import Served


class Part(OpenBody):
    """A part of a message's content. Only text is supported; other types are named in the error."""

    type: Annotated[str, Used("`text`, or `refusal` of the assistant; every other type is refused")]
    text: Annotated[str | None, Used("the text; several are joined with line breaks")] = None
    refusal: Annotated[str | None, Used("read as text")] = None


class Message(OpenBody):
    """One message of a conversation."""

    role: Annotated[
        Literal["developer", "system", "user", "assistant", "tool"],
        Used("developer becomes system where the template does not know it"),
    ]
    content: Annotated[
        str | Annotated[list[Part], Field(min_length=1)] | None, Used("a string, or a list of parts")
    ] = None
    name: Annotated[
        Annotated[str, Field(max_length=256)] | None,
        WhereKnown(
            "shown as the chat template shows it; where it does not, before the text of messages of a role that "
            "have several names"
        ),
    ] = None
    refusal: Annotated[str | None, Used("the assistant's text in place of content")] = None
    tool_calls: Annotated[
        Annotated[list[dict[str, Any]], Field(min_length=1)] | None, Used("earlier calls of the assistant")
    ] = None
    tool_call_id: Annotated[str | None, Used("which call a message of role tool answers")] = None
    # Not OpenAI's: templates of reasoning models repeat it.
    reasoning_content: Annotated[str | None, WhereKnown("the assistant's earlier reasoning")] = None
    annotations: Annotated[Any, Hint("models do not read the annotations of earlier answers", ([],))] = None
    audio: Annotated[Any, Refused("models of this server read and write text")] = None
    function_call: Annotated[Any, Refused("it is deprecated; use tool_calls")] = None


def template_form(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as `tercet.data.conversation` has them. APIError 400 names the place of a mistake."""
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    for name, role in (("tool_calls", "assistant"), ("refusal", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) is not None and message.role != role:
            raise invalid_value(f"{where}.{name}", f"is for messages of role {role}")
    if message.reasoning_content is not None and message.role != "assistant":
        raise invalid_value(f"{where}.reasoning_content", "is for messages of role assistant")
    if message.role == "tool" and message.tool_call_id is None:
        raise missing_parameter(f"{where}.tool_call_id")
    content = _content(message.content, f"{where}.content", message.role)
    if content is None:
        content = message.refusal  # the assistant's text in place of content
    if content is None and message.tool_calls is None:
        raise missing_parameter(f"{where}.content")
    converted: dict[str, Any] = {"role": message.role, "content": content}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None and (name, value) != ("name", ""):
            converted[name] = value
    return converted


def _content(content: str | list[Part] | None, where: str, role: str) -> str | list[dict[str, str]] | None:
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        known = part.type == "text" or (part.type == "refusal" and role == "assistant")
        if not known:
            raise unsupported(place, f"models of this server read text, not {part.type:.40}")
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            raise missing_parameter(f"{place}.{part.type}")
        texts.append(text)
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else texts[0]


def read_ending(continued: bool | None, begun: bool | None) -> PromptEnding:
    """Return how a prompt ends, from ``continue_final_message`` and ``add_generation_prompt`` of a request.

    Raises:
        APIError: 400; they contradict each other.
    """
    try:
        return PromptEnding(bool(continued), begun)
    except ConversationError as problem:
        raise invalid_value(problem.place, problem.problem) from problem


def answer_ending(messages: Sequence[Message], continued: bool | None, begun: bool | None) -> PromptEnding:
    """Return how the prompt of an answer ends, as `read_ending`.

    Raises:
        APIError: 400; as `read_ending`, or neither is set after an assistant's message.
    """
    ending = read_ending(continued, begun)
    try:
        ending.check([{"role": message.role} for message in messages])
    except ConversationError as problem:
        raise invalid_value(problem.place, problem.problem) from problem
    return ending


def note_names(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    ignored: Ignored,
) -> None:
    """Note the names of messages that the model is not shown."""
    for number in hidden_names(served.tokenizer, messages, tools):
        ignored.add(f"messages[{number}].name", "this model's chat template does not show names")
