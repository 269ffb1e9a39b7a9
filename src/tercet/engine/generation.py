"""One request from its prompt to its completion, independent of how its logits are computed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tercet.engine.backend import Chunk
from tercet.engine.cache import PagedSequence
from tercet.engine.request import Completion, Delta, FinishReason, Request, TokenLogprob, Usage
from tercet.engine.sampling import Choice, History, next_token, report
from tercet.engine.speculative import NO_DRAFT, Draft, DraftRequest, Pace
from tercet.engine.text import TextStream, TokenBytes

if TYPE_CHECKING:
    from tercet.engine.constraint import Matcher


class Generation:
    """The tokens and the text of one request so far, and how new logits extend them.

    Attributes:
        handle: identifies the request in the engine; lower for requests that came earlier.
        limit: the largest number of tokens to generate.
        tokens: prompt and output. At least the last of them is not fed yet.
        forced: tokens that the constraint requires next. They join ``tokens`` when their
            log-probabilities are known, or at once where the request has no use for these.
        draft: tokens that may come next, to be checked by the next feed.
        drafted_at: the number of tokens when a draft was last requested.
        last_turn: the engine's turn in which the request was last fed.
        finish_reason: why the output ended; None while it has not.
        error: why the request failed; None while it has not.
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
        self.limit = limit
        self.tokens = list(request.tokens)
        self.prompt_length = len(request.tokens)
        self.forced: list[int] = []
        self.draft, self.pace, self.drafted_at = NO_DRAFT, Pace(), 0
        self.last_turn = 0
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self._matcher, self._bytes_of = matcher, bytes_of
        # Under a constraint a stop token comes only where nothing else may follow, or as the model's choice.
        stops = matcher is not None or not request.sampling.ignore_eos
        self._stop_ids = stop_ids if stops else frozenset()
        self._text, self._piece = "", ""  # delivered text, and text that is not delivered yet
        self._logprobs: list[TokenLogprob] = []
        self._sent = 0  # tokens delivered in deltas
        self._drafted = self._accepted = 0
        self._cached = 0  # tokens of the prompt that were computed before the request first ran
        self._started: float | None = None
        self._prepared = False

    @property
    def generated(self) -> int:
        """The number of tokens of the output."""
        return len(self.tokens) - self.prompt_length

    @property
    def uncomputed(self) -> int:
        """The number of tokens of prompt and output that are not fed yet."""
        return len(self.tokens) - self.pages.computed

    @property
    def lookahead(self) -> list[int]:
        """Tokens to be fed behind ``tokens`` before they are part of the output: forced or drafted ones."""
        return self.forced or self.draft.tokens

    @property
    def lookahead_is_sampled(self) -> bool:
        """Whether the lookahead was sampled, so that feeding less of it would change the output."""
        return not self.forced and self.draft.distributions is not None

    @property
    def ended(self) -> bool:
        """Whether the request has finished or failed."""
        return self.finish_reason is not None or self.error is not None

    # Before a feed

    def prepare(self) -> None:
        """Prepare for the first feed. A constraint may require the first tokens, or even all of them."""
        if self._prepared:
            return
        self._prepared = True
        self._rng = np.random.default_rng(self.sampling.seed)
        self._history = History(self.tokens)
        self._stream = TextStream(self.sampling.stop)
        # The output continues the prompt's text: it begins a text only if the prompt has no visible token.
        self._first = not self._bytes_of.visible(self.tokens)
        self._force()

    def start_clock(self) -> None:
        """Note the time when the request first runs, and how much of its prompt was computed already."""
        if self._started is None:
            self._started, self._cached = time.perf_counter(), self.pages.computed

    def draft_request(self, count: int) -> DraftRequest:
        """Return the request for a draft of at most ``count`` tokens."""
        return DraftRequest(self.handle, self.tokens, count, self.sampling, self._rng)

    def set_draft(self, draft: Draft) -> None:
        """Have the next feed check this draft, as far as the constraint allows its tokens."""
        if self._matcher is not None:
            valid = self._matcher.valid(draft.tokens)
            distributions = draft.distributions
            draft = Draft(draft.tokens[:valid], None if distributions is None else distributions[:valid])
        self.draft = draft

    def chunk(self, count: int, lookahead: int) -> Chunk:
        """Return the next ``count`` uncomputed tokens as a chunk.

        If these are all uncomputed tokens, ``lookahead`` tokens of the lookahead follow them, and the
        logits after the last token and after each token of the lookahead are requested.
        """
        pages = self.pages
        tokens, outputs = self.tokens[pages.computed : pages.computed + count], range(0)
        if count == self.uncomputed:
            outputs = range(count - 1, count + lookahead)
            tokens += self.lookahead[:lookahead]
        return Chunk(pages.number, tokens, pages.computed, pages.pages, outputs, pages.adapter)

    # After a feed

    def advance(self, logits: NDArray[np.float32]) -> int:
        """Extend the output by the logits [1 + n, V] after the last token and after n lookahead tokens.

        Returns:
            The number of lookahead tokens that are now part of the output.

        Raises:
            UserError: the logits are not finite, or the constraint allows no token.
        """
        lookahead = self.lookahead[: len(logits) - 1]
        draft, self.draft = NO_DRAFT if self.forced else self.draft, NO_DRAFT
        before = len(self.tokens)
        accepted = 0
        while accepted < len(logits):
            self._choose(logits[accepted], draft, accepted)
            # One row may add several tokens, where the constraint leaves no choice.
            new = self.tokens[before:]
            pairs = enumerate(zip(new, lookahead, strict=False))
            mismatch = next((place for place, (token, guess) in pairs if token != guess), None)
            accepted = min(len(new), len(lookahead)) if mismatch is None else mismatch
            if self.finish_reason or accepted < len(new):
                break
        if draft.tokens and lookahead:
            self.pace.note(len(lookahead), accepted)
            self._drafted += len(lookahead)
            self._accepted += accepted
        return accepted

    def _choose(self, logits: NDArray[np.float32], draft: Draft, place: int) -> None:
        """Append the token that these logits lead to, and the tokens that must follow it.

        ``place``: the index in ``draft`` of the token that these logits are about.
        """
        if self.forced:
            self._append(report(logits, self.forced.pop(0), self.sampling))
        else:
            guess = None
            if draft.distributions is not None and place < len(draft.tokens):
                guess = draft.tokens[place], draft.distributions[place]
            allowed = None if self._matcher is None else self._matcher.mask()
            self._append(next_token(logits, self.sampling, self._history, self._rng, allowed, guess))
        if not self.forced:
            self._force()

    def _force(self) -> None:
        """End the output where the constraint has ended; otherwise take the tokens that it requires."""
        matcher = self._matcher
        while matcher is not None and not self.finish_reason:
            if matcher.ended:
                self._finish("stop")
                return
            forced = matcher.forced()
            if not forced:
                return
            if self.sampling.logprobs is not None:
                self.forced = list(forced)
                return
            for token in forced:
                if not self.finish_reason:
                    self._append(Choice(token, None, []))

    def _append(self, choice: Choice) -> None:
        """Append a token to the output and to its text, and end the output where the token ends it."""
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
            self._finish("stop")
        elif self.generated == self.limit:
            complete = self._matcher is not None and self._matcher.ended
            self._finish("stop" if complete else "length")

    def _finish(self, reason: FinishReason) -> None:
        """End the output. Text that was held back is now certain, and may still complete a stop string."""
        self.finish_reason = reason
        self._piece += self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"

    def _logprob(self, choice: Choice, data: bytes) -> TokenLogprob:
        """Return the record of a token that adds ``data`` to the text."""

        def text(token: int) -> str:
            return self._bytes_of.text(token, first=self._first)

        assert choice.logprob is not None
        top = [(token, text(token), logprob) for token, logprob in choice.top]
        return TokenLogprob(choice.token, text(choice.token), choice.logprob, data, top, choice.entropy)

    # Results

    def delta(self) -> Delta | None:
        """Return what is new since the last delta; None when there is no text to show yet."""
        if self.error is not None:
            return Delta(self.handle, "", [], None, error=self.error)
        if not self._piece and not self.finish_reason:
            return None
        piece, self._piece = self._piece, ""
        self._text += piece
        begin, self._sent = self._sent, self.generated
        tokens = self.tokens[self.prompt_length + begin :]
        logprobs = None if self.sampling.logprobs is None else self._logprobs[begin:]
        completion = self._completion(self.finish_reason) if self.finish_reason else None
        return Delta(self.handle, piece, tokens, logprobs, completion)

    def _completion(self, finish_reason: FinishReason) -> Completion:
        """Return the whole output."""
        return Completion(
            self._text,
            self.tokens[self.prompt_length :],
            None if self.sampling.logprobs is None else self._logprobs,
            Usage(self.prompt_length, self.generated, cached_tokens=self._cached),
            finish_reason,
            0.0 if self._started is None else time.perf_counter() - self._started,
            drafted=self._drafted,
            accepted=self._accepted,
        )
