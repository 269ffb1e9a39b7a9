"""Read answers in OpenAI's protocol. Servers omit fields, so each of them is looked up with care.

Protocol: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import Any

from tercet.engine.request import FinishReason, Score, TokenLogprob, Usage
from tercet.errors import UserError
from tercet.prompt.errors import HostedError


def reason_in(body: object) -> str | None:
    """Return the reason in a body of JSON that reports an error; None where it reports none.

    Some servers send errors with status 200. The reason stands in ``error`` (an object with ``message``, or a
    string), or in ``detail`` or ``message`` where the body has no answer.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error.get("type") or "an error without a message"
    if not error and not any(name in body for name in ("choices", "data", "output", "content")):
        error = body.get("detail") or body.get("message")
    return str(error) if error else None


def choices_of(answer: Any) -> list[Any]:
    """Return the choices of an answer or of a chunk of a stream."""
    return list(getattr(answer, "choices", None) or [])


def text_of(message: Any, model: str) -> str:
    """Return the text of a message or of a delta; a refusal is text too.

    Raises:
        HostedError: the content is not text.
    """
    text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
    if not isinstance(text, str):
        raise HostedError(f"{model}: the answer's content is a {type(text).__name__}, not text")
    return text


def finish_reason_of(reason: str, model: str) -> FinishReason:
    """Return why an answer ended. HostedError where a content filter stopped it."""
    if reason == "content_filter":
        raise HostedError(f"{model}: the server's content filter stopped the answer")
    return "length" if reason in ("length", "max_tokens", "model_length") else "stop"


def usage_of(reported: Any) -> Usage:
    """Return the usage that the server counted; zeros where it reports none (a prompt is never 0 tokens)."""
    prompt, completion = (
        getattr(reported, "prompt_tokens", None),
        getattr(reported, "completion_tokens", None),
    )
    return Usage(prompt if isinstance(prompt, int) else 0, completion if isinstance(completion, int) else 0)


def logprobs_of(choice: Any) -> list[TokenLogprob]:
    """Return a choice's log-probabilities. The protocol has no token ids, so they are -1."""
    entries = getattr(getattr(choice, "logprobs", None), "content", None) or []
    return [
        TokenLogprob(
            token_id=-1,
            token=entry.token,
            logprob=entry.logprob,
            bytes=bytes(getattr(entry, "bytes", None) or entry.token.encode("utf-8", "replace")),
            top=[
                (-1, candidate.token, candidate.logprob)
                for candidate in getattr(entry, "top_logprobs", None) or []
            ],
        )
        for entry in entries
    ]


def echoed_score(answer: Any, prompt: str, whole: str) -> Score | None:
    """Return the score of what follows ``prompt`` in ``whole``, from an answer that echoes ``whole``.

    None where the server did not echo it.

    Raises:
        UserError: the first token of the text is to be scored, which has no probability.
    """
    choice = answer.choices[0]
    echo = choice.logprobs
    if not choice.text.startswith(whole) or not echo or not echo.token_logprobs or not echo.text_offset:
        return None
    starts, values, best = echo.text_offset, echo.token_logprobs, echo.top_logprobs
    ends = [*starts[1:], len(choice.text)]
    # A token that crosses the boundary belongs to the continuation, as in the local engine.
    # The first tokens of a character begin where it does, and end there too.
    inside = [
        i
        for i, start in enumerate(starts)
        if start < len(whole) and (ends[i] > len(prompt) or (start >= len(prompt) and values[i] is not None))
    ]
    if any(values[i] is None for i in inside):
        raise UserError("the first token of a text has no probability; score needs a prompt before it")
    greedy = bool(best) and all(best[i] and values[i] >= max(best[i].values()) for i in inside)
    picked = [float(values[i]) for i in inside]
    return Score(logprob=sum(picked), token_logprobs=picked, tokens=[], is_greedy=greedy)
