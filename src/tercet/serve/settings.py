"""Settings of a server, other than its models."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    host: address to listen on.
    port: port to listen on.
    keys: SHA-256 of each accepted API key; none: no key is required.
    allowed_hosts: names by which clients may call this server, beside loopback names and IP addresses.
    allowed_origins: origins of other web pages that may call it; "*" for all.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body: int = 8 << 20  # bytes of a request: a million words of prompt
    max_requests: int = 2048  # being read or answered at the same time; more get 429 at once
    request_timeout: float = 600.0  # seconds for one answer, including the time in the queue
    read_timeout: float = 30.0  # seconds for a client to send its headers, and again for its body
    drain_timeout: float = 60.0  # seconds that a shutdown waits for running requests


def hash_key(key: str) -> bytes:
    """Return the SHA-256 of an API key, which is all the server stores of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
