"""Validate JSON under a JSON Schema (2020-12), numbers as they are written."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tercet.engine.schema_merge import RefusedError, modernized

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator

_CHECKED = 64  # schemas whose validator is kept


def violation(schema: str, text: str) -> str:
    """Return why a JSON text is not valid under a schema, with the place, or "" where it is.

    Formats count, unknown ones excepted. A schema that has no validator allows everything; a text that is no
    JSON, such as the beginning of one, is not judged.
    """
    try:
        value = json.loads(text, parse_float=_decimal)
        validator = _validator(schema)
    except (json.JSONDecodeError, RefusedError):
        return ""
    except (ValueError, RecursionError) as problem:
        return str(problem)
    for error in validator.iter_errors(value):
        place = ".".join(map(str, error.instance_path))
        message = error.message.partition("\n")[0][:300]
        return f"{place}: {message}" if place else message
    return ""


def check_validator(schema: str) -> None:
    """Raise RefusedError where there is no validator for a schema."""
    _validator(schema)


def malformed(schema: Any) -> str:
    """Return why a schema is none of 2020-12, with the place, or "" where it is one."""
    import jsonschema_rs

    unversioned = {key: value for key, value in schema.items() if key != "$schema"}
    try:
        jsonschema_rs.meta.validate(unversioned)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        place = ".".join(map(str, getattr(error, "instance_path", ())))
        message = str(getattr(error, "message", error)).partition("\n")[0][:300]
        return f"{place}: {message}" if place else message
    return ""


def is_valid(schema: Any, value: Any, root: Any) -> bool:
    """Return whether a value is valid under a part of the schema ``root``; False where that can't be told."""
    definitions = {
        key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root
    }
    whole = schema if isinstance(schema, bool) else {**definitions, **schema}
    try:
        return bool(_validator(json.dumps(whole)).is_valid(value))
    except RefusedError:
        return False


@lru_cache(_CHECKED)
def _validator(schema: str) -> Draft202012Validator:
    import jsonschema_rs

    loaded = modernized(json.loads(schema))
    if isinstance(loaded, dict):
        loaded.pop("$schema", None)
    try:
        return jsonschema_rs.Draft202012Validator(loaded, validate_formats=True, offline=True)
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        raise RefusedError(str(error).partition("\n")[0]) from error


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f"{text} is too large a number") from error
