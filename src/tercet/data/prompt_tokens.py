"""The tokens that a model reads for a conversation: one way for Python, the API, the chat page and training.

Messages are those of `tercet.data.conversation.read_messages`. `template_messages` changes their form to what the
model's chat template needs, so that every part of them reaches the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tercet.data.conversation import ConversationError, Message, check_text, text_of
from tercet.data.generic_tools import generic_tools, has_tools, split_calls
from tercet.data.tool_format import tool_format
from tercet.data.turns import arrange, late_system_texts
from tercet.errors import ContextOverflow, UserError
from tercet.model.control_text import ControlText, ControlTokenMode
from tercet.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tercet.model.template_needs import TemplateNeeds

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
# Names of the renderer's own arguments, which no variable of a template can have.
RESERVED = frozenset(
    [
        *("self", "tokenizer", "messages", "tools", "template", "special_tokens", "null_content"),
        *("supervised", "control_tokens", "ending", "add_generation_prompt", "continue_final_message"),
    ]
)
# Stands at the end of a message that the answer continues; letters and digits, so that no template escapes it.
_END = "Qx7endofmessagex7Q"


@dataclass(frozen=True)
class PromptEnding:
    """How the prompt of a conversation ends, in the words of vLLM's and transformers' settings.

    Attributes:
        continue_final_message: within the last message, which the output continues.
        add_generation_prompt: with the beginning of an assistant's message. None: the same, unless the last
            message is continued; but a conversation must not end with an assistant's message.

    Raises:
        UserError: both are true.
    """

    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise ConversationError(
                "continue_final_message",
                "and `add_generation_prompt` contradict each other: the answer continues the last message, or "
                "begins a new one; set only one of them",
            )

    @property
    def begins_message(self) -> bool:
        """Whether the prompt ends with the beginning of an assistant's message."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    def check(self, messages: Messages, name: str = "messages") -> None:
        """Refuse a conversation that ends with an assistant's message, unless a setting says what follows it.

        Raises:
            ConversationError: it does; the error names the settings.
        """
        if self.continue_final_message or self.add_generation_prompt is not None:
            return
        if messages and messages[-1].get("role") == "assistant":
            raise ConversationError(
                f"{name}[{len(messages) - 1}]",
                "is the assistant's, and it is the last one; set `continue_final_message` to continue it, or "
                "`add_generation_prompt` to begin another message after it",
            )


NEW_MESSAGE = PromptEnding()


@dataclass(frozen=True)
class ChatInput:
    """A conversation in the form that a chat template needs, with spelled control tokens marked or not.

    Attributes:
        tokenizer: holds the chat template.
        messages: for the template.
        tools: for the template.
        variables: further variables of the template.
        control_tokens: what control tokens that messages spell become.
    """

    tokenizer: Tokenizer
    messages: list[Message]
    tools: list[Message] | None
    variables: dict[str, Any] = field(default_factory=dict)
    control_tokens: ControlTokenMode = "text"

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Render some of the messages. The text has marks, which `finish` removes."""
        return self.tokenizer.render(
            messages,
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
            null_content=self.tokenizer.needs(tools=self.tools is not None).empty == "null",
            **self.variables,
        )

    def ordered(self, messages: list[Message], add_generation_prompt: bool = False) -> list[Message]:
        """Return the messages in an order that the template shows whole (`tercet.data.turns`).

        Raises:
            UserError: the template refuses them in either order; the error is that of their own.
        """
        arranged = arrange(messages)
        if arranged == messages:
            return messages
        try:
            text = self.render(messages, add_generation_prompt)
        except UserError as problem:
            try:
                self.render(arranged, add_generation_prompt)
            except UserError:
                raise problem from None
            return arranged
        return messages if all(part in text for part in late_system_texts(messages)) else arranged

    def finish(self, text: str) -> ControlText:
        """Return a rendered text without marks, in which spelled control tokens are ordinary text."""
        if self.control_tokens == "control":
            return ControlText(text)
        return self.tokenizer.control_tokens(tools=self.tools is not None).unmark(text)


def prepare_conversation(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    *,
    control_tokens: ControlTokenMode = "text",
    **variables: Any,
) -> ChatInput:
    """Return a conversation ready for the chat template.

    Args:
        tokenizer: holds the chat template.
        messages: as `read_messages` returns them.
        tools: function descriptions for the template.
        control_tokens: "text" makes control tokens that messages, tools and variables spell ordinary text;
            "control" leaves them control tokens.
        variables: further variables of the template.

    Raises:
        UserError: there is no template, or it can't show a message.
    """
    adapted, shown = template_messages(tokenizer, messages, tools)
    if control_tokens == "control":
        return ChatInput(tokenizer, adapted, shown, variables, control_tokens)
    control = tokenizer.control_tokens(tools=shown is not None)
    marked, shown, variables = control.mark(adapted), control.mark_value(shown), control.mark_value(variables)
    return ChatInput(tokenizer, marked, shown, variables, control_tokens)


def conversation_text(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    *,
    control_tokens: ControlTokenMode = "text",
    ending: PromptEnding = NEW_MESSAGE,
    **variables: Any,
) -> ControlText:
    """Render a conversation with the chat template, up to where the model's output begins.

    Args:
        tokenizer: holds the chat template.
        messages: as `read_messages` returns them.
        tools: function descriptions for the template.
        control_tokens: as for `prepare_conversation`.
        ending: where the text ends; by default with the beginning of an assistant's message.
        variables: further variables of the template.

    Turns that the template refuses or leaves out are arranged (`tercet.data.turns`).

    Raises:
        UserError: there is no template, it refuses the conversation, or the text is not valid Unicode.
    """
    prepared = prepare_conversation(tokenizer, messages, tools, control_tokens=control_tokens, **variables)
    ordered = prepared.ordered(prepared.messages, ending.begins_message)
    if ending.continue_final_message:
        text = _open_text(prepared, ordered)
    else:
        text = prepared.render(ordered, ending.begins_message)
    check_text(text, "the conversation")
    return prepared.finish(text)


def conversation_tokens(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None, **options: Any
) -> list[int]:
    """Encode `conversation_text`; the template writes special tokens itself, so none are added."""
    return tokenizer.encode(conversation_text(tokenizer, messages, tools, **options), special=False)


def check_context(tokens: Sequence[int], limit: int | None, prompt: str, model: str) -> None:
    """Raise ContextOverflow for more tokens than the context takes.

    Args:
        tokens: the prompt.
        limit: the model's context length in tokens; None: unknown, nothing is checked.
        prompt: how the error calls the prompt ("conversation", "prompt").
        model: how the error calls the model.
    """
    if limit is not None and len(tokens) > limit:
        raise ContextOverflow(
            f"the {prompt} has {len(tokens)} tokens; {model} takes at most {limit}, the answer included",
            len(tokens),
            limit,
        )


def _open_text(prepared: ChatInput, messages: list[Message]) -> str:
    """Render a conversation up to the end of its last message's text, as transformers does."""
    last, place = messages[-1], f"messages[{len(messages) - 1}]"
    if last.get("tool_calls"):
        raise ConversationError(
            place, "has calls, so it can't be continued; leave out `continue_final_message`"
        )
    content = text_of(last)
    marked = with_text(last, f"{content}{_END} ")
    text = prepared.render([*messages[:-1], marked])
    before, mark, after = text.rpartition(_END)
    if not mark or content.strip() not in before:
        raise ConversationError(
            place, "can't be continued: the chat template does not show its text as it is"
        )
    # A template that trims messages has cut the space after the mark, and would cut the end of the message too.
    return before if after.startswith(" ") else before.rstrip()


# The form that a template needs


def template_messages(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None
) -> tuple[list[Message], list[Message] | None]:
    """Return the messages and tools in the form that the chat template needs.

    - ``developer`` becomes ``system`` where the template does not name that role.
    - Content is a list of parts where the template reads nothing else, and a string otherwise.
    - A name that the template does not show stands before the text, as "NAME: text", where messages of this
      role have several names; a single name is left out.
    - A message with several calls becomes several messages where the template takes one call.
    - Arguments of calls are objects or strings of JSON, calls without text have the content that the template
      expects, results have the name of their function, and identifiers are nine letters and digits for
      templates that require this.
    - Where the template has no format of calls that `tool_format` knows, functions, calls and results become
      text, and there are no tools.

    Args:
        tokenizer: holds the chat template.
        messages: as `read_messages` returns them.
        tools: function descriptions for the template; they may select another template.

    Raises:
        UserError: there is no template.
    """
    messages = [dict(message) for message in messages]
    shown = None if not tools else [dict(tool) for tool in tools]
    form = tool_format(tokenizer) if has_tools(messages, shown) else None
    if form is None and has_tools(messages, shown):
        messages, shown = generic_tools(tokenizer, messages, shown), None
    elif form is not None and not form.several:
        messages = split_calls(messages)
    needs = tokenizer.needs(tools=shown is not None)
    if form is not None and not needs.calls:
        needs = replace(needs, objects=form.objects)
    return _adapted(tokenizer, messages, shown, needs), shown


def _adapted(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, needs: TemplateNeeds
) -> list[Message]:
    knows_developer = "developer" in tokenizer.template_text(tools=tools is not None)
    named = _shown_names(messages, needs)
    names: dict[str, str] = {}  # function names by the identifier of the call
    waiting: list[str] = []  # identifiers of calls that have had no result yet
    adapted = []
    for original in messages:
        message = dict(original)
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"
        if message["role"] != "tool":
            name = message.get("name")
            if name is not None and message["role"] not in needs.names:
                del message["name"]
                if message["role"] in named:
                    message = with_text(message, f"{name}: {text_of(message)}")
        if message.get("tool_calls") or message["role"] == "tool":
            message = _with_calls(message, needs, names, waiting)
        adapted.append(_with_content(message, needs))
    return adapted


def with_text(message: Mapping[str, Any], text: str) -> Message:
    """Return the message with another text, as a part where its content is parts."""
    if isinstance(message.get("content"), list):
        return {**message, "content": [{"type": "text", "text": text}]}
    return {**message, "content": text}


def hidden_names(tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None) -> list[int]:
    """Return the indices of messages whose names `template_messages` leaves out. UserError without a template."""
    if not any(message.get("name") for message in messages):
        return []
    needs = tokenizer.needs(tools=bool(tools))
    written = _shown_names(messages, needs)
    return [
        number
        for number, message in enumerate(messages)
        if message.get("name") and _spoken_role(message) not in (*needs.names, *written, "tool")
    ]


def _spoken_role(message: Mapping[str, Any]) -> str:
    role: str = message["role"]
    return "system" if role == "developer" else role


def _shown_names(messages: Messages, needs: TemplateNeeds) -> set[str]:
    """Return the roles whose messages have several names that the template does not show."""
    names: dict[str, set[str]] = {}
    for message in messages:
        if message.get("name"):
            names.setdefault(_spoken_role(message), set()).add(message["name"])
    return {role for role, several in names.items() if len(several) > 1 and role not in needs.names}


def _with_content(message: Message, needs: TemplateNeeds) -> Message:
    text = text_of(message)
    if not text and message.get("tool_calls") and needs.empty != "text":
        message["content"] = None
    elif message["role"] not in needs.parts:
        message["content"] = text
    elif not isinstance(message["content"], list):
        message["content"] = [{"type": "text", "text": text}]
    return message


def _with_calls(message: Message, needs: TemplateNeeds, names: dict[str, str], waiting: list[str]) -> Message:
    """Return a message with calls, or with the result of one, in the form that the template needs.

    names: receives the names of the functions by the identifiers of the calls.
    waiting: receives the identifiers of calls, and loses those that have a result.
    """
    if calls := message.get("tool_calls", []):
        converted = []
        for call in calls:
            function, given = call["function"], call.get("id")
            identifier = _identifier(f"call{len(names)}" if given is None else given, needs)
            names[identifier] = function["name"]
            waiting.append(identifier)
            arguments = function["arguments"]
            if needs.objects and isinstance(arguments, str):
                arguments = json.loads(arguments)
            elif not needs.objects and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            shown = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
            converted.append(shown if given is None and not needs.short_ids else {"id": identifier, **shown})
        return {**message, "tool_calls": converted}
    given = message.get("tool_call_id")
    if not isinstance(given, str) and not waiting:
        return message
    identifier = _identifier(given, needs) if isinstance(given, str) else waiting[0]
    if identifier in waiting:
        waiting.remove(identifier)
    if isinstance(given, str) or needs.short_ids:
        message["tool_call_id"] = identifier
    return {"name": names[identifier], **message} if identifier in names else message


def _identifier(text: str, needs: TemplateNeeds) -> str:
    if not needs.short_ids or re.fullmatch(r"[A-Za-z0-9]{9}", text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]
