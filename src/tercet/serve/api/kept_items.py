"""The items of recent responses, kept in memory for clients that send references to them.

OpenAI's clients send ``{"type": "item_reference", "id": …}`` in place of an item that the server has written.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from tercet.serve.errors import invalid_value

LIFETIME = 3600.0  # seconds; a task of an agent takes minutes
CAPACITY = 32 << 20  # bytes of JSON: about ten thousand answers of 500 words

Json = dict[str, Any]


class KeptItems:
    """Items by their ids, the oldest first; none is kept longer than ``lifetime`` or beyond ``capacity``.

    Args:
        lifetime: seconds that an item is kept.
        capacity: bytes of all items together, as JSON.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        lifetime: float = LIFETIME,
        capacity: int = CAPACITY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifetime, self._capacity, self._clock = lifetime, capacity, clock
        self._items: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._size = 0

    def keep(self, items: Iterable[Json]) -> None:
        """Keep items under their ``id``."""
        for item in items:
            text = json.dumps(item).encode()
            if len(text) <= self._capacity:
                self._drop(item["id"])
                self._items[item["id"]] = self._clock(), text
                self._size += len(text)
        self._expire()

    def get(self, name: str, where: str) -> Json:
        """Return an item. APIError 400 at ``where`` for one that is not kept."""
        self._expire()
        if name not in self._items:
            raise invalid_value(
                f"{where}.id",
                f"is {name!r:.80}, an item that this server does not hold (any more); items are kept for "
                f"{self._lifetime / 60:.0f} minutes, so send the item itself",
                "item_not_found",
            )
        item: Json = json.loads(self._items[name][1])
        return item

    def _expire(self) -> None:
        oldest = self._clock() - self._lifetime
        while self._items:
            name, (began, _) = next(iter(self._items.items()))
            if began >= oldest and self._size <= self._capacity:
                return
            self._drop(name)

    def _drop(self, name: str) -> None:
        _, text = self._items.pop(name, (0.0, b""))
        self._size -= len(text)
