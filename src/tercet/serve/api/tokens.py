"""/tokenize, /detokenize and /tokenizer_info: vLLM's endpoints, which lm-eval uses."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from tercet.data.conversation import check_text
from tercet.errors import UserError
from tercet.serve.api.chat_messages import Message, read_ending, template_form
from tercet.serve.api.field_table import Body, Used, ignored_of
from tercet.serve.api.prompts import TokenId
from tercet.serve.errors import APIError, from_user_error, invalid_value
from tercet.serve.models import Models, Served
from tercet.serve.tools.messages import checked_messages

router = APIRouter()


class TokenizeBody(Body):
    """A text or a conversation; ``model`` defaults to the first model of the server."""

    model: Annotated[str | None, Used("name of the model; the first one by default")] = None
    prompt: Annotated[str | None, Used("a text; either this or `messages`")] = None
    messages: Annotated[
        Annotated[list[Message], Field(min_length=1)] | None, Used("a conversation, which is rendered")
    ] = None
    add_special_tokens: Annotated[bool | None, Used("of a prompt; true by default")] = None
    continue_final_message: Annotated[
        bool | None,
        Used("of a conversation: end within the last message, as for an answer that continues it"),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Used("of a conversation: end with the beginning of a message; true by default")
    ] = None
    return_token_strs: Annotated[bool | None, Used("also return each token's text")] = None


class DetokenizeBody(Body):
    """Tokens to decode."""

    model: Annotated[str | None, Used("name of the model; the first one by default")] = None
    tokens: Annotated[list[TokenId], Used("token ids")]


def _served(request: Request, name: str | None) -> Served:
    models: Models = request.app.state.models
    return models.default if name is None else models.get(name)


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """Return the token ids of a text, by default with special tokens, or of a rendered conversation."""
    served = _served(request, body.model)
    body.review(ignored_of(request))
    if (body.prompt is None) == (body.messages is None):
        raise APIError(
            400, "send either prompt or messages", param="prompt", code="missing_required_parameter"
        )
    if body.messages is None and (body.continue_final_message or body.add_generation_prompt is not None):
        name = "continue_final_message" if body.continue_final_message else "add_generation_prompt"
        raise invalid_value(name, "applies to messages only; a text is tokenized as it is")
    if body.messages is not None and body.add_special_tokens is not None:
        raise invalid_value(
            "add_special_tokens", "applies to a prompt only; a chat template writes its own special tokens"
        )
    tokens = await asyncio.to_thread(_encode, served, body)
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": served.context_length,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [served.tokenizer.token_text(token) for token in tokens]
    return JSONResponse(answer)


def _encode(served: Served, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        ending = read_ending(body.continue_final_message, body.add_generation_prompt)
        return served.prompt_tokens(checked_messages(template_form(body.messages)), ending=ending)
    try:
        text = check_text(body.prompt, "prompt")
    except UserError as problem:
        raise from_user_error(problem, "prompt") from problem
    return served.tokenizer.encode(text, special=body.add_special_tokens is not False)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """Return the text of tokens, with the text of special tokens."""
    served = _served(request, body.model)
    size = served.tokenizer.vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise invalid_value(
            "tokens", f"has {max(body.tokens)}; the ids of this tokenizer are 0 to {size - 1}"
        )
    text = await asyncio.to_thread(served.tokenizer.decode, body.tokens, False)
    return JSONResponse({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: Annotated[str | None, Query()] = None) -> Response:
    """Return the named tokens and the chat template."""
    served = _served(request, model)
    tokenizer = served.tokenizer
    return JSONResponse(
        {
            "tokenizer_class": str(tokenizer.config.get("tokenizer_class", "PreTrainedTokenizerFast")),
            "vocab_size": tokenizer.vocab_size,
            "max_model_len": served.context_length,
            "bos_token": tokenizer.named_tokens.get("bos_token"),
            "eos_token": tokenizer.named_tokens.get("eos_token"),
            "pad_token": tokenizer.named_tokens.get("pad_token"),
            "chat_template": tokenizer.chat_template,
        }
    )
