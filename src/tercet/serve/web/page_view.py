"""A conversation as the page shows it: the branch that is chosen, turn by turn."""

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
    """The conversation, and its turns from the first message to the leaf.

    A turn is ``{"message": ...}``, or ``{"pair": ...}`` where two models answered: the answer that the
    conversation goes on from is named by ``chosen``.

    comparing: comparisons of which an answer is being written.

    Raises:
        NotThere: no such conversation.
    """
    one = store.conversation(name)
    tree = store.tree(name)
    by_id = {message.id: message for message in tree}
    shape = _Shape(one.kind, tree, store.summaries(name))
    comparisons = store.comparisons(name)
    turns: list[Json] = []
    path = _path(by_id, one.leaf)
    for message in path:
        pair = next((two for two in reversed(comparisons) if message.id in (two.left, two.right)), None)
        if pair is not None and pair.left and pair.right:
            chosen = "left" if message.id == pair.left else "right"
            turns.append({"pair": _pair(pair, by_id, shape, chosen)})
        else:
            turns.append({"message": shape.message(message)})
    last = next((two for two in comparisons if two.parent == one.leaf and two.id in comparing), None)
    if last is not None:
        turns.append({"pair": _pair(last, by_id, shape, None)})
    return {"conversation": vars(one), "turns": turns}


def _path(by_id: dict[str, Message], leaf: str | None) -> list[Message]:
    path = []
    while leaf is not None:
        path.append(by_id[leaf])
        leaf = by_id[leaf].parent
    return path[::-1]


def _pair(two: Comparison, by_id: dict[str, Message], shape: _Shape, chosen: str | None) -> Json:
    hidden = two.blind and two.vote is None
    found: Json = {"id": two.id, "vote": two.vote, "blind": two.blind, "hidden": hidden, "chosen": chosen}
    for side, name in (("left", two.left), ("right", two.right)):
        message = by_id.get(name or "")
        found[side] = None if message is None else shape.message(message, apart=(two.left, two.right))
        if message is not None and hidden:
            found[side] |= {"model": None}
    return found


class _Shape:
    """Messages as the page wants them."""

    def __init__(self, kind: str, tree: Iterable[Message], summaries: dict[str, Json]) -> None:
        self._kind, self._summaries = kind, summaries
        self._children: dict[tuple[str | None, str], list[str]] = {}
        for message in tree:
            self._children.setdefault((message.parent, message.role), []).append(message.id)

    def message(self, message: Message, apart: Collection[str | None] = ()) -> Json:
        """``apart``: the two answers of a comparison are no branches of each other."""
        siblings = self._children[message.parent, message.role]
        summary: dict[str, Any] | None = self._summaries.get(message.id)
        found: Json = {
            "id": message.id,
            "role": message.role,
            "content": message.content,
            "model": message.model,
            "finish": message.finish,
            "settings": message.settings,
            "siblings": [one for one in siblings if one == message.id or one not in apart],
            "summary": summary,
        }
        if message.role == "assistant" and self._kind == "chat":
            found["blocks"] = _blocks(message.content)
        return found
