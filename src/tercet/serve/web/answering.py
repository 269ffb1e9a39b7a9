"""Answers in progress for the page: from the model to the store and to all open tabs.

An answer belongs to the server, not to the tab that requested it. It continues when the tab is closed, and a tab
that opens later gets the text so far and then the rest. An answer ends when the model ends it, when a user stops
it, or when the server shuts down.
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

SHOW_SECONDS = 0.04  # between two updates of the page, more often than the eye notices
RENDER_SHARE = 10  # rendering takes at most a tenth of the time
WRITE_SECONDS = 0.5  # of an answer can be lost when the process is killed
BACKLOG = 2000  # events that wait for a slow tab; a tab that falls further behind reconnects


class Answer:
    """An answer in progress.

    Attributes:
        text: the text so far.
        tokens: the tokens so far, as dicts (see `tercet.serve.web.records.Details`).
        blocks: the HTML of the text; None for a text that is continued, which the page shows as it is.
    """

    def __init__(self, name: str, plan: Plan) -> None:
        self.id, self.plan = name, plan
        self.text, self.tokens = "", list[Json]()
        self.blocks = BlockStream() if plan.kind == "chat" else None
        self.stopped = False  # by the user
        self.completion: Completion | None = None
        self.began = time.monotonic()
        self.first_seconds: float | None = None
        self.reading: asyncio.Task[str] | None = None  # reads from the model; returns the finish reason
        self.task: asyncio.Task[None] | None = None  # waits for that and stores the whole answer
        self.writing: asyncio.Task[None] | None = None
        self._bytes_of = TokenBytes(plan.served.tokenizer) if plan.served.local else None
        self._stream = TextStream(plan.sampling.stop)
        self._visible = False  # whether any token so far adds to the text
        self._shown_text = self._shown_tokens = self._shown_blocks = 0
        self._stored_text = self._stored_tokens = 0
        for token in plan.prefix:
            self._push(token)
        if self.met_stop:
            raise UserError("the answer ended there with a stop string; continue from an earlier token")

    @property
    def met_stop(self) -> bool:
        """Whether the text has reached a stop string; the engine does not know one that begins in the prefix."""
        return self._stream.stopped

    def _push(self, token: Json) -> None:
        data = bytes.fromhex(token["bytes"])
        self._visible = self._visible or bool(data)
        self.tokens.append(token)
        self.text += self._stream.push(data)

    def take(self, logprobs: list[TokenLogprob]) -> None:
        """Append tokens of a local model."""
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self.began
        assert self._bytes_of is not None
        for entry in logprobs:
            # The engine treats the first token of an answer as the beginning of a text and drops its leading
            # space; after a prefix the space must stay.
            first = not self._visible
            special = entry.token_id in self.plan.stop_ids
            data = b"" if special else self._bytes_of(entry.token_id, first=first)
            top = [
                [token_id, self._bytes_of.text(token_id, first=first), logprob]
                for token_id, _, logprob in entry.top
            ]
            text = self._bytes_of.text(entry.token_id, first=first)
            token = {
                "id": entry.token_id,
                "text": text,
                "bytes": data.hex(),
                "logprob": entry.logprob,
                "top": top,
            }
            self._push(token | {"entropy": entry.entropy})

    def take_text(self, piece: str) -> None:
        """Append text of a hosted model."""
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self.began
        self.text += piece

    def end(self) -> None:
        """End the answer: text that was held back as the possible beginning of a stop string belongs to it."""
        if self.plan.served.local:
            self.text += self._stream.finish()

    def snapshot(self) -> Json:
        """Return the state of the answer that the other tabs have been shown, for a tab that opens."""
        state: Json = {
            "id": self.id,
            "parent": self.plan.parent,
            "model": self.plan.served.name,
            "comparison": self.plan.comparison,
            "tokens": self.tokens[: self._shown_tokens],
            "seconds": time.monotonic() - self.began,
        }
        if self.blocks is None:
            return state | {"text": self.text[: self._shown_text]}
        return state | {"blocks": [*self.blocks.blocks]}

    def news(self, whole: bool = False) -> Json | None:
        """Return what is new since the last call, for the page; None if nothing is."""
        event: Json = {"type": "piece", "id": self.id, "tokens": self.tokens[self._shown_tokens :]}
        if self.blocks is None:
            event["text"] = self.text[self._shown_text :]
        else:
            keep = self.blocks.update(self.text, whole)
            event |= {"keep": keep, "blocks": self.blocks.blocks[keep:]}
        new = len(self.tokens) > self._shown_tokens or len(self.text) > self._shown_text or whole
        self._shown_tokens, self._shown_text = len(self.tokens), len(self.text)
        return event if new else None

    def unstored(self) -> tuple[str, list[Json]]:
        """Return the text and tokens since the last call, for the store."""
        text, tokens = self.text[self._stored_text :], self.tokens[self._stored_tokens :]
        self._stored_text, self._stored_tokens = len(self.text), len(self.tokens)
        return text, tokens


class Answers:
    """All answers in progress and the tabs that watch them. Used from one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._answers: dict[str, Answer] = {}
        self._watchers: dict[str, set[asyncio.Queue[Json | None]]] = {}
        self._closed = False

    def of(self, conversation: str) -> list[Answer]:
        """Return the answers in progress of a conversation."""
        return [answer for answer in self._answers.values() if answer.plan.conversation == conversation]

    async def start(self, plan: Plan) -> Answer:
        """Start an answer."""
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
        self._send(plan.conversation, {"type": "started", "answer": answer.snapshot()})
        answer.reading = asyncio.create_task(self._read(answer))
        answer.task = asyncio.create_task(self._write(answer, answer.reading))
        return answer

    async def stop(self, conversation: str, name: str | None = None) -> int:
        """Stop an answer, or all answers of a conversation, and store them; return how many."""
        stopping = [answer for answer in self.of(conversation) if name in (None, answer.id)]
        for answer in stopping:
            answer.stopped = True
        await self._cancel(stopping)
        return len(stopping)

    async def close(self) -> None:
        """Store every answer as interrupted, and end the streams of all tabs."""
        self._closed = True
        for queues in self._watchers.values():
            for queue in queues:
                queue.put_nowait(None)
        await self._cancel(list(self._answers.values()))

    async def _cancel(self, answers: list[Answer]) -> None:
        """Cancel the reading and wait for the storing, so that stopping twice does no harm."""
        for answer in answers:
            if answer.reading is not None:
                answer.reading.cancel()
        tasks = [answer.task for answer in answers if answer.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    # Tabs that watch

    async def watch(self, conversation: str) -> AsyncIterator[Json]:
        """Yield the events of a conversation: first its answers in progress, then everything that happens."""
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        queues = self._watchers.setdefault(conversation, set())
        queues.add(queue)
        try:
            if self._closed:
                return
            yield {"type": "here", "answers": [answer.snapshot() for answer in self.of(conversation)]}
            while (event := await queue.get()) is not None:
                yield event
        finally:
            queues.discard(queue)
            if not queues:
                self._watchers.pop(conversation, None)

    def changed(self, conversation: str) -> None:
        """Send an event that the conversation has changed to all tabs that watch it."""
        self._send(conversation, {"type": "changed"})

    def _send(self, conversation: str, event: Json) -> None:
        for queue in self._watchers.get(conversation, ()):
            # A full queue gets the end of its stream and then nothing more, however long its tab sleeps.
            if queue.qsize() <= BACKLOG:
                queue.put_nowait(event if queue.qsize() < BACKLOG else None)

    # Writing an answer

    async def _read(self, answer: Answer) -> str:
        if answer.plan.ended:
            return "stop"
        if answer.plan.served.local is not None:
            return await self._from_local(answer)
        return await self._from_hosted(answer)

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
            error = f"the server failed ({type(problem).__name__}); its log has the details"
        answer.end()
        await self._finish(answer, finish, error)

    async def _finish(self, answer: Answer, finish: str, error: str | None) -> None:
        plan, completion = answer.plan, answer.completion
        news = answer.news(whole=True)
        if news is not None:
            self._send(plan.conversation, news)
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
            await asyncio.to_thread(self._store.write, answer.id, *answer.unstored())
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
            comparison = plan.comparison
            if comparison and not any(
                running.plan.comparison and running.plan.comparison["id"] == comparison["id"]
                for running in self._answers.values()
                if running is not answer
            ):
                await asyncio.to_thread(self._store.settle, comparison["id"])
        except UserError as problem:
            event["error"] = f"the answer could not be stored: {problem}"
        except Exception:
            log.exception("an answer could not be stored")
            event["error"] = "the answer could not be stored; the server's log has the details"
        self._answers.pop(answer.id, None)
        self._send(plan.conversation, event)

    async def _from_local(self, answer: Answer) -> str:
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

    async def _from_hosted(self, answer: Answer) -> str:
        """Read the stream of a hosted model, which blocks, in a thread."""
        plan, loop = answer.plan, asyncio.get_running_loop()
        hosted = plan.served.hosted
        assert hosted is not None
        stream = hosted.stream(plan.messages, call_settings(None, plan.fields))
        received: asyncio.Queue[str | Completion | Exception] = asyncio.Queue()
        cancelled = threading.Event()

        def put(item: str | Completion | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(received.put_nowait, item)

        def read() -> None:
            try:
                with contextlib.closing(stream):
                    for piece in stream:
                        if cancelled.is_set():
                            return
                        put(piece)
            except Exception as problem:
                put(problem)

        threading.Thread(target=read, name="hosted answer", daemon=True).start()
        pace = _Pace(self, answer)
        try:
            while True:
                item = await received.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Completion):
                    answer.completion = item
                    return item.finish_reason
                answer.take_text(item)
                await pace.step()
        finally:
            cancelled.set()


class _Pace:
    """Shows and stores an answer at intervals instead of for every token."""

    def __init__(self, answers: Answers, answer: Answer) -> None:
        self._answers, self._answer = answers, answer
        self._show_at, self._write_at = 0.0, time.monotonic() + WRITE_SECONDS
        self._later: asyncio.TimerHandle | None = None

    async def step(self) -> None:
        """Show and store the answer if it is time; call this after each piece."""
        now = time.monotonic()
        if now >= self._show_at:
            self._show()
        elif self._later is None:
            # The next piece may take long.
            self._later = asyncio.get_running_loop().call_later(self._show_at - now, self._show)
        if now >= self._write_at:
            work = asyncio.to_thread(self._answers._store.write, self._answer.id, *self._answer.unstored())
            self._answer.writing = asyncio.create_task(work)
            await asyncio.shield(self._answer.writing)  # stopping the answer must not lose a part of it
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
            self._answers._send(self._answer.plan.conversation, news)
