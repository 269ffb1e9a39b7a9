"""Check JSON values against the part of JSON Schema (2020-12) that describes data.

Unsupported keywords (references, conditionals, formats) are rejected when the schema is read. If they
were ignored, wrong answers would count as correct.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from tercet.errors import UserError

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LISTS = ("anyOf", "oneOf", "allOf")
_KEYWORDS = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "uniqueItems",
    "pattern", "not", *_COUNTS, *_NUMBERS, *_LISTS,
}  # fmt: skip


def check_schema(schema: Any, where: str = "schema") -> None:
    """Raise UserError, with the place in the schema, for a keyword or a value that `conforms` does not support."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{where}: a schema is an object, not a {type(schema).__name__}")
    for key, value in schema.items():
        place = f"{where}.{key}"
        if key in _ANNOTATIONS:
            continue
        if key not in _KEYWORDS:
            raise UserError(f"{where}: the JSON Schema keyword {key!r} is not supported")
        if key == "type":
            for name in value if isinstance(value, list) else [value]:
                if name not in _TYPES:
                    raise UserError(
                        f"{place}: {name!r} is not a JSON type; the types are {', '.join(_TYPES)}"
                    )
        elif key == "properties":
            if not isinstance(value, dict):
                raise UserError(f"{place} must be an object")
            for name, inner in value.items():
                check_schema(inner, f"{place}.{name}")
        elif key in _LISTS:
            if not isinstance(value, list) or not value:
                raise UserError(f"{place} must be a list of schemas")
            for index, inner in enumerate(value):
                check_schema(inner, f"{place}[{index}]")
        elif key in ("items", "additionalProperties", "not"):
            check_schema(value, place)
        elif key == "required" and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            raise UserError(f"{place} must be a list of names")
        elif key == "enum" and not isinstance(value, list):
            raise UserError(f"{place} must be a list of values")
        elif key in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UserError(f"{place} must be a whole number")
        elif key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{place} must be a number")
        elif key == "uniqueItems" and not isinstance(value, bool):
            raise UserError(f"{place} must be true or false")
        elif key == "pattern":
            try:
                re.compile(value)
            except (re.error, TypeError) as problem:
                raise UserError(f"{place} is not a regular expression: {problem}") from problem


def conforms(value: Any, schema: Any) -> bool:
    """Return whether a parsed JSON value is valid under a schema that passed `check_schema`."""
    if isinstance(schema, bool):
        return schema
    kinds = schema.get("type")
    if kinds is not None and not any(
        _is(value, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])
    ):
        return False
    if "enum" in schema and canonical(value) not in [canonical(choice) for choice in schema["enum"]]:
        return False
    if "const" in schema and canonical(value) != canonical(schema["const"]):
        return False
    combined = (
        all(conforms(value, inner) for inner in schema.get("allOf", []))
        and ("anyOf" not in schema or any(conforms(value, inner) for inner in schema["anyOf"]))
        and ("oneOf" not in schema or sum(conforms(value, inner) for inner in schema["oneOf"]) == 1)
        and ("not" not in schema or not conforms(value, schema["not"]))
    )
    if not combined:
        return False
    if isinstance(value, str):
        return _within(len(value), schema, "Length") and (
            "pattern" not in schema or re.search(schema["pattern"], value) is not None
        )
    if isinstance(value, dict):
        return _object(value, schema)
    if isinstance(value, list):
        keys = [canonical(item) for item in value]
        return (
            _within(len(value), schema, "Items")
            and all(conforms(item, schema.get("items", True)) for item in value)
            and not (schema.get("uniqueItems") and len(set(keys)) < len(keys))
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        return bool(low <= value <= high and above < value < below)
    return True


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer in JSON Schema
    return isinstance(value, _TYPES[kind])


def _within(count: int, schema: dict[str, Any], noun: str) -> bool:
    return bool(schema.get(f"min{noun}", 0) <= count <= schema.get(f"max{noun}", math.inf))


def _object(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    named = schema.get("properties", {})
    additional = schema.get("additionalProperties", True)
    return (
        _within(len(value), schema, "Properties")
        and all(name in value for name in schema.get("required", []))
        and all(conforms(inner, named.get(name, additional)) for name, inner in value.items())
    )


def canonical(value: Any) -> str:
    """Return JSON text that is equal for equal values: keys are sorted, 1 equals 1.0, and 1 does not equal true."""
    return json.dumps(_whole(value), ensure_ascii=False, sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return value


def parse_json(text: str) -> tuple[bool, Any]:
    """Return (whether ``text`` is JSON, its value). NaN and Infinity are not JSON, though Python reads them."""
    try:
        return True, json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, None


def _refuse(name: str) -> Any:
    raise ValueError(name)
