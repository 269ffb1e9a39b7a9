"""The engine: many requests in, their tokens and texts out, in batches of changing members.

A request goes from waiting to running to finished and never back. Each turn of the loop either
lets waiting requests join (their prompts are fed in one batch) or gives every running one its next
token; who has finished leaves at once. What a request gets does not depend on its neighbours: rows
never see each other, and each request draws from a generator of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Backend
from tercet.engine.prefix import SharedPrefix
from tercet.engine.request import Completion, Delta, FinishReason, Request, Score, TokenLogprob, Usage
from tercet.engine.sampling import Choice, History, next_token
from tercet.engine.scoring import FORWARD_TOKENS, Continuation, evaluate
from tercet.engine.text import TextStream, TokenBytes
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer


class _Running:
    """One request on its way."""

    def __init__(self, index: int, request: Request, limit: int, bytes_of: TokenBytes) -> None:
        self.index, self.prompt, self.sampling = index, request.tokens, request.sampling
        self.limit = limit  # tokens to generate at most
        self.bytes_of = bytes_of
        self.rng = np.random.default_rng(request.sampling.seed)
        self.history = History(request.tokens)
        self.stream = TextStream(request.sampling.stop)
        # The output continues the prompt's text: it begins one only if the prompt has none.
        self.first = not bytes_of.visible(request.tokens)
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.sent = 0  # tokens in deltas so far
        self.started = time.perf_counter()
        self.finish_reason: FinishReason | None = None

    @property
    def capacity(self) -> int:
        """Slots needed: the last token is never fed."""
        return len(self.prompt) + self.limit - 1

    def advance(self, logits: NDArray[np.float32], stop_ids: frozenset[int]) -> Delta | None:
        """Take the next token; the delta it gives, if there is text to show or nothing more to come."""
        choice = next_token(logits, self.sampling, self.history, self.rng)
        token = choice.token
        self.tokens.append(token)
        self.history.output[token] += 1
        stop = token in stop_ids and not self.sampling.ignore_eos
        data = b"" if stop else self.bytes_of(token, first=self.first)
        if self.sampling.logprobs is not None:
            self.logprobs.append(self._logprob(choice, data))
        self.first = self.first and not self.bytes_of.visible([token])
        piece = self.stream.push(data)
        if stop or len(self.tokens) == self.limit:
            piece += self.stream.finish()
            self.finish_reason = "stop" if stop else "length"
        if self.stream.stopped:
            self.finish_reason = "stop"
        self.text += piece
        return self._delta(piece) if piece or self.finish_reason else None

    def _logprob(self, choice: Choice, data: bytes) -> TokenLogprob:
        def text(token: int) -> str:
            return self.bytes_of.text(token, first=self.first)

        assert choice.logprob is not None
        top = [(token, text(token), logprob) for token, logprob in choice.top]
        return TokenLogprob(choice.token, text(choice.token), choice.logprob, data, top)

    def _delta(self, piece: str) -> Delta:
        wanted = self.sampling.logprobs is not None
        completion = None
        if self.finish_reason:
            usage = Usage(len(self.prompt), len(self.tokens))
            seconds = time.perf_counter() - self.started
            logprobs = self.logprobs if wanted else None
            completion = Completion(self.text, self.tokens, logprobs, usage, self.finish_reason, seconds)
        sent, self.sent = self.sent, len(self.tokens)
        return Delta(
            self.index, piece, self.tokens[sent:], self.logprobs[sent:] if wanted else None, completion
        )


class Engine:
    """Generates from and scores with one model. Not for several threads at once.

    stop_ids: tokens that end an output (end of text, end of turn).
    max_batch: requests that run at the same time at most; the backend's memory may allow fewer.
    """

    def __init__(
        self, backend: Backend[Any], tokenizer: Tokenizer, stop_ids: Sequence[int], max_batch: int = 64
    ) -> None:
        self.backend, self.tokenizer, self.max_batch = backend, tokenizer, max_batch
        self.stop_ids = frozenset(stop_ids)
        self._bytes_of = TokenBytes(tokenizer)

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and output together that the model takes."""
        return self.backend.max_positions

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All requests to their end; completions in the order of the requests.

        ``seconds`` of a completion count from when its request joined the batch.

        Raises:
            UserError: a prompt is empty, too long, or has tokens that the model doesn't know.
        """
        done = {delta.index: delta.completion for delta in self.stream(requests) if delta.completion}
        return [done[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """The same, piece by piece as text comes. Closing the iterator cancels what still runs."""
        for index, request in enumerate(requests):
            self._check(request.tokens, "the prompt" if len(requests) == 1 else f"prompt {index + 1}")
        return self._run(requests)

    def _check(self, tokens: Sequence[int], what: str) -> None:
        if not tokens:
            raise UserError(f"{what} is empty (0 tokens); a model needs at least one to go on from")
        if len(tokens) > self.max_positions:
            raise UserError(f"{what} has {len(tokens)} tokens; the model takes at most {self.max_positions}")
        if min(tokens) < 0 or max(tokens) >= self.backend.vocab_size:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise UserError(
                f"{what} has token {wrong}, and the model knows 0 to {self.backend.vocab_size - 1}; "
                "tokenizer and model don't belong together"
            )

    def _run(self, requests: Sequence[Request]) -> Iterator[Delta]:
        # Shortest first: prompts that join together are of similar length.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].tokens))
        waiting = deque((index, requests[index]) for index in order)
        prefix = SharedPrefix(self.backend, [list(request.tokens[:-1]) for request in requests])
        state: Any = None
        running: list[_Running] = []
        while waiting or running:
            joining = self._admit(waiting, running, prefix.length)
            if joining:
                taking, capacity = joining, max(one.capacity for one in joining)
                fed = prefix.rows(len(joining), capacity)
                tokens = [one.prompt[prefix.length :] for one in joining]
                logits = self.backend.next_logits(fed, tokens, [prefix.length] * len(joining))
            else:
                taking, fed = running, state
                starts = [len(one.prompt) + len(one.tokens) - 1 for one in running]
                logits = self.backend.next_logits(state, [one.tokens[-1:] for one in running], starts)
            for one, row in zip(taking, logits, strict=True):
                delta = one.advance(row, self.stop_ids)
                if delta:
                    yield delta
            stay = [row for row, one in enumerate(taking) if not one.finish_reason]
            parts = [(fed, stay)] if stay else []
            if joining and running:
                parts.insert(0, (state, list(range(len(running)))))
            before = running if joining else []
            running = before + [taking[row] for row in stay]
            if len(parts) == 1 and len(stay) == len(taking):
                state = fed
            elif running:
                state = self.backend.gather(parts, max(one.capacity for one in running))

    def _admit(
        self, waiting: deque[tuple[int, Request]], running: list[_Running], prefix: int
    ) -> list[_Running]:
        """Who joins now: as many as fit the batch, the cache and one feed; one at least if none runs."""
        joining: list[_Running] = []
        capacity = max((one.capacity for one in running), default=0)
        if len(running) > self.max_batch * 3 // 4:
            return joining  # every change of the batch copies its cache; wait until several can join
        while waiting:
            index, request = waiting[0]
            # The last token need not be fed, so it may lie one beyond the model's positions.
            limit = min(request.sampling.max_tokens, self.max_positions - len(request.tokens) + 1)
            rows = len(running) + len(joining) + 1
            capacity = max(capacity, len(request.tokens) + limit - 1)
            fed = (len(joining) + 1) * (len(request.tokens) - prefix)
            full = rows > self.max_batch or rows * capacity > self.backend.cache_tokens
            if (full and rows > 1) or (joining and fed > FORWARD_TOKENS):
                break
            waiting.popleft()
            joining.append(_Running(index, request, limit, self._bytes_of))
        return joining

    def score(self, pairs: Sequence[tuple[str, str]], special: bool = True) -> list[Score]:
        """The log-probability of each (prompt, continuation).

        Both are encoded together, as the model would have read them; a token that crosses the
        boundary belongs to the continuation. After an empty prompt the first token is conditioned
        on the tokenizer's BOS, or on its EOS where it has none (as lm-eval does).

        special: whether encoding adds special tokens (BOS); False for a text that has them already,
            such as a rendered conversation.

        Raises:
            UserError: a continuation is empty, or prompt and continuation are too long.
        """
        pieces = [
            self._encode(number, prompt, continuation, special)
            for number, (prompt, continuation) in enumerate(pairs)
        ]
        evaluate(self.backend, pieces)
        return [
            Score(sum(one.logprobs), one.logprobs, one.tokens[one.begin :], one.is_greedy) for one in pieces
        ]

    def choose(
        self,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        end: bool = False,
        special: bool = True,
    ) -> list[list[float]]:
        """The total log-probability of each of ``choices[i]`` after ``prompts[i]``, encoded as in `score`.

        What the choices of a prompt share, and what all prompts of the call share (a few-shot
        header), is computed once.

        end: whether the tokenizer's EOS counts as part of every choice: a model that was tuned to
            answer with a choice and end.

        Raises:
            UserError: a choice is empty, a prompt is too long, or ``end`` without an EOS.
        """
        if len(prompts) != len(choices):
            raise UserError(f"{len(prompts)} prompts with {len(choices)} lists of choices; give one a prompt")
        pieces = [
            [self._encode(number, prompt, choice, special, end) for choice in choices[number]]
            for number, prompt in enumerate(prompts)
        ]
        evaluate(self.backend, [one for group in pieces for one in group])
        return [[sum(one.logprobs) for one in group] for group in pieces]

    def _encode(
        self, group: int, prompt: str, continuation: str, special: bool, end: bool = False
    ) -> Continuation:
        tokens, offsets = self.tokenizer.encode_with_offsets(prompt + continuation, special=special)
        begin = len(tokens)
        while begin > 1 and offsets[begin - 1] == (0, 0):
            begin -= 1  # a token that encoding adds at the end is no part of the continuation
        tokens = list(tokens[:begin])
        while begin and offsets[begin - 1][1] > len(prompt):
            begin -= 1
        if end:
            if self.tokenizer.eos_id is None:
                raise UserError(
                    "the tokenizer has no end-of-text token to count with every choice; use end=False"
                )
            tokens.append(self.tokenizer.eos_id)
        if begin == len(tokens) or not continuation:
            raise UserError(f"the continuation {continuation!r} is empty; there is nothing to score")
        if begin == 0:
            before = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
            if before is None:
                raise UserError(
                    "the prompt is empty, and the tokenizer has neither a BOS nor an EOS token to condition on"
                )
            tokens, begin = [before, *tokens], 1
        # The last token is scored, not fed.
        self._check(tokens[:-1], "the prompt with its continuation")
        self._check(tokens[-1:], "the continuation")
        return Continuation(group, tokens, begin)
