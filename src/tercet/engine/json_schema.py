"""JSON Schemas as grammars: their layout, their closed objects, and what is wrong with them.

llguidance reads a schema itself where it reads it correctly; otherwise `tercet.engine.schema_rules` writes
it as rules of Lark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tercet.engine.guidance import first_line, refusal
from tercet.engine.number_bounds import UnsatisfiableError
from tercet.engine.schema_check import check_validator, malformed
from tercet.engine.schema_merge import (
    LISTS,
    MAPS,
    SINGLE,
    RefusedError,
    endless_references,
    modernized,
    parts,
)
from tercet.engine.schema_rules import SchemaRules, is_troubled

# One layout, that of Python's json.dumps. With free whitespace a weak model writes blanks without end, and
# no text between two values is certain, so none of it could be written without running the model.
JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# Keywords beside ``properties`` that decide about further properties, or combine the object with others.
_OPENING = ("additionalProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref", "minProperties")
_UNSATISFIABLE = "Unsatisfiable schema"
_COMPILED = 64  # schemas whose grammar is kept


@dataclass(frozen=True)
class SchemaGrammar:
    """What became of a JSON Schema.

    schema: as llguidance reads it; None where it is written as rules.
    lark: the rules; "" where there are none.
    unheld: keywords that the grammar does not hold, so that a text has to be validated.
    refusal: why there is no grammar, or "".
    """

    schema: Any = None
    lark: str = ""
    unheld: frozenset[str] = frozenset()
    refusal: str = ""

    def source(self) -> str:
        """Return the source that llguidance compiles."""
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_lark(self.lark) if self.lark else json_source(self.schema)

    def in_lark(self) -> str:
        """Return the grammar as a part of a Lark rule."""
        if self.lark:
            return f"%lark {{\n{self.lark}\n}}"
        return f"%json {json.dumps({'x-guidance': JSON_LAYOUT} | self.schema)}"


@lru_cache(_COMPILED)
def schema_grammar(text: str) -> SchemaGrammar:
    """Return the grammar of a JSON Schema, which is given as JSON."""
    schema = json.loads(text)
    closed = close_objects(schema)
    grammar = _grammar(closed)
    if grammar.refusal and closed != schema:
        grammar = _grammar(schema)
    if grammar.unheld:
        try:
            check_validator(text)
        except RefusedError as error:
            return SchemaGrammar(refusal=str(error))
    return grammar


def _grammar(schema: Any) -> SchemaGrammar:
    """Return the grammar of a schema whose objects are closed or not."""
    if "x-guidance" in schema:  # another layout, of which llguidance alone knows all
        return SchemaGrammar(schema, refusal=schema_refusal(schema))
    reason = schema_refusal(schema)
    modern = modernized(schema)
    try:
        if not reason and not is_troubled(modern) and not endless_references(modern):
            return SchemaGrammar(schema)
        if wrong := malformed(modern):
            return SchemaGrammar(refusal=reason or wrong)
        rules = SchemaRules(modern, schema_refusal, JSON_LAYOUT)
    except UnsatisfiableError as error:
        return SchemaGrammar(refusal=f"{_UNSATISFIABLE}: {error}")
    except RefusedError as error:
        return SchemaGrammar(refusal=str(error))
    grammar = SchemaGrammar(lark=rules.lark(), unheld=frozenset(rules.unheld))
    if reason := refusal(grammar.source()):
        return SchemaGrammar(refusal=reason)
    return grammar


def json_source(schema: Any) -> str:
    """Return llguidance's source of a schema."""
    from llguidance import LLMatcher

    # As defaults: a schema's own "x-guidance" may request another layout.
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_LAYOUT)  # type: ignore[arg-type]


def schema_refusal(schema: Any) -> str:
    """Return why llguidance does not compile a schema, or "" when it does."""
    try:
        return refusal(json_source(schema))
    except ValueError as error:  # the schema is not an object, or its "x-guidance" is invalid
        return first_line(error)


def located_refusal(text: str) -> str:
    """Return why a schema has no grammar, with the path of the innermost part that causes it, or ""."""
    reason = schema_grammar(text).refusal
    schema = json.loads(text)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return reason and _locate(schema, definitions, reason, "schema")


def _locate(schema: dict[str, Any], definitions: dict[str, Any], reason: str, path: str) -> str:
    """Return path and reason of the innermost part that is refused for the same ``reason``.

    A part may refer to ``definitions`` of the whole schema.
    """
    for name, part in parts(schema):
        if not isinstance(part, dict):
            continue
        part_reason = schema_grammar(json.dumps({**definitions, **part})).refusal
        # llguidance words the error of an unsatisfiable part differently for the schema around it.
        unsatisfiable = part_reason.startswith(_UNSATISFIABLE) and reason.startswith(_UNSATISFIABLE)
        if part_reason == reason or unsatisfiable:
            return _locate(part, definitions, part_reason, f"{path}.{name}")
    return f"{path}: {reason}"


def close_objects(schema: Any) -> Any:
    """Return the schema with ``additionalProperties: false`` in objects that do not mention it.

    These are objects with ``properties`` or ``patternProperties``.

    The schema is returned unchanged where that could change more: under oneOf, not and if, a narrower
    part can make the whole wider (except where a discriminator tells the alternatives apart), and allOf
    is meant to add properties.
    """
    for part in _all_parts(schema):
        if any(key in part for key in ("allOf", "not", "if")) or (
            "oneOf" in part and "discriminator" not in part
        ):
            return schema
    return _close(schema)


def _close(schema: Any) -> Any:
    """Return the schema with its objects closed, parts included."""
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = dict(schema)
    for key in MAPS:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _close(part) for name, part in schema[key].items()}
    for key in LISTS:
        if isinstance(schema.get(key), list):
            closed[key] = [_close(part) for part in schema[key]]
    for key in SINGLE:
        if key in schema:
            closed[key] = _close(schema[key])
    properties, required = schema.get("properties"), schema.get("required", [])
    if properties is None and isinstance(schema.get("patternProperties"), dict):
        properties = {}
    if not isinstance(properties, dict) or not isinstance(required, list):
        return closed
    if not any(key in schema for key in _OPENING) and all(name in properties for name in required):
        closed["additionalProperties"] = False
    return closed


def _all_parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the schema and all schemas inside of it that are objects."""
    if isinstance(schema, dict):
        yield schema
        for _, part in parts(schema):
            yield from _all_parts(part)
