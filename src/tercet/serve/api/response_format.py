"""``response_format``: the form that an answer is held to, token by token."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.engine.grammar import Grammar, GrammarError
from tercet.serve.api.fields import Body
from tercet.serve.errors import APIError


class JsonSchema(Body):
    """A schema with its name. ``strict`` or not, it is kept."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


async def wanted_form(asked: ResponseFormat | None) -> Grammar | None:
    """The grammar for it; None for any text. APIError 400 for what can't be enforced."""
    if asked is None:
        return None
    param = "response_format.json_schema"
    if asked.json_schema is not None and asked.type != "json_schema":
        raise APIError(
            400,
            f"{param} goes only with type json_schema, not {asked.type}",
            param=param,
            code="invalid_value",
        )
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return await checked_schema({"type": "object"}, "response_format")
    if asked.json_schema is None:
        raise APIError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if asked.json_schema.schema_ is None:
        param += ".schema"
        raise APIError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    return await checked_schema(asked.json_schema.schema_, f"{param}.schema")


async def checked_schema(schema: dict[str, Any], param: str) -> Grammar:
    """JSON under a schema. APIError 400, never an answer that is not held to it."""

    def check() -> Grammar:
        grammar = Grammar.json_schema(schema)
        grammar.check()
        return grammar

    try:
        # Compiling can take a while; nobody else shall wait for it.
        return await asyncio.to_thread(check)
    except (GrammarError, RecursionError) as problem:
        why = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise APIError(
            400, f"{param} can't be enforced: {why}"[:1000], param=param, code="invalid_json_schema"
        ) from problem
