"""JSON Schemas as data: their parts, their references, older drafts, and the intersection of two schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

# Keywords whose values contain schemas: by name, in a list, and directly.
MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")
# Keywords that say nothing about which values are valid.
ANNOTATIONS = frozenset({
    "$anchor", "$defs", "definitions", "$schema", "$id", "id", "$comment", "title", "description", "default",
    "readOnly", "writeOnly", "examples", "contentMediaType", "contentEncoding", "contentSchema", "deprecated",
    "discriminator", "x-guidance",
})  # fmt: skip


class RefusedError(ValueError):
    """A schema that no grammar can hold; the message says why."""


def parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly inside of a schema, each with its path."""
    if not isinstance(schema, Mapping):
        return
    for key in MAPS:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}.{name}", part) for name, part in schema[key].items())
    for key in LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}[{number}]", part) for number, part in enumerate(schema[key]))
    yield from ((key, schema[key]) for key in SINGLE if key in schema)


def constraints(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a schema that decide which values are valid."""
    return {key: value for key, value in schema.items() if key not in ANNOTATIONS}


def resolve(root: Any, reference: object) -> Any:
    """Return the schema that a ``$ref`` of the document ``root`` refers to.

    Raises:
        RefusedError: the reference leaves the document, or there is nothing in its place.
    """
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise RefusedError(f"the reference {reference!r:.60} is not in this schema")
    part = root
    for step in filter(None, reference[1:].split("/")):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(part, dict) and name in part:
            part = part[name]
        elif isinstance(part, list) and name.isdigit() and int(name) < len(part):
            part = part[int(name)]
        else:
            raise RefusedError(f"Pointer '{reference[1:]}' does not exist")
    return part


def modernized(schema: Any) -> Any:
    """Return a schema of an older draft in the words of 2020-12.

    Draft 4's boolean exclusive bounds become numbers, a list of ``items`` becomes ``prefixItems``, and
    ``dependencies`` is divided in two.
    """
    if not isinstance(schema, dict):
        return schema
    new: dict[str, Any] = {}
    for key, value in schema.items():
        if key in (*MAPS, "dependencies") and isinstance(value, dict):
            new[key] = {name: modernized(part) for name, part in value.items()}
        elif (key in LISTS or key == "items") and isinstance(value, list):
            new[key] = [modernized(part) for part in value]
        elif key in (*SINGLE, "additionalItems"):
            new[key] = modernized(value)
        else:
            new[key] = value
    for plain, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(new.get(exclusive), bool) and new.pop(exclusive) and plain in new:
            new[exclusive] = new.pop(plain)
    if isinstance(new.get("items"), list):
        new["prefixItems"] = new.pop("items")
        if "additionalItems" in new:
            new["items"] = new.pop("additionalItems")
    if isinstance(dependencies := new.get("dependencies"), dict):
        del new["dependencies"]
        lists = {name: value for name, value in dependencies.items() if isinstance(value, list)}
        schemas = {name: value for name, value in dependencies.items() if not isinstance(value, list)}
        new |= {"dependentRequired": lists} if lists else {}
        new |= {"dependentSchemas": schemas} if schemas else {}
    return new


def endless_references(root: Any) -> set[str]:
    """Return the references to schemas all of whose values contain another one without end.

    That is so where a required part refers back to the whole: no text can end.
    """
    known: dict[str, bool] = {}

    def ends(schema: Any) -> bool:
        """Return whether a value has an end, as far as `known` tells."""
        if not isinstance(schema, dict):
            return schema is not False
        if isinstance(reference := schema.get("$ref"), str) and not known[reference]:
            return False
        if not all(ends(part) for part in schema.get("allOf") or ()):
            return False
        for key in ("anyOf", "oneOf"):
            if isinstance(choices := schema.get(key), list) and not any(map(ends, choices)):
                return False
        if schema.get("type", "object") == "object" and "type" in schema:
            properties = schema.get("properties")
            required = schema.get("required")
            if isinstance(properties, dict) and isinstance(required, list):
                return all(ends(properties[name]) for name in required if name in properties)
        least = schema.get("minItems")
        if schema.get("type") == "array" and isinstance(least, int) and least > 0:
            first = schema.get("prefixItems")
            first = first[:least] if isinstance(first, list) else []
            return all(map(ends, first)) and (len(first) >= least or ends(schema.get("items", True)))
        return True

    def references(schema: Any) -> Iterator[str]:
        """Yield the references in a schema."""
        if isinstance(schema, dict):
            if isinstance(schema.get("$ref"), str):
                yield schema["$ref"]
            for _, part in parts(schema):
                yield from references(part)

    waiting = list(references(root))
    while waiting:
        reference = waiting.pop()
        if reference not in known:
            known[reference] = False
            with suppress(RefusedError):
                waiting += references(resolve(root, reference))
    before = None
    while before != known:
        before = dict(known)
        for reference in known:
            try:
                known[reference] = known[reference] or ends(resolve(root, reference))
            except RefusedError:
                known[reference] = True  # reported elsewhere
    return {reference for reference, has_end in known.items() if not has_end}


# Intersection


def intersection(first: Any, second: Any, root: Any) -> Any:
    """Return a schema of the values that are valid under both, or of more where JSON Schema can't say it.

    Properties come in the order of the first schema. Parts are combined by ``allOf``, not at once.

    Raises:
        RefusedError: a reference has no target.
    """
    if first is False or second is False:
        return False
    if first is True or not constraints(first):
        return second
    if second is True or not constraints(second) or first == second:
        return first
    first, second = constraints(_expanded(first, root)), constraints(_expanded(second, root))
    for key in ("anyOf", "oneOf"):
        for one, other, ordered in ((first, second, True), (second, first, False)):
            if key in one:
                rest = {name: value for name, value in one.items() if name != key}
                both = (rest, other) if ordered else (other, rest)
                common = intersection(both[0], both[1], root)
                return {key: [_all_of(common, choice) for choice in one[key]]}
    result = _objects(first, second)
    for key, value in second.items():
        if key in result or key in _OBJECT:
            continue
        result[key] = _combined(key, first[key], value) if key in first else value
    for key, value in first.items():
        if key not in result and key not in _OBJECT:
            result[key] = _combined(key, value, second[key]) if key in second else value
    if result.get("type") is False or result.get("enum") is False:
        return False
    return result


_OBJECT = ("properties", "patternProperties", "additionalProperties")


def _all_of(first: Any, second: Any) -> Any:
    """Return a schema of the values that are valid under both, where possible without ``allOf``."""
    if first is False or second is False:
        return False
    if first is True or first == second or not constraints(first):
        return second
    return first if second is True or not constraints(second) else {"allOf": [first, second]}


def _expanded(schema: dict[str, Any], root: Any, depth: int = 0) -> dict[str, Any]:
    """Return a schema without ``$ref`` and ``allOf`` of its own."""
    if depth > 64:
        raise RefusedError("circular references with sibling keys are not supported")
    if "const" in schema:
        rest = {key: value for key, value in schema.items() if key != "const"}
        schema = rest | {
            "enum": _combined("enum", [schema["const"]], rest.get("enum", [schema["const"]])) or []
        }
    if "$ref" not in schema and "allOf" not in schema:
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
    others = list(schema.get("allOf") or ())
    if "$ref" in schema:
        others.insert(0, resolve(root, schema["$ref"]))
    result: Any = rest
    for other in others:
        if isinstance(other, dict):
            other = _expanded(other, root, depth + 1)
        result = intersection(result, other, root)
    if not isinstance(result, dict):
        return {} if result is True else {"enum": []}
    return _expanded(result, root, depth + 1)


def _objects(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the intersection of the keywords about properties."""
    result: dict[str, Any] = {}
    if any(key in schema for key in _OBJECT for schema in (first, second)):
        named = [schema.get("properties") or {} for schema in (first, second)]
        patterns = [schema.get("patternProperties") or {} for schema in (first, second)]
        others = [schema.get("additionalProperties", True) for schema in (first, second)]
        for key, tables in (("properties", named), ("patternProperties", patterns)):
            names = dict.fromkeys([*tables[0], *tables[1]])
            both = {}
            for name in names:
                sides = [
                    tables[side][name]
                    if name in tables[side]
                    else True
                    if key == "properties" and patterns[side]
                    else others[side]
                    for side in (0, 1)
                ]
                both[name] = _all_of(*sides)
            if both:
                result[key] = both
        if any("additionalProperties" in schema for schema in (first, second)):
            result["additionalProperties"] = _all_of(*others)
    return result


def _combined(key: str, first: Any, second: Any) -> Any:
    """Return the value of a keyword that is as strict as both; False where nothing satisfies both."""
    if first == second:
        return first
    if key == "type":
        names = [name for name in _types(first) if name in _types(second)]
        for one, other in ((first, second), (second, first)):
            if "integer" in _types(one) and "number" in _types(other) and "integer" not in names:
                names.append("integer")
        return (names if len(names) > 1 else names[0]) if names else False
    if key == "enum":
        texts = {json.dumps(value, sort_keys=True) for value in second}
        return [value for value in first if json.dumps(value, sort_keys=True) in texts] or False
    if key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties", "minContains"):
        return max(first, second)
    if key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties", "maxContains"):
        return min(first, second)
    if key == "multipleOf":
        from math import gcd, lcm

        one, other = Fraction(str(first)), Fraction(str(second))
        both = Fraction(lcm(one.numerator, other.numerator), gcd(one.denominator, other.denominator))
        return int(both) if both.denominator == 1 else float(both)
    if key == "required":
        return list(dict.fromkeys([*first, *second]))
    if key == "uniqueItems":
        return first or second
    if key in ("items", "propertyNames"):
        return _all_of(first, second)
    if key == "prefixItems":
        longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
        return [_all_of(part, shorter[n]) if n < len(shorter) else part for n, part in enumerate(longer)]
    return first  # of two patterns, formats and the like the grammar holds the first


def _types(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
