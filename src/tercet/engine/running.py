"""One request on its way: from its prompt to its completion, whoever computes the logits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Chunk
from tercet.engine.cache import PagedSequence
from tercet.engine.request import Completion, Delta, FinishReason, Request, TokenLogprob, Usage
from tercet.engine.sampling import Choice, History, next_token, report
from tercet.engine.speculative import NO_DRAFT, Ask, Draft, Pace
from tercet.engine.text import TextStream, TokenBytes

if TYPE_CHECKING:
    from tercet.engine.constraint import Matcher


class Running:
    """What one request has so far, and what its next logits make of it.

    tokens: prompt and output. The last of them, at least, is not fed yet.
    certain: tokens that the constraint says come next, in the output once their log-probabilities are
        known. Where nobody wants these, such tokens are in ``tokens`` at once.
    draft: tokens that may come next; a draft was ``asked`` for when there were that many tokens.
    turn: when it was last fed.
    """

    def __init__(
        self,
        handle: int,
        request: Request,
        limit: int,
        stop_ids: frozenset[int],
        bytes_of: TokenBytes,
        pages: PagedSequence,
        matcher: Matcher | None = None,
    ) -> None:
        self.handle, self.pages, self.sampling = handle, pages, request.sampling
        self.limit = limit  # tokens to generate at most
        self.tokens = list(request.tokens)
        self.prompt_length = len(request.tokens)
        self.certain: list[int] = []
        self.draft, self.pace, self.asked = NO_DRAFT, Pace(), 0
        self.turn = 0
        self.finish_reason: FinishReason | None = None
        self._matcher, self._bytes_of = matcher, bytes_of
        # Under a constraint a stop token comes only where nothing else may follow, or as the model's choice.
        ends = matcher is not None or not request.sampling.ignore_eos
        self._stop_ids = stop_ids if ends else frozenset()
        self._text, self._piece = "", ""
        self._logprobs: list[TokenLogprob] = []
        self._sent = 0  # tokens in deltas so far
        self._drafted = self._accepted = 0
        self._cached = 0  # tokens of the prompt that were there when it first ran
        self._started: float | None = None
        self._begun = False

    @property
    def generated(self) -> int:
        """Tokens of output."""
        return len(self.tokens) - self.prompt_length

    @property
    def ahead(self) -> list[int]:
        """Tokens to be fed behind ``tokens``, before it is clear that they come."""
        return self.certain or self.draft.tokens

    @property
    def drawn(self) -> bool:
        """Whether those ahead were drawn, so that taking fewer of them would change what comes out."""
        return not self.certain and self.draft.distributions is not None

    def begin(self) -> None:
        """Before the first feed; a constraint may have tokens to begin with, or even all of them."""
        if self._begun:
            return
        self._begun = True
        self._rng = np.random.default_rng(self.sampling.seed)
        self._history = History(self.tokens)
        self._stream = TextStream(self.sampling.stop)
        # The output continues the prompt's text: it begins one only if the prompt has none.
        self._first = not self._bytes_of.visible(self.tokens)
        self._force()

    def join(self) -> None:
        """It runs now; the clock does from the first time on."""
        if self._started is None:
            self._started, self._cached = time.perf_counter(), self.pages.computed

    @property
    def missing(self) -> int:
        """Tokens of prompt and output that are not fed yet."""
        return len(self.tokens) - self.pages.computed

    def chunk(self, count: int, ahead: int) -> Chunk:
        """The next ``count`` tokens that are missing; if these are all, with ``ahead`` of those ahead."""
        pages = self.pages
        tokens, wanted = self.tokens[pages.computed : pages.computed + count], range(0)
        if count == self.missing:
            wanted = range(count - 1, count + ahead)
            tokens += self.ahead[:ahead]
        return Chunk(pages.number, tokens, pages.computed, pages.pages, wanted, pages.adapter)

    def guess(self, draft: Draft) -> None:
        """Check this draft with the next feed, as far as the constraint allows it."""
        if self._matcher is not None:
            valid = self._matcher.valid(draft.tokens)
            drawn = draft.distributions
            draft = Draft(draft.tokens[:valid], None if drawn is None else drawn[:valid])
        self.draft = draft

    def ask(self, count: int) -> Ask:
        """The wish for a draft of ``count`` tokens at most."""
        return Ask(self.handle, self.tokens, count, self.sampling, self._rng)

    def take(self, logits: NDArray[np.float32]) -> int:
        """Go on with the logits after the last of ``tokens`` and after each of those fed ahead.

        Returns how many of those fed ahead have come. Raises UserError when the request can't go on.
        """
        ahead = self.ahead[: len(logits) - 1]
        drafted, self.draft = NO_DRAFT if self.certain else self.draft, NO_DRAFT
        before = len(self.tokens)
        come = 0
        while come < len(logits):
            self._next(logits[come], drafted, come)
            # One row may have brought several tokens, where the constraint left no choice.
            new = self.tokens[before:]
            same = next((n for n, (a, b) in enumerate(zip(new, ahead, strict=False)) if a != b), None)
            come = min(len(new), len(ahead)) if same is None else same
            if self.finish_reason or come < len(new):
                break
        if drafted.tokens and ahead:
            self.pace.note(len(ahead), come)
            self._drafted += len(ahead)
            self._accepted += come
        return come

    def _next(self, logits: NDArray[np.float32], drafted: Draft, place: int) -> None:
        """The token that these logits lead to, and those that must follow it."""
        if self.certain:
            self._append(report(logits, self.certain.pop(0), self.sampling))
        else:
            guess = None
            if drafted.distributions is not None and place < len(drafted.tokens):
                guess = drafted.tokens[place], drafted.distributions[place]
            allowed = None if self._matcher is None else self._matcher.mask()
            self._append(next_token(logits, self.sampling, self._history, self._rng, allowed, guess))
        if not self.certain:
            self._force()

    def _force(self) -> None:
        """Ask the constraint whether the output has ended, or what must come now."""
        matcher = self._matcher
        while matcher is not None and not self.finish_reason:
            if matcher.ended:
                self._end("stop")
                return
            forced = matcher.forced()
            if not forced:
                return
            if self.sampling.logprobs is not None:
                self.certain = list(forced)
                return
            for token in forced:
                if not self.finish_reason:
                    self._append(Choice(token, None, []))

    def _append(self, choice: Choice) -> None:
        token = choice.token
        self.tokens.append(token)
        self._history.output[token] += 1
        stop = token in self._stop_ids
        data = b"" if stop else self._bytes_of(token, first=self._first)
        if self.sampling.logprobs is not None:
            self._logprobs.append(self._logprob(choice, data))
        self._first = self._first and not self._bytes_of.visible([token])
        self._piece += self._stream.push(data)
        if self._matcher is not None and not stop:
            self._matcher.accept(token)
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif stop:
            self._end("stop")
        elif self.generated == self.limit:
            whole = self._matcher is not None and self._matcher.ended
            self._end("stop" if whole else "length")

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._piece += self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"

    def _logprob(self, choice: Choice, data: bytes) -> TokenLogprob:
        def text(token: int) -> str:
            return self._bytes_of.text(token, first=self._first)

        assert choice.logprob is not None
        top = [(token, text(token), logprob) for token, logprob in choice.top]
        return TokenLogprob(choice.token, text(choice.token), choice.logprob, data, top, choice.entropy)

    def delta(self) -> Delta | None:
        """What is new since the last one, if there is text to show or nothing more to come."""
        if not self._piece and not self.finish_reason:
            return None
        piece, self._piece = self._piece, ""
        self._text += piece
        begin, self._sent = self._sent, self.generated
        wanted = self.sampling.logprobs is not None
        completion = None
        if self.finish_reason:
            completion = Completion(
                self._text,
                self.tokens[self.prompt_length :],
                self._logprobs if wanted else None,
                Usage(self.prompt_length, self.generated, cached_tokens=self._cached),
                self.finish_reason,
                0.0 if self._started is None else time.perf_counter() - self._started,
                drafted=self._drafted,
                accepted=self._accepted,
            )
        tokens = self.tokens[self.prompt_length + begin :]
        return Delta(self.handle, piece, tokens, self._logprobs[begin:] if wanted else None, completion)
