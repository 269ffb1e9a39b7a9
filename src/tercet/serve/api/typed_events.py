"""Server-sent events that tell their type in the ``event`` line too: OpenAI's responses, Anthropic's messages.

An answer is a generator of such events. A stream sends them, and a request without one lets them pass and
takes the object that they have built.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

Events = AsyncGenerator[list[dict[str, Any]], None]  # those of one step together


def encode(events: Sequence[Mapping[str, Any]]) -> bytes:
    """As they are sent."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        for event in events
    )


async def encoded(events: Events) -> AsyncGenerator[bytes, None]:
    """A stream's chunks, none of them empty."""
    async with aclosing(events):
        async for some in events:
            if some:
                yield encode(some)


async def to_the_end(events: Events) -> None:
    """Let them pass."""
    async with aclosing(events):
        async for _ in events:
            pass
