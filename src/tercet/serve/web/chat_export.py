"""Conversations and votes for other programs: JSON, Markdown, preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tercet.serve.web.records import Conversation, Message
from tercet.serve.web.store import Store

FORMAT = "tercet-conversation"


def as_json(store: Store, name: str) -> dict[str, Any]:
    """Return a conversation with all its branches: messages with their parents, and the leaf.

    Raises:
        NotThere: there is no such conversation.
    """
    conversation = store.conversation(name)
    messages = []
    for message in store.tree(name):
        entry: dict[str, Any] = dict(vars(message))
        details = store.details(message.id)
        if details is not None:
            entry |= {"usage": details.usage, "seconds": details.seconds}
        messages.append({key: value for key, value in entry.items() if value not in (None, {})})
    comparisons = [
        {key: value for key, value in vars(comparison).items() if key != "conversation"}
        for comparison in store.comparisons(name)
    ]
    return {
        "format": FORMAT,
        "version": 1,
        "title": conversation.title,
        "kind": conversation.kind,
        "settings": conversation.settings,
        "created": conversation.created,
        "leaf": conversation.leaf,
        "messages": messages,
        "comparisons": comparisons,
    }


def as_markdown(store: Store, name: str) -> str:
    """Return the branch that a conversation shows, as Markdown.

    Raises:
        NotThere: there is no such conversation.
    """
    conversation = store.conversation(name)
    history = store.history(conversation.leaf)
    title = f"# {' '.join(conversation.title.split()) or 'Conversation'}\n"
    if conversation.kind == "text":
        return f"{title}\n{''.join(message.content for message in history)}\n"
    parts = [title]
    system = next((message.settings["system"] for message in history if message.settings.get("system")), None)
    if system:
        parts.append(f"## System\n\n{system}\n")
    for message in history:
        author = "You" if message.role == "user" else message.model or "Answer, edited"
        ended = "" if message.finish in (None, "stop") else f"\n*({message.finish})*\n"
        parts.append(f"## {author}\n\n{message.content}\n{ended}")
    return "\n".join(parts)


def preference_pairs(store: Store) -> Iterator[dict[str, Any]]:
    """Yield a row for each vote that prefers one of two different answers, in the conversational form of trl.

    ``prompt`` is the conversation before the answers; ``chosen`` and ``rejected`` are lists of one message. Where
    a base model continued a text, all three are strings. Ties and rejections of both give no row.
    """
    for conversation in reversed(store.conversations()):
        for comparison in store.comparisons(conversation.id):
            if comparison.vote not in ("left", "right") or not comparison.left or not comparison.right:
                continue
            left, right = store.message(comparison.left), store.message(comparison.right)
            chosen, rejected = (left, right) if comparison.vote == "left" else (right, left)
            if chosen.content != rejected.content:
                yield _pair(conversation, store.history(comparison.parent), chosen, rejected)


def _pair(
    conversation: Conversation, history: list[Message], chosen: Message, rejected: Message
) -> dict[str, Any]:
    models = {"chosen_model": chosen.model, "rejected_model": rejected.model}
    if conversation.kind == "text":
        text = "".join(message.content for message in history)
        return {"prompt": text, "chosen": chosen.content, "rejected": rejected.content, **models}
    system = chosen.settings.get("system")
    opening = [{"role": "system", "content": system}] if system else []
    return {
        "prompt": [*opening, *({"role": message.role, "content": message.content} for message in history)],
        "chosen": [{"role": "assistant", "content": chosen.content}],
        "rejected": [{"role": "assistant", "content": rejected.content}],
        **models,
    }
