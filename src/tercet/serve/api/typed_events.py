"""Server-sent events with their type in the ``event`` line: OpenAI's responses, Anthropic's messages.

An answer is a generator of such events. A stream sends them; a request without a stream discards them and
returns the object that they have built.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

Events = AsyncGenerator[list[dict[str, Any]], None]  # the events of one step together


def encode(events: Sequence[Mapping[str, Any]]) -> bytes:
    """Encode events for sending."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        for event in events
    )


async def encoded(events: Events) -> AsyncGenerator[bytes, None]:
    """Yield a stream's chunks, none of them empty."""
    async with aclosing(events):
        async for step in events:
            if step:
                yield encode(step)


async def discard(events: Events) -> None:
    """Discard all events; the object that they build is complete afterwards."""
    async with aclosing(events):
        async for _ in events:
            pass
