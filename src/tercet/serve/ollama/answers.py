"""/api/chat and /api/generate: the next message of a conversation, or the continuation of a text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tercet.data.conversation import conversation as opening_conversation
from tercet.engine.request import Completion
from tercet.serve.api.field_table import Ignored, ignored_of
from tercet.serve.api.fields import choice_seed
from tercet.serve.api.generation import Step, chat_tokens, steps
from tercet.serve.api.hosted_steps import chat_payload, hosted_steps
from tercet.serve.api.logprobs import Aligned, chat_entry
from tercet.serve.api.prompts import encode_prompts
from tercet.serve.api.reasoning import knows, reasoning_variables
from tercet.serve.errors import APIError, invalid_value, unsupported
from tercet.serve.models import Served
from tercet.serve.ollama.conversation import conversation, ending_of, tool_request
from tercet.serve.ollama.replies import (
    LINES,
    STREAMED,
    Clock,
    Json,
    OllamaRoute,
    error_line,
    line,
    served_model,
    timestamp,
)
from tercet.serve.ollama.requests import AnswerBody, ChatRequest, GenerateRequest, Options
from tercet.serve.streaming import event_stream, while_connected
from tercet.serve.tools.answer import Piece, Thought, gather
from tercet.serve.tools.plan import ToolPlan, plan_tools
from tercet.serve.tools.request import ToolRequest
from tercet.serve.worker import Reading

router = APIRouter(route_class=OllamaRoute)


@dataclass
class Answer:
    """One answer while it is written.

    kind: whose reply it is, which decides where its text stands.
    name: of the model, as the request spells it.
    prompt: the tokens that the model has read; None for a hosted model.
    alternatives: how many each log-probability has; None: there are none.
    with_context: whether the last line holds the tokens of prompt and answer.
    """

    kind: Literal["chat", "generate"]
    name: str
    served: Served
    clock: Clock
    prompt: list[int] | None = None
    alternatives: int | None = None
    with_context: bool = False
    pieces: list[Piece] = field(default_factory=list)
    aligned: Aligned = field(default_factory=Aligned)

    def push(self, step: Step) -> Json:
        """Return the reply's next part; the last one has ``done``."""
        if step.logprobs or step.pieces or step.completion is not None:
            self.clock.token()
        self.pieces += [piece for piece in step.pieces if not isinstance(piece, str)]
        text = "".join(p for p in step.pieces if isinstance(p, str) and not isinstance(p, Thought))
        thought = "".join(p for p in step.pieces if isinstance(p, Thought))
        calls = self._calls() if step.completion is not None else []
        part = self.part(text, thought, calls)
        if self.alternatives is not None:
            entries = self.aligned.push(step.text, step.logprobs or (), step.completion is not None)
            if entries:
                part["logprobs"] = [_logprob(chat_entry(e.token, self.served.tokenizer)) for e in entries]
        if step.completion is not None:
            part |= self._end(step.completion)
        return part

    def part(self, text: str, thought: str = "", calls: Sequence[Json] = ()) -> Json:
        """Return a part of the reply that is not the last one."""
        head: Json = {"model": self.name, "created_at": timestamp()}
        if self.kind == "generate":
            return head | {"response": text} | ({"thinking": thought} if thought else {}) | {"done": False}
        message: Json = {"role": "assistant", "content": text}
        message |= {"thinking": thought} if thought else {}
        message |= {"tool_calls": list(calls)} if calls else {}
        return head | {"message": message, "done": False}

    def empty(self, reason: str) -> Json:
        """Return the reply to a request without a prompt, which only loads or unloads the model."""
        return self.part("") | {"done": True, "done_reason": reason}

    def _calls(self) -> list[Json]:
        """Return the calls. One that was cut off is left out: a client would run it."""
        calls = []
        for number, call in enumerate(gather(self.pieces).calls):
            try:
                arguments = json.loads(call.arguments)
            except ValueError:
                continue
            if isinstance(arguments, dict):
                function = {"index": number, "name": call.name, "arguments": arguments}
                calls.append({"id": call.id, "function": function})
        return calls

    def _end(self, completion: Completion) -> Json:
        durations = self.clock.durations()
        end = {
            "done": True,
            "done_reason": completion.finish_reason,
            "total_duration": durations["total_duration"],
            "load_duration": durations["load_duration"],
            "prompt_eval_count": completion.usage.prompt_tokens,
            "prompt_eval_duration": durations["prompt_eval_duration"],
            "eval_count": completion.usage.completion_tokens,
            "eval_duration": durations["eval_duration"],
        }
        if self.with_context and self.prompt is not None:
            end["context"] = [*self.prompt, *completion.tokens]
        return end


def _logprob(entry: Json) -> Json:
    """Return a token's log-probability as Ollama has it, without an empty list of alternatives."""
    return entry if entry["top_logprobs"] else {k: v for k, v in entry.items() if k != "top_logprobs"}


@router.post("/api/chat", responses=STREAMED)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Return the assistant's next message, by default as lines of JSON."""
    clock, ignored = Clock(), ignored_of(request)
    served = served_model(request, body.model)
    body.review(ignored)
    answer = Answer("chat", body.model or served.name, served, clock, alternatives=body.shown_logprobs)
    if not body.messages:
        return JSONResponse(answer.empty("unload" if body.unloads else "load"))
    messages = conversation(body.messages, _shows_reasoning(served), ignored)
    return await _reply(request, body, answer, messages, tool_request(body.tools, ignored), ignored)


@router.post("/api/generate", responses=STREAMED)
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Return the answer to a prompt, or its continuation, by default as lines of JSON."""
    clock, ignored = Clock(), ignored_of(request)
    served = served_model(request, body.model)
    body.review(ignored)
    name = body.model or served.name
    answer = Answer("generate", name, served, clock, alternatives=body.shown_logprobs)
    if not body.prompt:
        return JSONResponse(answer.empty("unload" if body.unloads else "load"))
    if body.raw and (body.system or body.context):
        raise invalid_value("raw", "leaves out the chat template, so it takes no system and no context")
    raw = bool(body.raw) or not served.has_chat_template
    if raw:
        if body.system:
            raise unsupported("system", f"{served.name} has no chat template (a base model)")
        (answer.prompt,) = await encode_prompts(served, [body.prompt], "prompt", begin=True)
        answer.prompt = _continued(served, body.context, answer.prompt)
    answer.with_context = not body.raw
    messages = opening_conversation(body.prompt, body.system or None)
    return await _reply(request, body, answer, messages, ToolRequest(), ignored, body.context)


def _shows_reasoning(served: Served) -> bool:
    return knows(served, "reasoning_content") or knows(served, "thinking")


async def _reply(
    request: Request,
    body: AnswerBody,
    answer: Answer,
    messages: list[Json],
    tools: ToolRequest,
    ignored: Ignored,
    context: list[int] | None = None,
) -> Response:
    """Return the answer to a conversation, or to the prompt that ``answer`` has already."""
    served, streamed = answer.served, body.stream is not False
    reading = Reading() if streamed else None
    if served.hosted is not None:
        payload = await _payload(served, body, messages, tools, context)
        answer.clock.start()
        written = hosted_steps(request, served, payload, thoughts=True)
    else:
        plan = ToolPlan(None, form := await body.form(), content=form)
        if answer.prompt is None:
            plan, prompt = await _prompt(served, body, messages, tools, plan, ignored)
            answer.prompt = _continued(served, context, prompt)
        if body.logprobs and plan.form is not None:
            raise unsupported("logprobs", "it cannot be combined with tools, because calls are not text")
        sampling = (body.options or Options()).sampling(served, answer.prompt, answer.alternatives)
        answer.clock.start()
        # A call is sent when it is complete: its arguments are an object.
        written = steps(served, answer.prompt, [sampling], plan, whole=True, reading=reading, thoughts=True)
    if streamed:
        return await event_stream(
            request,
            _lines(answer, written),
            error_line,
            reading,
            idle=lambda progress: line(answer.part("")),  # these lines have no comments
            media_type=LINES,
        )
    return JSONResponse(await while_connected(request, _whole(answer, written)))


async def _prompt(
    served: Served,
    body: AnswerBody,
    messages: list[Json],
    tools: ToolRequest,
    plan: ToolPlan,
    ignored: Ignored,
) -> tuple[ToolPlan, list[int]]:
    """Return the plan of the tools and the tokens of a conversation."""
    if not served.has_chat_template:
        raise APIError(
            400,
            f'"{served.name}" does not support chat: it has no chat template (a base model); use /api/generate',
            param="messages",
        )
    variables = reasoning_variables(served, body.effort, "think", ignored)
    plan = await asyncio.to_thread(plan_tools, tools, served.tokenizer, plan.constraint, "format")
    tokens = await asyncio.to_thread(
        chat_tokens, served, messages, plan, ending=ending_of(messages), **variables
    )
    return plan, tokens


def _continued(served: Served, context: list[int] | None, prompt: list[int]) -> list[int]:
    """Return a prompt behind the tokens of an earlier answer. APIError 400 where they are not the model's."""
    if not context:
        return prompt
    size = served.worker.engine.backend.vocab_size
    if max(context) >= size:
        raise invalid_value("context", f"has token {max(context)}; the model's are 0 to {size - 1}")
    rest = prompt[1:] if prompt and prompt[0] == served.tokenizer.bos_id == context[0] else prompt
    served.check_length([*context, *rest], "prompt")
    return [*context, *rest]


async def _payload(
    served: Served, body: AnswerBody, messages: list[Json], tools: ToolRequest, context: list[int] | None
) -> Json:
    """Return the request as the body of a chat completion. APIError 400 for what such a one does not carry."""
    assert served.hosted is not None
    options = body.options or Options()
    for name, value in (("logprobs", body.logprobs), ("context", context)):
        if value:
            raise unsupported(name, f"{served.name} is hosted on another server, which does not return it")
    if messages[-1]["role"] == "assistant" and served.hosted.reference.kind != "http":
        raise invalid_value(
            f"messages[{len(messages) - 1}].role",
            "is assistant; this model's server does not continue an answer, so the last message must be the user's",
        )
    penalties = options.penalties
    fields: Json = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "seed": None if options.seed in (None, -1) else choice_seed(options.seed, 0),
        "stop": list(options.stops) or None,
        "response_format": await _response_format(body),
        "reasoning_effort": None if body.effort == "none" else body.effort,
        **penalties,
    }
    if messages[-1]["role"] == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat_payload(served, messages, tools, options.max_tokens, fields)


async def _response_format(body: AnswerBody) -> Json | None:
    if await body.form() is None:
        return None
    if isinstance(body.format, str):
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": body.format, "strict": True},
    }


async def _lines(answer: Answer, written: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
    """Yield the lines of a stream; the first step, which is empty, only sends the headers."""
    async with aclosing(written):
        async for step in written:
            part = answer.push(step)
            shown = (
                part["done"] or "logprobs" in part or any(part.get("message", part).get(k) for k in _TEXTS)
            )
            yield line(part) if shown else b""


_TEXTS = ("content", "response", "thinking", "tool_calls")


async def _whole(answer: Answer, written: AsyncGenerator[Step, None]) -> Json:
    """Return the reply in one piece."""
    part: Json = {}
    texts = dict.fromkeys(("content", "response", "thinking"), "")
    logprobs: list[Json] = []
    async with aclosing(written):
        async for step in written:
            part = answer.push(step)
            place = part.get("message", part)
            for name in texts:
                texts[name] += place.get(name, "")
            logprobs += part.get("logprobs", ())
    place = part.get("message", part)
    place |= {name: text for name, text in texts.items() if text or name in place}
    return part | ({"logprobs": logprobs} if answer.alternatives is not None else {})
