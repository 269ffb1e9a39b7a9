"""Tokens as the store keeps them for an answer."""

from __future__ import annotations


def token(number: int, text: str) -> dict[str, object]:
    return {
        "id": number, "text": text, "bytes": text.encode().hex(), "logprob": -0.5, "top": [[number, text, -0.5]],
        "entropy": 0.7,
    }  # fmt: skip
