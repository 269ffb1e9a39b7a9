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
    go_on_plan,
    make_plan,
    prompt_pieces,
)
from tercet.serve.web.chat_export import as_json, as_markdown, preference_pairs
from tercet.serve.web.page_view import conversation_view
from tercet.serve.web.records import Conversation, Json
from tercet.serve.web.store import NotThere, Store

T = TypeVar("T")

ALIVE_SECONDS = (
    15.0  # a comment goes to every tab so often, so that nothing between takes the stream for dead
)
RETRY_MILLISECONDS = 1000  # until a tab that lost its connection tries again
TITLE_LIMIT = 200


class Body(BaseModel):
    """What a request may hold; anything else is refused."""

    model_config = ConfigDict(extra="forbid")


class NewConversation(Body):
    kind: Literal["chat", "text"] = "chat"
    settings: dict[str, Any] = {}


class Change(Body):
    title: str | None = None
    settings: dict[str, Any] | None = None
    kind: Literal["chat", "text"] | None = None
    show: str | None = None  # a message: its branch is shown, as it was left


class NewMessage(Body):
    content: str
    parent: str | None = None


class NewAnswer(Body):
    parent: str


class Edit(Body):
    message: str
    content: str


class GoOn(Body):
    message: str
    position: int
    token: int | None = None


class Stop(Body):
    answer: str | None = None


class Vote(Body):
    comparison: str
    vote: str


class Page:
    """The routes' common ground: the store, the models, the answers on their way."""

    def __init__(self, store: Store, models: Models) -> None:
        self.store, self.models = store, models
        self.answers = Answers(store)

    async def close(self) -> None:
        """Keep the answers on their way, as interrupted, and end the streams of events: they have no other end."""
        await self.answers.close()

    async def off_loop(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call what reads or writes the disk, without holding up the event loop."""
        return await asyncio.to_thread(function, *args, **options)

    async def view(self, name: str) -> Json:
        """The conversation as it is shown, with its answers on their way."""
        running = self.answers.of(name)
        comparing = {one.plan.comparison["id"] for one in running if one.plan.comparison}
        return await self.off_loop(conversation_view, self.store, name, comparing)

    async def changed(self, name: str) -> Json:
        """The same after a change, which the other tabs are told of."""
        self.answers.changed(name)
        return await self.view(name)

    def plans(self, one: Conversation, parent: str, history: list[tuple[str, str]]) -> list[Plan]:
        """One plan, or two where the conversation compares; nothing is stored yet."""
        settings = one.settings
        names = [settings.get("model") or self.models.default.name]
        if settings.get("against"):
            names.append(settings["against"])
        return [
            make_plan(self.models.get(name), one.kind, one.id, parent, history, settings) for name in names
        ]

    async def start(self, one: Conversation, plans: list[Plan], parent: str) -> None:
        """Begin the answers of plans to ``parent``, which is stored by now."""
        if len(plans) == 2:
            blind = bool(one.settings.get("blind"))
            name = await self.off_loop(self.store.compare, one.id, parent, blind)
            if blind:
                random.shuffle(plans)
            for plan, side in zip(plans, ("left", "right"), strict=True):
                plan.comparison = {"id": name, "side": side, "hidden": blind}
        for plan in plans:
            plan.parent = parent
            await self.answers.start(plan)

    async def answer(self, name: str, parent: str) -> None:
        """Begin another answer to a message that is there."""
        one = await self.off_loop(self.store.conversation, name)
        await self.off_loop(self.store.member, name, parent)
        history = [
            (before.role, before.content) for before in await self.off_loop(self.store.history, parent)
        ]
        plans = self.plans(one, parent, history)
        await self.off_loop(self.store.change, name, leaf=parent)
        await self.start(one, plans, parent)

    async def say(self, name: str, parent: str | None, content: str) -> None:
        """Add what the user says after ``parent`` and begin the answer."""
        check_text(content, "the message")
        one = await self.off_loop(self.store.conversation, name)
        if parent is not None:
            await self.off_loop(self.store.member, name, parent)
        before = await self.off_loop(self.store.history, parent)
        history = [(message.role, message.content) for message in before]
        plans = self.plans(one, "", [*history, ("user", content)])
        message = await self.off_loop(self.store.add, name, parent, "user", content)
        await self.start(one, plans, message.id)


def page_of(request: Request) -> Page:
    """The page's state."""
    page: Page = request.app.state.page
    return page


router = fastapi.APIRouter(prefix="/page/api", include_in_schema=False)


@router.get("/models")
async def models(request: Request) -> Json:
    """What there is to talk to, and the settings that an answer has when none is given."""
    page = page_of(request)
    return {
        "models": [_describe(one) for one in page.models],
        "default": page.models.default.name,
        "fields": FIELDS,
        "max_tokens": MAX_TOKENS,
    }


def _describe(one: Served) -> Json:
    return {
        "name": one.name,
        "local": one.local is not None,
        "chats": one.local is None or one.has_chat_template,
        "context": one.context_length,
    }


@router.get("/conversations")
async def conversations(request: Request, search: str = "") -> Json:
    """All conversations, or those in which every word of ``search`` is."""
    page = page_of(request)
    await page.off_loop(page.store.purge)
    if search.strip():
        found = await page.off_loop(page.store.search, search)
    else:
        found = [(one, "") for one in await page.off_loop(page.store.conversations)]
    rows = [
        {"id": one.id, "title": one.title, "kind": one.kind, "updated": one.updated, "passage": passage}
        for one, passage in found
    ]
    return {"conversations": rows}


@router.post("/conversations")
async def create(request: Request, body: NewConversation) -> Json:
    page = page_of(request)
    one = await page.off_loop(page.store.create, body.kind, check_settings(body.settings))
    return await page.view(one.id)


@router.get("/conversations/{name}")
async def show(request: Request, name: str) -> Json:
    return await page_of(request).view(name)


@router.patch("/conversations/{name}")
async def change(request: Request, name: str, body: Change) -> Json:
    """Rename it, change its settings, show another branch."""
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
    """Delete it; for a minute it can be restored."""
    page = page_of(request)
    await page.off_loop(page.store.conversation, name)
    await page.answers.stop(name)
    await page.off_loop(page.store.delete, name)
    page.answers.changed(name)
    return {"deleted": name}


@router.post("/conversations/{name}/restore")
async def restore(request: Request, name: str) -> Json:
    page = page_of(request)
    await page.off_loop(page.store.restore, name)
    return await page.changed(name)


@router.post("/conversations/{name}/messages")
async def send(request: Request, name: str, body: NewMessage) -> Json:
    """Say something after ``parent`` and have it answered. A text without more of it is just continued."""
    page = page_of(request)
    if not body.content.strip():
        one = await page.off_loop(page.store.conversation, name)
        if one.kind != "text" or body.parent is None:
            raise UserError("the message is empty; write something")
        await page.answer(name, body.parent)
    else:
        await page.say(name, body.parent, body.content)
    return await page.changed(name)


@router.post("/conversations/{name}/answers")
async def regenerate(request: Request, name: str, body: NewAnswer) -> Json:
    """Another answer to a message, with the settings as they are now."""
    page = page_of(request)
    await page.answer(name, body.parent)
    return await page.changed(name)


@router.post("/conversations/{name}/edits")
async def edit(request: Request, name: str, body: Edit) -> Json:
    """A message in other words, as a branch of its own. What the user says is answered anew."""
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
async def go_on(request: Request, name: str, body: GoOn) -> Json:
    """Another answer that begins as ``message`` does, up to one of its tokens."""
    page = page_of(request)
    one = await page.off_loop(page.store.conversation, name)
    message = await page.off_loop(page.store.member, name, body.message)
    details = await page.off_loop(page.store.details, body.message)
    if details is None or message.model is None or message.parent is None:
        raise UserError("only an answer of a model that runs here can be continued from one of its tokens")
    served = page.models.get(message.model)
    plan = go_on_plan(served, one.kind, name, message, details, body.position, body.token)
    await page.off_loop(page.store.change, name, leaf=message.parent)
    await page.answers.start(plan)
    return await page.changed(name)


@router.post("/conversations/{name}/stop")
async def stop(request: Request, name: str, body: Stop) -> Json:
    """Stop an answer, or all of the conversation; what came is kept."""
    page = page_of(request)
    await page.answers.stop(name, body.answer)
    return await page.view(name)


@router.post("/conversations/{name}/votes")
async def vote(request: Request, name: str, body: Vote) -> Json:
    page = page_of(request)
    await page.off_loop(page.store.vote, name, body.comparison, body.vote)
    return await page.changed(name)


@router.get("/conversations/{name}/messages/{message}/tokens")
async def tokens(request: Request, name: str, message: str) -> Json:
    """An answer and its prompt token by token."""
    page = page_of(request)
    found = await page.off_loop(page.store.member, name, message)
    details = await page.off_loop(page.store.details, message)
    if details is None:
        return {"tokens": [], "prompt": [], "summary": None}
    served = next((one for one in page.models if one.name == found.model), None)
    prompt = await page.off_loop(prompt_pieces, served, details.prompt)
    return {"tokens": details.tokens, "prompt": prompt, "summary": details.summary()}


@router.get("/conversations/{name}/export")
async def export(request: Request, name: str, form: Literal["json", "markdown"] = "json") -> Response:
    """The conversation as a file: all branches as JSON, or the one that is shown as Markdown."""
    page = page_of(request)
    if form == "json":
        text = json.dumps(await page.off_loop(as_json, page.store, name), ensure_ascii=False, indent=1)
        return _file(text, "application/json", f"conversation-{name}.json")
    text = await page.off_loop(as_markdown, page.store, name)
    return _file(text, "text/markdown; charset=utf-8", f"conversation-{name}.md")


@router.get("/preferences")
async def preferences(request: Request) -> Response:
    """All votes that prefer an answer, one preference pair a line."""
    page = page_of(request)
    rows = await page.off_loop(lambda: list(preference_pairs(page.store)))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _file(text, "application/jsonl; charset=utf-8", "preference-pairs.jsonl")


def _file(text: str, kind: str, name: str) -> Response:
    disposition = {"content-disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse(text, media_type=kind, headers=disposition)


@router.get("/conversations/{name}/events")
async def events(request: Request, name: str) -> Response:
    """What happens in a conversation from now on, as server-sent events."""
    page = page_of(request)
    await page.off_loop(page.store.conversation, name)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(
        _lines(page.answers.watch(name)), media_type="text/event-stream", headers=headers
    )


async def _lines(found: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Events as they go over the wire, with a comment when nothing has happened for a while."""
    following = asyncio.ensure_future(anext(found, None))
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
            following = asyncio.ensure_future(anext(found, None))
    finally:
        following.cancel()
        close = getattr(found, "aclose", None)
        if close is not None:
            await asyncio.gather(following, return_exceptions=True)
            await close()


def _not_there(request: Request, problem: Exception) -> Response:
    return APIError(404, str(problem), code="not_found").response()


def add_page(app: fastapi.FastAPI, store: Store, models: Models) -> None:
    """The page's files and routes. ``app.state.page.close()`` belongs at the beginning of a shutdown."""
    app.state.page = Page(store, models)
    app.add_exception_handler(NotThere, _not_there)
    app.include_router(router)
    app.include_router(page_files.router)
    app.add_middleware(page_files.PageHeaders)
