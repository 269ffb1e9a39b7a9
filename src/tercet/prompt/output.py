"""Answers of a given form: the grammar that holds a model to it, and what the text then stands for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.request import Completion
from tercet.errors import UserError
from tercet.prompt.errors import OutputError

if TYPE_CHECKING:
    from pydantic import BaseModel

    Schema: TypeAlias = type[BaseModel] | Mapping[str, Any]

OPTIONS = ("schema", "regex", "choices", "grammar")


@dataclass(frozen=True)
class Output:
    """The form of an answer, as the user asked for it.

    option: which of OPTIONS it was asked with.
    schema: a JSON Schema, where that is the form; ``model``: the pydantic class it is the schema of.
    """

    option: str
    grammar: Grammar
    schema: dict[str, Any] | None = None
    model: type[BaseModel] | None = None

    def response_format(self) -> dict[str, Any]:
        """The form in OpenAI's protocol, with a schema only.

        A dict is sent as it is. A class's schema is made strict, as the ``openai`` client does it:
        every object closed, every property required.
        """
        assert self.schema is not None
        schema, title = self.schema, self.schema.get("title")
        if self.model is not None:
            from openai import pydantic_function_tool

            function = pydantic_function_tool(self.model)["function"]
            schema, title = cast("dict[str, Any]", function["parameters"]), self.model.__name__
        name = re.sub(r"[^A-Za-z0-9_-]", "_", title)[:64] if isinstance(title, str) else ""
        return {
            "type": "json_schema",
            "json_schema": {"name": name or "answer", "schema": schema, "strict": True},
        }

    def parse(self, completion: Completion) -> None:
        """Set ``completion.parsed``; nothing to do without a schema.

        A class checks everything it knows. Of a dict only the JSON is read: a local model is held to the
        schema token by token, and a server has promised to.

        Raises:
            OutputError: the text is not what was asked for, being cut off or for another reason.
        """
        if self.schema is None:
            return
        try:
            completion.parsed = self._parsed(completion.text)
        except (ValueError, RecursionError) as problem:
            if completion.finish_reason == "length":
                message = (
                    f"the answer was cut off after {completion.usage.completion_tokens} tokens, before its JSON "
                    "was complete; raise max_tokens (or shorten the prompt, where the context is full)"
                )
            else:
                what = f"a {self.model.__name__}" if self.model else "JSON"
                message = f"the answer is not {what}: {_why(problem)}; it begins {completion.text[:60]!r}"
            raise OutputError(message, completion) from problem

    def _parsed(self, text: str) -> Any:
        if self.model is not None:
            return self.model.model_validate_json(text)
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def wanted_output(
    schema: Schema | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
) -> Output | None:
    """What is asked for; None when nothing is.

    Args:
        schema: a pydantic class, or a JSON Schema as a dict.
        regex: a regular expression that matches the whole answer.
        choices: the texts of which the answer is one.
        grammar: a grammar in Lark syntax.

    Raises:
        UserError: more than one is given, or one is of a wrong type.
    """
    every = zip(OPTIONS, (schema, regex, choices, grammar), strict=True)
    given = [option for option, value in every if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} are given; an answer has one form, so give at most one of {', '.join(OPTIONS)}"
        )
    if regex is not None:
        return Output("regex", Grammar.regex(regex))
    if choices is not None:
        return Output("choices", Grammar.choices(choices))
    if grammar is not None:
        return Output("grammar", Grammar.lark(grammar))
    return None if schema is None else _schema_output(schema)


def _schema_output(schema: object) -> Output:
    if isinstance(schema, Mapping):
        return Output("schema", Grammar.json_schema(schema), dict(schema))
    if not isinstance(schema, type):
        raise GrammarError(
            f"schema is {schema!r:.60}; it must be a pydantic BaseModel class or a JSON Schema as a dict"
        )
    from pydantic import BaseModel
    from pydantic.errors import PydanticUserError

    if not issubclass(schema, BaseModel):
        raise GrammarError(f"schema is the class {schema.__name__}; it must be one of pydantic's BaseModel")
    try:
        made = schema.model_json_schema()
    except PydanticUserError as problem:  # a field of a type that JSON has nothing for
        raise GrammarError(f"{schema.__name__} has no JSON schema: {_why(problem)}") from problem
    return Output("schema", Grammar.json_schema(made), made, schema)


def _why(problem: Exception) -> str:
    """The first thing that is wrong, in one line."""
    from pydantic import ValidationError

    if isinstance(problem, ValidationError):
        first = problem.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    return str(problem).strip().partition("\n")[0]


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value
