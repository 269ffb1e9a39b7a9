"""What the chat page asks of its server, below /page/api.

Every change answers with the conversation as it is now shown, and tells the other tabs. Answers come
by server-sent events, one stream for each open conversation.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, TypeVar

import fastapi
from fastapi import Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from tercet.data.conversation import check_text
from tercet.errors import UserError
from tercet.serve.errors import APIError
from tercet.serve.models import Models, Served
from tercet.serve.web import page_files
from tercet.serve.web.answering import Answers
from tercet.serve.web.asking import (
    FIELDS,
    MAX_TOKENS,
    Plan,
    check_settings,
    continuation_plan,
    make_plan,
    prompt_pieces,
)
from tercet.serve.web.chat_export import as_json, as_markdown, preference_pairs
from tercet.serve.web.conversations import NotThere
from tercet.serve.web.page_view import conversation_view
from tercet.serve.web.records import Conversation, Json
from tercet.serve.web.store import Store

T = TypeVar("T")

ALIVE_SECONDS = 15.0  # between two comments in a stream, so that no proxy closes it as idle
RETRY_MILLISECONDS = 1000  # after which a tab reconnects
TITLE_LIMIT = 200


class Body(BaseModel):
    """The body of a request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class NewConversation(Body):
    """A new conversation."""

    kind: Literal["chat", "text"] = "chat"
    settings: dict[str, Any] = {}


class Change(Body):
    """A change of a conversation."""

    title: str | None = None
    settings: dict[str, Any] | None = None
    kind: Literal["chat", "text"] | None = None
    show: str | None = None  # a message whose branch the conversation shows from now on


class NewMessage(Body):
    """A message of the user."""

    content: str
    parent: str | None = None


class NewAnswer(Body):
    """A message to answer once more."""

    parent: str


class Edit(Body):
    """A message in other words."""

    message: str
    content: str


class Continuation(Body):
    """A token of an answer to continue from."""

    message: str
    position: int
    token: int | None = None


class Stop(Body):
    """An answer to stop; None: all of the conversation."""

    answer: str | None = None


class Vote(Body):
    """A vote on a comparison."""

    comparison: str
    vote: str


class Page:
    """What the routes share: the store, the models and the answers in progress."""

    def __init__(self, store: Store, models: Models) -> None:
        self.store, self.models = store, models
        self.answers = Answers(store)

    async def close(self) -> None:
        """Store the answers in progress as interrupted, and end the event streams."""
        await self.answers.close()

    async def off_loop(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call a function that uses the disk without blocking the event loop."""
        return await asyncio.to_thread(function, *args, **options)

    async def view(self, name: str) -> Json:
        """Return a conversation as the page shows it, with its answers in progress."""
        running = self.answers.of(name)
        comparing = {answer.plan.comparison["id"] for answer in running if answer.plan.comparison}
        return await self.off_loop(conversation_view, self.store, name, comparing)

    async def changed(self, name: str) -> Json:
        """Return a conversation after a change, and notify the other tabs."""
        self.answers.changed(name)
        return await self.view(name)

    def plans(self, conversation: Conversation, parent: str, history: list[tuple[str, str]]) -> list[Plan]:
        """Return one plan, or two if the conversation compares models; nothing is stored yet."""
        settings = conversation.settings
        names = [settings.get("model") or self.models.default.name]
        if settings.get("against"):
            names.append(settings["against"])
        return [
            make_plan(self.models.get(name), conversation.kind, conversation.id, parent, history, settings)
            for name in names
        ]

    async def start(self, conversation: Conversation, plans: list[Plan], parent: str) -> None:
        """Start the planned answers to ``parent``, which is stored already."""
        if len(plans) == 2:
            blind = bool(conversation.settings.get("blind"))
            name = await self.off_loop(self.store.compare, conversation.id, parent, blind)
            if blind:
                random.shuffle(plans)
            for plan, side in zip(plans, ("left", "right"), strict=True):
                plan.comparison = {"id": name, "side": side, "hidden": blind}
        for plan in plans:
            plan.parent = parent
            await self.answers.start(plan)

    async def answer(self, name: str, parent: str) -> None:
        """Start another answer to a stored message."""
        conversation = await self.off_loop(self.store.conversation, name)
        await self.off_loop(self.store.member, name, parent)
        history = [
            (message.role, message.content) for message in await self.off_loop(self.store.history, parent)
        ]
        plans = self.plans(conversation, parent, history)
        await self.off_loop(self.store.change, name, leaf=parent)
        await self.start(conversation, plans, parent)

    async def say(self, name: str, parent: str | None, content: str) -> None:
        """Add a message of the user after ``parent`` and start the answer."""
        check_text(content, "the message")
        conversation = await self.off_loop(self.store.conversation, name)
        if parent is not None:
            await self.off_loop(self.store.member, name, parent)
        before = await self.off_loop(self.store.history, parent)
        history = [(message.role, message.content) for message in before]
        plans = self.plans(conversation, "", [*history, ("user", content)])
        message = await self.off_loop(self.store.add, name, parent, "user", content)
        await self.start(conversation, plans, message.id)


def page_of(request: Request) -> Page:
    """Return the state of the page."""
    page: Page = request.app.state.page
    return page


router = fastapi.APIRouter(prefix="/page/api", include_in_schema=False)


@router.get("/models")
async def models(request: Request) -> Json:
    """Return the models, and the default settings of an answer."""
    page = page_of(request)
    return {
        "models": [_describe(served) for served in page.models],
        "default": page.models.default.name,
        "fields": FIELDS,
        "max_tokens": MAX_TOKENS,
    }


def _describe(served: Served) -> Json:
    return {
        "name": served.name,
        "local": served.local is not None,
        "chats": served.local is None or served.has_chat_template,
        "context": served.context_length,
        "sampling": None if served.local is None else served.sampling_values,
    }


@router.get("/conversations")
async def conversations(request: Request, search: str = "") -> Json:
    """Return all conversations, or those that contain every word of ``search``."""
    page = page_of(request)
    await page.off_loop(page.store.purge)
    if search.strip():
        matches = await page.off_loop(page.store.search, search)
    else:
        matches = [(match, "") for match in await page.off_loop(page.store.conversations)]
    rows = [
        {
            "id": match.id,
            "title": match.title,
            "kind": match.kind,
            "updated": match.updated,
            "passage": passage,
        }
        for match, passage in matches
    ]
    return {"conversations": rows}


@router.post("/conversations")
async def create(request: Request, body: NewConversation) -> Json:
    """Create a conversation."""
    page = page_of(request)
    conversation = await page.off_loop(page.store.create, body.kind, check_settings(body.settings))
    return await page.view(conversation.id)


@router.get("/conversations/{name}")
async def show(request: Request, name: str) -> Json:
    """Return a conversation."""
    return await page_of(request).view(name)


@router.patch("/conversations/{name}")
async def change(request: Request, name: str, body: Change) -> Json:
    """Rename a conversation, change its settings, or show another branch."""
    page = page_of(request)
    title = (
        None if body.title is None else " ".join(check_text(body.title, "the title").split())[:TITLE_LIMIT]
    )
    settings = None if body.settings is None else check_settings(body.settings)
    leaf = None
    if body.show is not None:
        leaf = await page.off_loop(page.store.newest_leaf, name, body.show)
    await page.off_loop(
        page.store.change, name, title=title or None, settings=settings, leaf=leaf, kind=body.kind
    )
    return await page.changed(name)


@router.delete("/conversations/{name}")
async def delete(request: Request, name: str) -> Json:
    """Delete a conversation, which can be restored for a minute."""
    page = page_of(request)
    await page.off_loop(page.store.conversation, name)
    await page.answers.stop(name)
    await page.off_loop(page.store.delete, name)
    page.answers.changed(name)
    return {"deleted": name}


@router.post("/conversations/{name}/restore")
async def restore(request: Request, name: str) -> Json:
    """Restore a deleted conversation."""
    page = page_of(request)
    await page.off_loop(page.store.restore, name)
    return await page.changed(name)


@router.post("/conversations/{name}/messages")
async def send(request: Request, name: str, body: NewMessage) -> Json:
    """Add a message after ``parent`` and start the answer; an empty message continues a text."""
    page = page_of(request)
    if not body.content.strip():
        conversation = await page.off_loop(page.store.conversation, name)
        if conversation.kind != "text" or body.parent is None:
            raise UserError("the message is empty; write something")
        await page.answer(name, body.parent)
    else:
        await page.say(name, body.parent, body.content)
    return await page.changed(name)


@router.post("/conversations/{name}/answers")
async def regenerate(request: Request, name: str, body: NewAnswer) -> Json:
    """Start another answer to a message, with the present settings."""
    page = page_of(request)
    await page.answer(name, body.parent)
    return await page.changed(name)


@router.post("/conversations/{name}/edits")
async def edit(request: Request, name: str, body: Edit) -> Json:
    """Add a message in other words as a new branch; a message of the user gets a new answer."""
    page = page_of(request)
    message = await page.off_loop(page.store.member, name, body.message)
    check_text(body.content, "the message")
    if not body.content.strip():
        raise UserError("the message is empty; write something")
    if message.role == "user":
        await page.say(name, message.parent, body.content)
    elif body.content != message.content:
        await page.off_loop(page.store.add, name, message.parent, message.role, body.content)
    return await page.changed(name)


@router.post("/conversations/{name}/continuations")
async def continue_from(request: Request, name: str, body: Continuation) -> Json:
    """Start another answer that begins like ``message``, up to one of its tokens."""
    page = page_of(request)
    conversation = await page.off_loop(page.store.conversation, name)
    message = await page.off_loop(page.store.member, name, body.message)
    details = await page.off_loop(page.store.details, body.message)
    if details is None or message.model is None or message.parent is None:
        raise UserError("only an answer of a local model can be continued from one of its tokens")
    served = page.models.get(message.model)
    plan = continuation_plan(served, conversation.kind, name, message, details, body.position, body.token)
    await page.off_loop(page.store.change, name, leaf=message.parent)
    await page.answers.start(plan)
    return await page.changed(name)


@router.post("/conversations/{name}/stop")
async def stop(request: Request, name: str, body: Stop) -> Json:
    """Stop an answer, or all answers of the conversation; the text so far is kept."""
    page = page_of(request)
    await page.answers.stop(name, body.answer)
    return await page.view(name)


@router.post("/conversations/{name}/votes")
async def vote(request: Request, name: str, body: Vote) -> Json:
    """Store a vote on a comparison."""
    page = page_of(request)
    await page.off_loop(page.store.vote, name, body.comparison, body.vote)
    return await page.changed(name)


@router.get("/conversations/{name}/messages/{message}/tokens")
async def tokens(request: Request, name: str, message: str) -> Json:
    """Return an answer and its prompt, token by token."""
    page = page_of(request)
    answer = await page.off_loop(page.store.member, name, message)
    details = await page.off_loop(page.store.details, message)
    if details is None:
        return {"tokens": [], "prompt": [], "summary": None}
    served = next((model for model in page.models if model.name == answer.model), None)
    prompt = await page.off_loop(prompt_pieces, served, details.prompt)
    return {"tokens": details.tokens, "prompt": prompt, "summary": details.summary()}


@router.get("/conversations/{name}/export")
async def export(request: Request, name: str, form: Literal["json", "markdown"] = "json") -> Response:
    """Return a conversation as a file: all branches as JSON, or the branch that is shown as Markdown."""
    page = page_of(request)
    if form == "json":
        text = json.dumps(await page.off_loop(as_json, page.store, name), ensure_ascii=False, indent=1)
        return _file(text, "application/json", f"conversation-{name}.json")
    text = await page.off_loop(as_markdown, page.store, name)
    return _file(text, "text/markdown; charset=utf-8", f"conversation-{name}.md")


@router.get("/preferences")
async def preferences(request: Request) -> Response:
    """Return all votes that prefer an answer, one preference pair per line."""
    page = page_of(request)
    rows = await page.off_loop(lambda: list(preference_pairs(page.store)))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _file(text, "application/jsonl; charset=utf-8", "preference-pairs.jsonl")


def _file(text: str, kind: str, name: str) -> Response:
    disposition = {"content-disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse(text, media_type=kind, headers=disposition)


@router.get("/conversations/{name}/events")
async def events(request: Request, name: str) -> Response:
    """Stream the events of a conversation as server-sent events."""
    page = page_of(request)
    await page.off_loop(page.store.conversation, name)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(
        _lines(page.answers.watch(name)), media_type="text/event-stream", headers=headers
    )


async def _lines(events: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Yield events as server-sent events, with a comment after ALIVE_SECONDS without an event."""
    following = asyncio.ensure_future(anext(events, None))
    yield f"retry: {RETRY_MILLISECONDS}\n\n"
    try:
        while True:
            done, _ = await asyncio.wait([following], timeout=ALIVE_SECONDS)
            if not done:
                yield ": alive\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()
        close = getattr(events, "aclose", None)
        if close is not None:
            await asyncio.gather(following, return_exceptions=True)
            await close()


def _not_there(request: Request, problem: Exception) -> Response:
    return APIError(404, str(problem), code="not_found").response()


def add_page(app: fastapi.FastAPI, store: Store, models: Models) -> None:
    """Add the files and routes of the page; a shutdown must begin with ``app.state.page.close()``."""
    app.state.page = Page(store, models)
    app.add_exception_handler(NotThere, _not_there)
    app.include_router(router)
    app.include_router(page_files.router)
    app.add_middleware(page_files.PageHeaders)
