"""A conversation as the page shows it: the chosen branch, turn by turn."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

from tercet.serve.web.records import Comparison, Json, Message
from tercet.serve.web.render import render
from tercet.serve.web.store import Store


@functools.lru_cache(maxsize=512)
def _blocks(content: str) -> list[str]:
    return render(content)


def conversation_view(store: Store, name: str, comparing: Collection[str] = ()) -> Json:
    """Return the conversation and its turns from the first message to the leaf.

    A turn is ``{"message": ...}``, or ``{"pair": ...}`` where two models answered; ``chosen`` is the answer that
    the conversation continues from. ``comparing`` holds the comparisons with an answer in progress.

    Raises:
        NotThere: there is no such conversation.
    """
    conversation = store.conversation(name)
    tree = store.tree(name)
    by_id = {message.id: message for message in tree}
    shape = _Shape(conversation.kind, tree, store.summaries(name))
    comparisons = store.comparisons(name)
    turns: list[Json] = []
    path = _path(by_id, conversation.leaf)
    for message in path:
        pair = next((item for item in reversed(comparisons) if message.id in (item.left, item.right)), None)
        if pair is not None and pair.left and pair.right:
            chosen = "left" if message.id == pair.left else "right"
            turns.append({"pair": _pair(pair, by_id, shape, chosen)})
        else:
            turns.append({"message": shape.message(message)})
    last = next(
        (item for item in comparisons if item.parent == conversation.leaf and item.id in comparing), None
    )
    if last is not None:
        turns.append({"pair": _pair(last, by_id, shape, None)})
    return {"conversation": vars(conversation), "turns": turns}


def _path(by_id: dict[str, Message], leaf: str | None) -> list[Message]:
    path = []
    while leaf is not None:
        path.append(by_id[leaf])
        leaf = by_id[leaf].parent
    return path[::-1]


def _pair(comparison: Comparison, by_id: dict[str, Message], shape: _Shape, chosen: str | None) -> Json:
    hidden = comparison.blind and comparison.vote is None
    answers = (comparison.left, comparison.right)
    pair: Json = {
        "id": comparison.id,
        "vote": comparison.vote,
        "blind": comparison.blind,
        "hidden": hidden,
        "chosen": chosen,
    }
    for side, name in zip(("left", "right"), answers, strict=True):
        message = by_id.get(name or "")
        pair[side] = None if message is None else shape.message(message, apart=answers)
        if message is not None and hidden:
            pair[side] |= {"model": None}
    return pair


class _Shape:
    """Messages in the form that the page reads."""

    def __init__(self, kind: str, tree: Iterable[Message], summaries: dict[str, Json]) -> None:
        self._kind, self._summaries = kind, summaries
        self._children: dict[tuple[str | None, str], list[str]] = {}
        for message in tree:
            self._children.setdefault((message.parent, message.role), []).append(message.id)

    def message(self, message: Message, apart: Collection[str | None] = ()) -> Json:
        """Return a message for the page; the answers in ``apart`` do not count as branches of each other."""
        siblings = self._children[message.parent, message.role]
        summary: dict[str, Any] | None = self._summaries.get(message.id)
        view: Json = {
            "id": message.id,
            "role": message.role,
            "content": message.content,
            "model": message.model,
            "finish": message.finish,
            "settings": message.settings,
            "siblings": [sibling for sibling in siblings if sibling == message.id or sibling not in apart],
            "summary": summary,
        }
        if message.role == "assistant" and self._kind == "chat":
            view["blocks"] = _blocks(message.content)
        return view
