"""/v1/completions: continuations of texts, and log-probabilities of the prompts (``echo``)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from tercet.engine.engine import Engine
from tercet.engine.request import Completion, TokenLogprob, Usage
from tercet.engine.request import Request as EngineRequest
from tercet.serve.api.embeddings import parts
from tercet.serve.api.field_table import Ignored, Refused, Used, ignored_of
from tercet.serve.api.fields import SamplingBody, answer_limit, new_id, total_usage
from tercet.serve.api.hosted import pass_on
from tercet.serve.api.logprobs import Aligned, CompletionLogprobs, Placed, token_offsets
from tercet.serve.api.prompts import Prompts, encode_prompts, prompt_list
from tercet.serve.errors import invalid_value
from tercet.serve.models import Models, Served
from tercet.serve.streaming import DONE, STREAMED, comment, event, event_stream, while_connected
from tercet.serve.worker import Reading

router = APIRouter()

MAX_TOKENS = 16  # the default, as at OpenAI
MAX_PROMPTS = 1024
SCORE_TOKENS = 1024  # scored between two turns of the engine, so that streams continue meanwhile


class CompletionsBody(SamplingBody):
    """OpenAI's request."""

    prompt: Annotated[
        Prompts | None, Used("a string, a list of strings, a list of token ids, or a list of such lists")
    ] = None
    max_tokens: Annotated[
        Annotated[int, Field(ge=-1)] | None, Used("default 16; -1: up to the context; may be 0 with `echo`")
    ] = None
    best_of: Annotated[
        Annotated[int, Field(ge=1, le=20)] | None,
        Used("up to 20 answers, of which the `n` with the highest mean log-probability are returned"),
    ] = None
    echo: Annotated[bool | None, Used("the prompt before the answer; with `logprobs` it is scored")] = None
    logprobs: Annotated[Annotated[int, Field(ge=0, le=5)] | None, Used("0 to 5, as parallel arrays")] = None
    suffix: Annotated[
        str | None,
        Refused("models of this server only continue texts; they cannot insert text before it", ("",)),
    ] = None


@dataclass
class Prompt:
    """One prompt, and its parts in an echo.

    tokens: the prompt as the model reads it.
    text: the prompt as text.
    names: text and bytes of each token.
    offsets: where each token begins in ``text``.
    scores: log-probabilities of the tokens; None for the first.
    """

    tokens: list[int]
    text: str = ""
    names: list[tuple[str, bytes]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scores: list[TokenLogprob | None] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """One request, ready for the engine: ``drawn`` answers to each prompt, of which ``n`` are returned."""

    served: Served
    body: CompletionsBody
    prompts: list[Prompt]
    requests: list[EngineRequest]  # none where max_tokens is 0
    n: int
    drawn: int
    id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> int:
        """Number of tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


@router.post("/v1/completions", responses=STREAMED)
async def completions(request: Request, body: CompletionsBody) -> Response:
    """Return continuations of each prompt."""
    models: Models = request.app.state.models
    served = models.get(body.model)
    if served.hosted is not None:
        return await pass_on(request, served, "/completions", body)
    job = await prepare(served, body, ignored_of(request))
    if body.stream:
        reading = Reading()
        return await event_stream(request, _chunks(job, reading), reading=reading)
    return JSONResponse(await while_connected(request, _whole(job)))


# The request


async def prepare(served: Served, body: CompletionsBody, ignored: Ignored) -> Job:
    """Check the request and encode its prompts. APIError 400 for everything that is not supported.

    ignored: receives the fields that have no effect.
    """
    body.review(ignored)
    n = body.n or 1
    drawn = body.best_of or n
    if drawn < n:
        raise invalid_value("best_of", f"is {drawn}; it must be at least n, which is {n}")
    if drawn > n and body.stream:
        raise invalid_value(
            "best_of", "is more than n, so the best answers are known only at the end; leave out stream"
        )
    sources = prompt_list("" if body.prompt is None else body.prompt)
    if len(sources) > MAX_PROMPTS:
        raise invalid_value(
            "prompt", f"has {len(sources)} prompts; at most {MAX_PROMPTS} are accepted in one request"
        )
    encoded = await encode_prompts(served, sources, "prompt", begin=True)
    prompts = [Prompt(tokens) for tokens in encoded]
    if body.echo:
        for prompt, source in zip(prompts, sources, strict=True):
            _prepare_echo(served, prompt, source)
    return Job(served, body, prompts, _requests(served, body, prompts, drawn), n, drawn)


def _requests(
    served: Served, body: CompletionsBody, prompts: Sequence[Prompt], drawn: int
) -> list[EngineRequest]:
    max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not max_tokens:
        return []
    # The best of several answers is chosen by log-probability.
    logprobs = 0 if body.logprobs is None and drawn > (body.n or 1) else body.logprobs
    limit = served.worker.engine.max_waiting
    if len(prompts) * drawn > limit:
        raise invalid_value(
            "prompt", f"requires {len(prompts) * drawn} answers; this server accepts {limit} at once"
        )
    return [
        EngineRequest(
            tuple(prompt.tokens),
            body.sampling(
                served,
                answer_limit(served, prompt.tokens, None if max_tokens < 0 else max_tokens),
                logprobs,
                number,
            ),
            adapter=served.adapter,
        )
        for prompt in prompts
        for number in range(drawn)
    ]


def _prepare_echo(served: Served, prompt: Prompt, source: str | list[int]) -> None:
    """Set the prompt's text and the place of each token in it."""
    prompt.names = served.worker.engine.token_pieces(prompt.tokens)
    if isinstance(source, str):
        prompt.text = source
        tokens, spans = served.tokenizer.encode_with_offsets(source)
        if tokens == prompt.tokens:
            reached = 0
            for start, end in spans:
                prompt.offsets.append(max(start, reached if end == 0 else start))
                reached = max(reached, end)
            return
    text, prompt.offsets = token_offsets([data for _, data in prompt.names])
    prompt.text = source if isinstance(source, str) else text


async def _score(job: Job) -> None:
    """Set the log-probabilities of the prompts' tokens, if they are requested."""
    if not job.body.echo or job.body.logprobs is None:
        return
    top, served = job.body.logprobs, job.served
    scores: list[list[TokenLogprob | None]] = []
    for part in parts([prompt.tokens for prompt in job.prompts], SCORE_TOKENS):

        def read(engine: Engine, part: Sequence[list[int]] = part) -> list[list[TokenLogprob | None]]:
            return engine.prompt_logprobs(part, top, adapter=served.adapter)

        scores += await served.worker.run(read)
    for prompt, prompt_scores in zip(job.prompts, scores, strict=True):
        prompt.scores = prompt_scores
    if not job.requests and served.worker.meter is not None:
        served.worker.meter.read(served.adapter, job.usage)


# The answer


async def _whole(job: Job) -> dict[str, Any]:
    await _score(job)
    done = await job.served.worker.generate(job.requests) if job.requests else []
    choices = []
    for place, prompt in enumerate(job.prompts):
        answers: list[Completion | None] = [*done[place * job.drawn : (place + 1) * job.drawn]]
        if not job.requests:
            answers = [None] * job.n
        elif job.drawn > job.n:
            answers = sorted(answers, key=_mean_logprob, reverse=True)[: job.n]
        choices += [_choice(job, prompt, answer) for answer in answers]
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.served.name,
        "system_fingerprint": job.served.fingerprint,
        "choices": [{"index": index, **choice} for index, choice in enumerate(choices)],
        "usage": total_usage(job.usage, [completion.usage for completion in done], job.drawn),
    }


def _mean_logprob(answer: Completion | None) -> float:
    """Return the log-probability per token, by which OpenAI defines the best answer."""
    logprobs = answer.logprobs if answer is not None else None
    return sum(entry.logprob for entry in logprobs) / len(logprobs) if logprobs else 0.0


def _choice(job: Job, prompt: Prompt, answer: Completion | None) -> dict[str, Any]:
    echoed = _echo(job, prompt)
    text = "" if answer is None else answer.text
    logprobs = echoed.logprobs
    if logprobs is not None and answer is not None:
        tokens = Aligned(silent=True).push(answer.text, answer.logprobs or (), ended=True)
        _add(job, logprobs, tokens, len(echoed.text))
    return {
        "text": echoed.text + text,
        "logprobs": None if logprobs is None else logprobs.body(),
        "finish_reason": "length" if answer is None else answer.finish_reason,
    }


@dataclass(frozen=True)
class _Echo:
    text: str
    logprobs: CompletionLogprobs | None


def _echo(job: Job, prompt: Prompt) -> _Echo:
    """Return the text before the answer: the prompt if it is echoed, else nothing."""
    logprobs = None if job.body.logprobs is None else CompletionLogprobs.empty()
    if not job.body.echo:
        return _Echo("", logprobs)
    if logprobs is not None:
        tokenizer = job.served.tokenizer
        for score, (name, data), offset in zip(prompt.scores, prompt.names, prompt.offsets, strict=True):
            if score is None:
                logprobs.add_first(name, data, offset)
            else:
                logprobs.add_token(score, tokenizer, offset, job.body.logprobs)
    return _Echo(prompt.text, logprobs)


def _add(job: Job, logprobs: CompletionLogprobs, tokens: Sequence[Placed], begin: int) -> None:
    """Add the tokens of an answer that begins at ``begin`` of its choice's text."""
    for placed in tokens:
        logprobs.add_token(placed.token, job.served.tokenizer, begin + placed.start, job.body.logprobs)


async def _chunks(job: Job, reading: Reading) -> AsyncGenerator[bytes, None]:
    await _score(job)
    echoed = [_echo(job, prompt) for prompt in job.prompts for _ in range(job.n)]
    usage_chunk = job.body.usage_chunk
    usages: dict[int, Usage] = {}

    def chunk(index: int, text: str, logprobs: CompletionLogprobs | None, reason: str | None) -> bytes:
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.body(),
            "finish_reason": reason,
        }
        return event(_chunk(job, [choice]) | ({"usage": None} if usage_chunk else {}))

    opening = b""
    if job.body.echo or not job.requests:
        reason = None if job.requests else "length"
        opening = b"".join(
            chunk(index, echo.text, echo.logprobs, reason) for index, echo in enumerate(echoed)
        )
    if not job.requests:
        yield opening
    else:
        aligned = [Aligned(silent=True) for _ in echoed]
        async with aclosing(job.served.worker.stream(job.requests, reading)) as deltas:
            async for delta in deltas:
                if not delta.tokens and delta.completion is None:  # the requests are queued
                    yield opening or comment("the request is queued")
                    opening = b""
                    continue
                ended = delta.completion is not None
                logprobs = None
                if job.body.logprobs is not None:
                    tokens = aligned[delta.index].push(delta.text, delta.logprobs or (), ended)
                    logprobs = CompletionLogprobs.empty()
                    _add(job, logprobs, tokens, len(echoed[delta.index].text))
                reason = None
                if delta.completion is not None:
                    reason = delta.completion.finish_reason
                    usages[delta.index] = delta.completion.usage
                yield opening + chunk(delta.index, delta.text, logprobs, reason)
                opening = b""
    last = b""
    if usage_chunk:
        every = [usages[index] for index in sorted(usages)]
        last = event(_chunk(job, []) | {"usage": total_usage(job.usage, every, job.drawn)})
    yield last + DONE


def _chunk(job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.served.name,
        "system_fingerprint": job.served.fingerprint,
        "choices": choices,
    }
