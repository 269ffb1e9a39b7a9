"""The tokens that a model reads for a conversation: one way for Python, the API and the chat page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.conversation import check_text
from tercet.errors import ContextOverflow
from tercet.model.tokenizer import Tokenizer


def with_known_roles(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Mapping[str, Any]]:
    """Turn messages of the role ``developer`` into system messages where the template does not name that role.

    Most templates would write it as a role that the model never saw in training. UserError without a template.
    """
    if "developer" in tokenizer.template_text(tools=tools is not None):
        return list(messages)
    return [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in messages
    ]


def conversation_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Render a conversation with the chat template, up to where the assistant's answer begins.

    Args:
        tokenizer: holds the chat template.
        messages: contents are strings, or what the template itself understands.
        tools: function descriptions for the template.
        variables: further variables of the template.

    Raises:
        UserError: there is no template, it refuses the conversation, or the text is not valid Unicode.
    """
    messages = with_known_roles(tokenizer, messages, tools)
    text = tokenizer.render(messages, tools=tools, add_generation_prompt=True, **variables)
    return check_text(text, "the conversation")


def conversation_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """Encode `conversation_text`; the template writes special tokens itself, so none are added."""
    return tokenizer.encode(conversation_text(tokenizer, messages, tools, **variables), special=False)


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
