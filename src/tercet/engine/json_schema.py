"""JSON Schemas as llguidance compiles them: their layout, their closed objects, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tercet.engine.guidance import first_line, refusal

# One layout, that of Python's json.dumps. With free whitespace a weak model writes blanks without end, and
# no text between two values is certain, so none of it could be written without running the model.
JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# Keywords whose values contain schemas: by name, in a list, and directly.
_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
# Keywords beside ``properties`` that decide about further properties, or combine the object with others.
_OPENING = ("additionalProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref", "minProperties")
_UNSATISFIABLE = "Unsatisfiable schema"


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


def located_refusal(schema: Any) -> str:
    """Return as `schema_refusal`, preceded by the path of the innermost part that causes the refusal."""
    reason = schema_refusal(schema)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return reason and _locate(schema, definitions, reason, "schema")


def _locate(schema: dict[str, Any], definitions: dict[str, Any], reason: str, path: str) -> str:
    """Return path and reason of the innermost part that llguidance refuses for the same ``reason``.

    A part may refer to ``definitions`` of the whole schema.
    """
    for name, part in _parts(schema):
        part_reason = schema_refusal({**definitions, **part})
        # llguidance words the error of an unsatisfiable part differently for the schema around it.
        unsatisfiable = part_reason.startswith(_UNSATISFIABLE) and reason.startswith(_UNSATISFIABLE)
        if part_reason == reason or unsatisfiable:
            return _locate(part, definitions, part_reason, f"{path}.{name}")
    return f"{path}: {reason}"


def close_objects(schema: Any) -> Any:
    """Return the schema with ``additionalProperties: false`` in objects that do not mention it.

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
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _close(part) for name, part in schema[key].items()}
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            closed[key] = [_close(part) for part in schema[key]]
    for key in _SINGLE:
        if key in schema:
            closed[key] = _close(schema[key])
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return closed
    if not any(key in schema for key in _OPENING) and all(name in properties for name in required):
        closed["additionalProperties"] = False
    return closed


def _all_parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the schema and all schemas inside of it."""
    yield schema
    for _, part in _parts(schema):
        yield from _all_parts(part)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas directly inside of a schema, each with its path."""
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from (
                (f"{key}.{name}", part) for name, part in schema[key].items() if isinstance(part, dict)
            )
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            parts = enumerate(schema[key])
            yield from ((f"{key}[{number}]", part) for number, part in parts if isinstance(part, dict))
    yield from ((key, schema[key]) for key in _SINGLE if isinstance(schema.get(key), dict))
