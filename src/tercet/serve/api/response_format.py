"""``response_format``: the form of an answer, enforced token by token."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.engine.grammar import Grammar, GrammarError
from tercet.serve.api.field_table import Body, Hint, Used
from tercet.serve.errors import APIError, invalid_value, missing_parameter


class JsonSchema(Body):
    """A schema with its name. It is enforced with and without ``strict``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$"), Used("1 to 64 letters, digits, _ and -")]
    description: Annotated[Any, Hint("models do not read it")] = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema"), Used("the JSON Schema")] = None
    strict: Annotated[Any, Hint("every schema is enforced", (True, False))] = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON under a schema."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"], Used("`text`, `json_object` or `json_schema`")
    ]
    json_schema: Annotated[JsonSchema | None, Used("with type `json_schema`")] = None


async def answer_grammar(response_format: ResponseFormat | None) -> Grammar | None:
    """Return the grammar of the answer; None for any text. APIError 400 where it cannot be enforced."""
    if response_format is None:
        return None
    param = "response_format.json_schema"
    if response_format.json_schema is not None and response_format.type != "json_schema":
        raise invalid_value(param, f"belongs to type json_schema, not {response_format.type}")
    if response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return await checked_schema({"type": "object"}, "response_format")
    if response_format.json_schema is None:
        raise missing_parameter(param)
    if response_format.json_schema.schema_ is None:
        raise missing_parameter(f"{param}.schema")
    return await checked_schema(response_format.json_schema.schema_, f"{param}.schema")


async def checked_schema(schema: dict[str, Any], param: str) -> Grammar:
    """Return the grammar of JSON under a schema. APIError 400 where the schema cannot be enforced."""

    def check() -> Grammar:
        grammar = Grammar.json_schema(schema)
        grammar.check()
        return grammar

    try:
        # Compiling can take a while; other requests do not wait for it.
        return await asyncio.to_thread(check)
    except (GrammarError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise APIError(
            400, f"{param} cannot be enforced: {reason}"[:1000], param=param, code="invalid_json_schema"
        ) from problem
