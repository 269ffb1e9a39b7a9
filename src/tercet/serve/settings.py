"""How a server is run: what `tercet serve` was told, beside the models."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    keys: SHA-256 of each API key that is accepted; none: no key is asked for.
    allowed_hosts: names by which clients may call this server, beside loopback ones and IP addresses.
    allowed_origins: web pages of other origins that may call it; "*" for all.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body: int = 8 << 20  # bytes of a request: a million words of prompt
    max_requests: int = 2048  # that are being read or answered; more get 429 at once
    request_timeout: float = 600.0  # seconds for one answer, waiting included
    read_timeout: float = 30.0  # seconds for a client to send its headers, and again for its body
    drain_timeout: float = 60.0  # seconds that a shutdown waits for what runs


def hash_key(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
