"""Answers being written for the page: from the model to the store and to everyone who watches.

An answer belongs to the server, not to the tab that asked for it. It goes on when the tab is closed,
and a tab that comes (again) gets what there is and then the rest. It ends when the model ends it, when
somebody stops it, or with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tercet.engine.request import Completion, Request, TokenLogprob
from tercet.engine.text import TextStream, TokenBytes
from tercet.errors import UserError
from tercet.prompt.settings import call_settings
from tercet.serve.errors import APIError
from tercet.serve.web.asking import Plan
from tercet.serve.web.records import Json
from tercet.serve.web.render import BlockStream
from tercet.serve.web.store import Store

if TYPE_CHECKING:
    from tercet.engine.request import Delta

log = logging.getLogger(__name__)

SHOW_SECONDS = 0.04  # between two looks at an answer: an eye sees no more
RENDER_SHARE = 10  # rendering takes at most one part in so many of the time
WRITE_SECONDS = 0.5  # of an answer that may be lost when the process is killed
BACKLOG = 2000  # events that wait for a slow tab; one that is behind further comes anew


class Answer:
    """One answer on its way.

    text, tokens: what has come so far; a token is a dict as in `tercet.serve.web.records.Details`.
    blocks: the text's HTML in a conversation; a text that is continued is shown as it is.
    """

    def __init__(self, name: str, plan: Plan) -> None:
        self.id, self.plan = name, plan
        self.text, self.tokens = "", list[Json]()
        self.blocks = BlockStream() if plan.kind == "chat" else None
        self.stopped = False  # by the user
        self.completion: Completion | None = None
        self.began = time.monotonic()
        self.first_seconds: float | None = None
        self.reading: asyncio.Task[str] | None = None  # from the model; how it ended
        self.task: asyncio.Task[None] | None = None  # waits for that and stores the end
        self.writing: asyncio.Task[None] | None = None
        self._bytes_of = TokenBytes(plan.served.tokenizer) if plan.served.local else None
        self._stream = TextStream(plan.sampling.stop)
        self._visible = False  # whether any token so far adds to the text
        self._shown_text = self._shown_tokens = self._shown_blocks = 0
        self._kept_text = self._kept_tokens = 0
        for token in plan.prefix:
            self._push(token)
        if self.met_stop:
            raise UserError("the answer ended there with a stop string; go on from an earlier token")

    @property
    def met_stop(self) -> bool:
        """Whether a stop string has come. One that begins in the prefix is unknown to the engine."""
        return self._stream.stopped

    def _push(self, token: Json) -> None:
        data = bytes.fromhex(token["bytes"])
        self._visible = self._visible or bool(data)
        self.tokens.append(token)
        self.text += self._stream.push(data)

    def take(self, logprobs: list[TokenLogprob]) -> None:
        """Tokens that have come from a model here."""
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self.began
        assert self._bytes_of is not None
        for one in logprobs:
            # The engine counts an answer's first token as the beginning of a text and drops the space it
            # may begin with; after a prefix the space is wanted.
            first = not self._visible
            special = one.token_id in self.plan.stop_ids
            data = b"" if special else self._bytes_of(one.token_id, first=first)
            top = [[other, self._bytes_of.text(other, first=first), logprob] for other, _, logprob in one.top]
            text = self._bytes_of.text(one.token_id, first=first)
            token = {
                "id": one.token_id,
                "text": text,
                "bytes": data.hex(),
                "logprob": one.logprob,
                "top": top,
            }
            self._push(token | {"entropy": one.entropy})

    def take_text(self, piece: str) -> None:
        """Text that has come from a model somewhere else."""
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self.began
        self.text += piece

    def end(self) -> None:
        """Nothing more comes: what was held back as the possible beginning of a stop string is text."""
        if self.plan.served.local:
            self.text += self._stream.finish()

    def snapshot(self) -> Json:
        """What a tab that comes needs to show: everything that others have been shown."""
        found: Json = {
            "id": self.id,
            "parent": self.plan.parent,
            "model": self.plan.served.name,
            "comparison": self.plan.comparison,
            "tokens": self.tokens[: self._shown_tokens],
            "seconds": time.monotonic() - self.began,
        }
        if self.blocks is None:
            return found | {"text": self.text[: self._shown_text]}
        return found | {"blocks": [*self.blocks.blocks]}

    def news(self, whole: bool = False) -> Json | None:
        """What has come since the last call, to be shown; None: nothing."""
        found: Json = {"type": "piece", "id": self.id, "tokens": self.tokens[self._shown_tokens :]}
        if self.blocks is None:
            found["text"] = self.text[self._shown_text :]
        else:
            keep = self.blocks.update(self.text, whole)
            found |= {"keep": keep, "blocks": self.blocks.blocks[keep:]}
        new = len(self.tokens) > self._shown_tokens or len(self.text) > self._shown_text or whole
        self._shown_tokens, self._shown_text = len(self.tokens), len(self.text)
        return found if new else None

    def unkept(self) -> tuple[str, list[Json]]:
        """What has come since the last call, to be stored."""
        text, tokens = self.text[self._kept_text :], self.tokens[self._kept_tokens :]
        self._kept_text, self._kept_tokens = len(self.text), len(self.tokens)
        return text, tokens


class Answers:
    """All answers on their way, and who watches. To be used from one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._answers: dict[str, Answer] = {}
        self._watchers: dict[str, set[asyncio.Queue[Json | None]]] = {}
        self._closed = False

    def of(self, conversation: str) -> list[Answer]:
        """The answers that are being written in a conversation."""
        return [one for one in self._answers.values() if one.plan.conversation == conversation]

    async def start(self, plan: Plan) -> Answer:
        """Begin to write an answer."""
        if self._closed:
            raise APIError(503, "the server is shutting down", "server_error")
        comparison = (plan.comparison["id"], plan.comparison["side"]) if plan.comparison else None
        name = await asyncio.to_thread(
            self._store.begin,
            plan.conversation,
            plan.parent,
            plan.served.name,
            plan.settings,
            plan.tokens,
            comparison,
        )
        try:
            answer = Answer(name, plan)
        except UserError:
            await asyncio.to_thread(self._store.finish, name, "error")
            raise
        answer.news()
        self._answers[name] = answer
        self._tell(plan.conversation, {"type": "started", "answer": answer.snapshot()})
        answer.reading = asyncio.create_task(self._read(answer))
        answer.task = asyncio.create_task(self._write(answer, answer.reading))
        return answer

    async def stop(self, conversation: str, name: str | None = None) -> int:
        """Stop an answer, or all of a conversation; how many. They are stored when this returns."""
        stopping = [one for one in self.of(conversation) if name in (None, one.id)]
        for answer in stopping:
            answer.stopped = True
        await self._cancel(stopping)
        return len(stopping)

    async def close(self) -> None:
        """Keep what there is of every answer, as interrupted, and send the watchers away."""
        self._closed = True
        for queues in self._watchers.values():
            for queue in queues:
                queue.put_nowait(None)
        await self._cancel(list(self._answers.values()))

    async def _cancel(self, answers: list[Answer]) -> None:
        """End the reading; what stores the answer is only waited for, so that who stops twice breaks nothing."""
        for answer in answers:
            if answer.reading is not None:
                answer.reading.cancel()
        tasks = [one.task for one in answers if one.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    # Who watches

    async def watch(self, conversation: str) -> AsyncIterator[Json]:
        """Events of a conversation: first the answers on their way, then everything that happens."""
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        queues = self._watchers.setdefault(conversation, set())
        queues.add(queue)
        try:
            if self._closed:
                return
            yield {"type": "here", "answers": [one.snapshot() for one in self.of(conversation)]}
            while (event := await queue.get()) is not None:
                yield event
        finally:
            queues.discard(queue)
            if not queues:
                self._watchers.pop(conversation, None)

    def changed(self, conversation: str) -> None:
        """Tell everyone who watches that the conversation is not what it was."""
        self._tell(conversation, {"type": "changed"})

    def _tell(self, conversation: str, event: Json) -> None:
        for queue in self._watchers.get(conversation, ()):
            # At its limit a queue gets its end, and then nothing more, however long its tab sleeps.
            if queue.qsize() <= BACKLOG:
                queue.put_nowait(event if queue.qsize() < BACKLOG else None)

    # How one is written

    async def _read(self, answer: Answer) -> str:
        if answer.plan.ended:
            return "stop"
        if answer.plan.served.local is not None:
            return await self._from_here(answer)
        return await self._from_elsewhere(answer)

    async def _write(self, answer: Answer, reading: asyncio.Task[str]) -> None:
        await asyncio.wait([reading])
        finish, error = "error", None
        try:
            finish = reading.result()
        except asyncio.CancelledError:
            finish = "stopped" if answer.stopped else "interrupted"
        except (UserError, APIError) as problem:
            error = str(problem)
        except Exception as problem:
            log.exception("an answer failed")
            error = f"the server failed ({type(problem).__name__}); its log tells more"
        answer.end()
        await self._finish(answer, finish, error)

    async def _finish(self, answer: Answer, finish: str, error: str | None) -> None:
        plan, completion = answer.plan, answer.completion
        news = answer.news(whole=True)
        if news is not None:
            self._tell(plan.conversation, news)
        usage = {"prompt_tokens": len(plan.tokens), "completion_tokens": len(answer.tokens)}
        if completion is not None and plan.served.local is None:
            usage = {
                "prompt_tokens": completion.usage.prompt_tokens,
                "completion_tokens": completion.usage.completion_tokens,
            }
        new = len(answer.tokens) - len(plan.prefix)
        seconds = time.monotonic() - answer.began
        event: Json = {"type": "ended", "id": answer.id, "error": error}
        try:
            if answer.writing is not None:
                await answer.writing
            await asyncio.to_thread(self._store.write, answer.id, *answer.unkept())
            message = await asyncio.to_thread(
                self._store.finish,
                answer.id,
                finish,
                usage=usage | {"new_tokens": new if plan.served.local else usage["completion_tokens"]},
                seconds=seconds,
                first_seconds=answer.first_seconds,
                error=error,
            )
            event["message"] = None if message is None else message.id
            two = plan.comparison
            if two and not any(
                one.plan.comparison and one.plan.comparison["id"] == two["id"]
                for one in self._answers.values()
                if one is not answer
            ):
                await asyncio.to_thread(self._store.settle, two["id"])
        except UserError as problem:
            event["error"] = f"the answer could not be stored: {problem}"
        except Exception:
            log.exception("an answer could not be stored")
            event["error"] = "the answer could not be stored; the server's log tells more"
        self._answers.pop(answer.id, None)
        self._tell(plan.conversation, event)

    async def _from_here(self, answer: Answer) -> str:
        plan = answer.plan
        assert plan.served.local is not None
        prompt = (*plan.tokens, *(token["id"] for token in plan.prefix))
        request = Request(prompt, plan.sampling, adapter=plan.served.adapter)
        deltas: AsyncIterator[Delta] = plan.served.local.stream([request])
        pace = _Pace(self, answer)
        async with contextlib.aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                answer.take(delta.logprobs or [])
                if delta.completion is not None:
                    answer.completion = delta.completion
                    return delta.completion.finish_reason
                if answer.met_stop:
                    return "stop"
                await pace.step()
        return "stop"

    async def _from_elsewhere(self, answer: Answer) -> str:
        """A hosted model's stream blocks, so a thread reads it."""
        plan, loop = answer.plan, asyncio.get_running_loop()
        hosted = plan.served.hosted
        assert hosted is not None
        stream = hosted.stream(plan.messages, call_settings(None, plan.fields))
        came: asyncio.Queue[str | Completion | Exception] = asyncio.Queue()
        left = threading.Event()

        def put(item: str | Completion | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(came.put_nowait, item)

        def read() -> None:
            try:
                with contextlib.closing(stream):
                    for piece in stream:
                        if left.is_set():
                            return
                        put(piece)
            except Exception as problem:
                put(problem)

        threading.Thread(target=read, name="hosted answer", daemon=True).start()
        pace = _Pace(self, answer)
        try:
            while True:
                item = await came.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Completion):
                    answer.completion = item
                    return item.finish_reason
                answer.take_text(item)
                await pace.step()
        finally:
            left.set()


class _Pace:
    """Shows and stores an answer now and then, not for every token."""

    def __init__(self, answers: Answers, answer: Answer) -> None:
        self._answers, self._answer = answers, answer
        self._show_at, self._write_at = 0.0, time.monotonic() + WRITE_SECONDS
        self._later: asyncio.TimerHandle | None = None

    async def step(self) -> None:
        """After a piece has come."""
        now = time.monotonic()
        if now >= self._show_at:
            self._show()
        elif self._later is None:
            # The next piece may be long in coming.
            self._later = asyncio.get_running_loop().call_later(self._show_at - now, self._show)
        if now >= self._write_at:
            work = asyncio.to_thread(self._answers._store.write, self._answer.id, *self._answer.unkept())
            self._answer.writing = asyncio.create_task(work)
            await asyncio.shield(self._answer.writing)  # who stops the answer loses nothing of it
            self._write_at = time.monotonic() + WRITE_SECONDS

    def _show(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._answer.id not in self._answers._answers:
            return
        began = time.monotonic()
        news = self._answer.news()
        now = time.monotonic()
        self._show_at = now + max(SHOW_SECONDS, RENDER_SHARE * (now - began))
        if news is not None:
            self._answers._tell(self._answer.plan.conversation, news)
