"""The form of answers: the grammar that enforces it, and the value that a text of that form stands for."""

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
    """The requested form of an answer.

    option: which of OPTIONS requests it.
    grammar: enforces it.
    schema: the JSON Schema, where that is the form.
    model: the pydantic class of the schema, where the form is a class.
    """

    option: str
    grammar: Grammar
    schema: dict[str, Any] | None = None
    model: type[BaseModel] | None = None

    def response_format(self) -> dict[str, Any]:
        """Return the form in OpenAI's protocol; it must be a schema.

        A dict is sent unchanged. A class's schema is made strict, as by the ``openai`` client:
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
        """Set ``completion.parsed``; without a schema do nothing.

        A class validates the whole answer, and so does a dict: a grammar can't hold all of a JSON Schema.

        Raises:
            OutputError: the text does not match the schema, for example because it was cut off.
        """
        if self.schema is None:
            return
        try:
            parsed = self._parsed(completion.text)
        except (ValueError, RecursionError) as problem:
            if completion.finish_reason == "length":
                message = _cut_off(completion)
            else:
                form = f"a {self.model.__name__}" if self.model else "JSON"
                message = f"the answer is not {form}: {_reason(problem)}; it begins {completion.text[:60]!r}"
            raise OutputError(message, completion) from problem
        if self.model is None and (reason := self.grammar.violation(completion.text)):
            raise OutputError(f"the answer is not valid under the schema: {reason}", completion)
        completion.parsed = parsed

    def _parsed(self, text: str) -> Any:
        if self.model is not None:
            return self.model.model_validate_json(text)
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def requested_output(
    schema: Schema | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
) -> Output | None:
    """Return the requested form of the answer; None for any text.

    Args:
        schema: a pydantic class, or a JSON Schema as a dict.
        regex: a regular expression that matches the whole answer.
        choices: the texts, one of which is the answer.
        grammar: a grammar in Lark syntax.

    Raises:
        UserError: more than one form is requested, or one has a wrong type.
    """
    values = zip(OPTIONS, (schema, regex, choices, grammar), strict=True)
    requested = [option for option, value in values if value is not None]
    if len(requested) > 1:
        raise UserError(
            f"{' and '.join(f'`{option}`' for option in requested)} contradict each other; an answer has one "
            f"form, so use at most one of {', '.join(f'`{option}`' for option in OPTIONS)}"
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
            f"`schema` is {schema!r:.60}; it must be a pydantic BaseModel class or a JSON Schema as a dict"
        )
    from pydantic import BaseModel
    from pydantic.errors import PydanticUserError

    if not issubclass(schema, BaseModel):
        raise GrammarError(
            f"`schema` is the class {schema.__name__}; it must be a subclass of pydantic's BaseModel"
        )
    try:
        json_schema = _class_schema(schema)
    except PydanticUserError as problem:  # a field of a type that JSON cannot express
        raise GrammarError(f"{schema.__name__} has no JSON schema: {_reason(problem)}") from problem
    return Output("schema", Grammar.json_schema(json_schema), json_schema, schema)


def _class_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a class.

    pydantic allows a Decimal as a number or as any string, of which few are decimals; here it is a number,
    which pydantic reads from its text and so does not round.
    """
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
    from pydantic_core import core_schema

    class Generator(GenerateJsonSchema):
        def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
            general = super().decimal_schema(schema)
            numbers = [part for part in general.get("anyOf", []) if part.get("type") == "number"]
            if not numbers:
                return general
            places = schema.get("decimal_places")
            step = {} if places is None or "multipleOf" in numbers[0] else {"multipleOf": 10.0**-places}
            bounded: JsonSchemaValue = numbers[0] | step
            return bounded

    schema: dict[str, Any] = model.model_json_schema(schema_generator=Generator)
    return schema


def _cut_off(completion: Completion) -> str:
    """Return the message about an answer that reached its limit before its JSON was complete."""
    count = completion.usage.completion_tokens
    if unit := repeated(completion.text):
        return (
            f"the answer repeats {unit[:40]!r} without end, and was cut off after {count} tokens; more tokens would "
            "not complete its JSON: bound the schema (maxLength, maxItems, maximum), raise `repetition_penalty`, "
            "or use another model"
        )
    return (
        f"the answer was cut off after {count} tokens, before its JSON was complete; raise `max_tokens` (or "
        "shorten the prompt, where the context is full)"
    )


def repeated(text: str) -> str:
    """Return the text that is repeated at the end of ``text``, eight times or more in 40 characters; or ""."""
    for length in range(1, len(text) // 8 + 1):
        unit = text[-length:]
        times = max(8, -(-40 // length))
        if text.endswith(unit * times):
            return unit
    return ""


def _reason(problem: Exception) -> str:
    """Return the first mistake in one line."""
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
