"""Prompts of OpenAI's older endpoints: a text or tokens, one or several."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import Field, WrapValidator
from pydantic_core import PydanticCustomError

from tercet.data.conversation import check_text
from tercet.errors import UserError
from tercet.serve.errors import from_user_error, invalid_value
from tercet.serve.models import Served

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]
TokenLists = Annotated[list[Tokens], Field(min_length=1)]


def _prompts_error(value: Any, handler: Any) -> Any:
    try:
        return handler(value)
    except ValueError:
        raise PydanticCustomError(
            "prompts", "must be a string, a list of strings, a list of token ids or a list of such lists"
        ) from None


Prompts = Annotated[str | Texts | Tokens | TokenLists, WrapValidator(_prompts_error)]


def prompt_list(prompts: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return the prompts as a list."""
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = prompts
    return [several] if isinstance(several[0], int) else several


async def encode_prompts(
    served: Served, prompts: list[str | list[int]], param: str, *, begin: bool
) -> list[list[int]]:
    """Return the tokens of each prompt, special tokens included.

    Args:
        served: the model.
        prompts: texts or tokens.
        param: their name in the request.
        begin: whether an empty text stands for a new document, which begins with the tokenizer's BOS, or its
            EOS where it has no BOS. Otherwise an empty text is refused, as it is where there is neither.

    Raises:
        APIError: 400; a prompt is empty, too long, or has tokens that the model does not know.
    """
    return await asyncio.to_thread(lambda: [_encode(served, prompt, param, begin) for prompt in prompts])


def _encode(served: Served, prompt: str | list[int], param: str, begin: bool) -> list[int]:
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        try:
            tokens = tokenizer.encode(check_text(prompt, param))
        except UserError as problem:
            raise from_user_error(problem, param) from problem
        if not prompt and not begin:
            tokens = []  # BOS alone is not a text
        elif not tokens:
            first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            tokens = [] if first is None else [first]
    else:
        tokens = prompt
        size = served.worker.engine.backend.vocab_size
        if max(tokens) >= size:
            raise invalid_value(
                param, f"has token {max(tokens)}; the token ids of this model are 0 to {size - 1}"
            )
    if not tokens:
        raise invalid_value(param, "contains an empty text")
    served.check_length(tokens, param)
    return tokens
