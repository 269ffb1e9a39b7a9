"""JSON Schemas as Lark rules, where llguidance's own reading of the schema is wrong or refused.

Parts that llguidance reads correctly stay JSON Schemas inside of the rules. The rest is written out:
numbers within bounds (`tercet.engine.number_bounds`), objects whose properties are counted or have
patterns, lists without repetition, keys with a form, and everything around these.

What no rule can hold is left out of the rules and named in `SchemaRules.unheld`. Then a text of the
grammar may still violate the schema, and has to be validated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from tercet.engine.number_bounds import Bounds, UnsatisfiableError, number_texts
from tercet.engine.schema_check import is_valid
from tercet.engine.schema_containers import ENDLESS, UNHELD, ContainerRules, literal
from tercet.engine.schema_keys import held
from tercet.engine.schema_merge import (
    ANNOTATIONS,
    RefusedError,
    constraints,
    endless_references,
    intersection,
    parts,
    resolve,
)

TYPES = ("null", "boolean", "number", "string", "array", "object")
NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Keywords that decide about a form that rules can't express; a schema that has one is refused.
REFUSED = ("not", "if", "then", "else", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties")
_BY_TYPE = {
    "null": (),
    "boolean": (),
    "number": NUMBER,
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", *UNHELD[:3]),
    "object": (
        *("properties", "patternProperties", "additionalProperties", "required", "propertyNames"),
        *("minProperties", "maxProperties", "dependentRequired"),
    ),
}
_TROUBLE = (
    *NUMBER,
    *UNHELD,
    "patternProperties",
    "minProperties",
    "maxProperties",
    "propertyNames",
    "uniqueItems",
)
_EXACT = 2**53  # llguidance reads the numbers of a schema as doubles
_RULES = 20_000
_NAME = re.compile(r"[A-Za-z]+_[0-9]+(?:_[a-z]+)?")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def is_troubled(schema: Any) -> bool:
    """Return whether llguidance may read a schema wrongly, or refuse it although rules can hold it."""
    if not isinstance(schema, Mapping):
        return False
    if any(key in schema for key in _TROUBLE):
        return True
    if isinstance(schema.get("pattern"), str) and held(schema["pattern"]) != schema["pattern"]:
        return True
    numbers = [schema.get("const"), *(schema["enum"] if isinstance(schema.get("enum"), list) else ())]
    if any(isinstance(value, int) and abs(value) > _EXACT for value in numbers):
        return True
    return any(is_troubled(part) for _, part in parts(schema))


class SchemaRules(ContainerRules):
    """The rules of one schema.

    Args:
        root: the schema, in the words of 2020-12.
        refusal: returns why llguidance refuses a schema, or "".
        layout: the value of ``x-guidance``.

    Attributes:
        unheld: keywords of the schema that the rules do not hold.

    Raises:
        RefusedError: a part of the schema can't be held.
        UnsatisfiableError: no value is valid.
    """

    def __init__(self, root: Any, refusal: Callable[[Any], str], layout: Mapping[str, Any]) -> None:
        self.root, self.refusal, self._layout = root, refusal, layout
        self._endless = endless_references(root)
        self._ending: set[str] = set()  # schemas that have a value with an end
        while True:
            self._names: dict[str, str] = {}  # the rule of each schema
            self._bodies: dict[str, str] = {}
            self._failed: dict[str, UnsatisfiableError] = {}
            self.unheld: set[str] = set()
            known = len(self._ending)
            try:
                self._start, failure = self.rule(root), None
            except UnsatisfiableError as error:
                failure = error
            if len(self._ending) == known:
                break
        if failure is not None:
            raise failure

    def lark(self) -> str:
        """Return the grammar."""
        lines, waiting = {}, [self._start]
        while waiting:
            name = waiting.pop()
            if name not in lines:
                lines[name] = self._bodies[name]
                waiting += [
                    other for other in _NAME.findall(_STRING.sub("", lines[name])) if other in self._bodies
                ]
        return "\n".join([f"start: {self._start}", *(_line(*line) for line in lines.items())])

    # Rules

    def rule(self, schema: Any) -> str:
        """Return the name of the rule of a schema.

        A schema may refer to itself. Whether a value of it has an end is not known at first, so a reference
        to it from inside counts as without a value; what has a value even so is known in the next round.
        """
        key = json.dumps(schema)
        if key in self._failed:
            raise self._failed[key]
        if key not in self._names:
            if len(self._names) >= _RULES:
                raise RefusedError("the schema is too large, or refers to itself with sibling keys")
            name = self._names[key] = f"value_{len(self._names)}"
            try:
                self._bodies[name] = self._body(schema)
            except UnsatisfiableError as error:
                self._failed[key] = error
                raise
            self._ending.add(key)
        elif self._names[key] not in self._bodies and key not in self._ending:
            raise UnsatisfiableError(ENDLESS)
        return self._names[key]

    def new(self, body: str, kind: str = "part") -> str:
        """Return the name of a new rule, or of a terminal where ``kind`` is in capitals."""
        name = f"{kind}_{len(self._bodies)}"
        self._bodies[name] = body
        return name

    def define(self, name: str, body: str) -> None:
        """Add a rule with a parameter under a name that `new` returned, with an ending."""
        self._bodies[name] = body

    def _body(self, schema: Any) -> str:
        """Return the body of a schema's rule."""
        if schema is False:
            raise UnsatisfiableError("schema is false")
        if schema is True:
            return self.leaf({})
        if not isinstance(schema, dict):
            raise RefusedError("a schema must be an object or a boolean")
        if refused := [key for key in REFUSED if key in schema]:
            raise RefusedError(f'JSON Schema keyword "{refused[0]}" is not supported')
        if (leaf := self._whole(schema)) is not None:
            return leaf
        schema = constraints(schema)
        if "$ref" in schema:
            target = resolve(self.root, schema["$ref"])
            others = {key: value for key, value in schema.items() if key != "$ref"}
            return self.rule(intersection(others, target, self.root) if others else target)
        if "allOf" in schema:
            result: Any = {key: value for key, value in schema.items() if key != "allOf"}
            for part in schema["allOf"]:
                result = intersection(result, part, self.root)
            return self.rule(result)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._choice(key, schema)
        if "const" in schema or "enum" in schema:
            return self._literals(schema)
        return self._typed(schema)

    def _whole(self, schema: dict[str, Any]) -> str | None:
        """Return a schema that llguidance reads correctly as a part of a rule; None for another."""
        definitions = self._definitions(schema)
        if definitions is None or is_troubled(schema) or any(map(is_troubled, definitions.values())):
            return None
        if self._endless.intersection(definitions):
            return None
        whole: dict[str, Any] = dict(constraints(schema))
        for pointer, part in definitions.items():
            home, _, name = pointer[2:].partition("/")
            whole.setdefault(home, {})[name] = part
        reason = self.refusal(whole)
        if reason.startswith("Unsatisfiable schema"):
            raise UnsatisfiableError(reason.partition(": ")[2] or reason)
        return None if reason else self.leaf(whole)

    def _definitions(self, schema: Any) -> dict[str, Any] | None:
        """Return the definitions that a schema refers to, by pointer; None where a reference is another."""
        found: dict[str, Any] = {}
        waiting = [schema]
        while waiting:
            part = waiting.pop()
            waiting += [inner for _, inner in parts(constraints(part))] if isinstance(part, dict) else []
            reference = part.get("$ref") if isinstance(part, dict) else None
            if reference is None or reference in found:
                continue
            home, _, name = str(reference)[2:].partition("/")
            if home not in ("$defs", "definitions") or not name or "/" in name or "~" in name or "%" in name:
                return None
            found[reference] = resolve(self.root, reference)
            waiting.append(found[reference])
        return found

    def leaf(self, schema: dict[str, Any]) -> str:
        """Return a JSON Schema as a part of a rule."""
        return f"%json {json.dumps({**schema, 'x-guidance': self._layout})}"

    def _alternatives(self, options: Iterable[Callable[[], str]], what: str) -> str:
        """Return the alternatives of which at least one has a value."""
        bodies: list[str] = []
        reason = f"no {what}"
        for option in options:
            try:
                bodies.append(option())
            except UnsatisfiableError as error:
                reason = str(error)
        if not bodies:
            raise UnsatisfiableError(reason)
        return " | ".join(dict.fromkeys(bodies))

    def _choice(self, key: str, schema: dict[str, Any]) -> str:
        """Return the alternatives of ``anyOf`` or ``oneOf``, each with the keywords beside it."""
        beside = {name: value for name, value in schema.items() if name != key}
        choices = [intersection(beside, choice, self.root) for choice in schema[key]]
        if key == "oneOf" and self.refusal(self._untroubled({"oneOf": schema[key]})):
            self.unheld.add("oneOf")
        return self._alternatives((partial(self.rule, choice) for choice in choices), f"choice of {key}")

    def _untroubled(self, schema: Any) -> Any:
        """Return a schema without the parts that llguidance refuses: one of more values."""
        if isinstance(schema, list):
            return [self._untroubled(part) for part in schema]
        if not isinstance(schema, dict):
            return schema
        return {key: self._untroubled(value) for key, value in schema.items() if key not in _TROUBLE} | {
            key: self.root[key] for key in ("$defs", "definitions") if "oneOf" in schema and key in self.root
        }

    def _literals(self, schema: dict[str, Any]) -> str:
        """Return the values of ``enum`` or ``const`` that the keywords beside it allow."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        beside = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        valid = [value for value in values if is_valid(beside, value, self.root)]
        if not valid:
            raise UnsatisfiableError("no value of enum is valid under the keywords beside it")
        return self.new(
            " | ".join(literal(json.dumps(value, ensure_ascii=False)) for value in valid), "LITERAL"
        )

    def _typed(self, schema: dict[str, Any]) -> str:
        """Return the alternatives of a schema by type, each with the keywords about it."""
        types = schema.get("type", TYPES)
        names = [types] if isinstance(types, str) else list(types)
        if "number" in names and "integer" in names:
            names.remove("integer")
        if unknown := [name for name in names if name not in (*TYPES, "integer")]:
            raise RefusedError(f"Invalid type: {unknown[0]}")

        def of_type(name: str) -> str:
            own = {
                key: schema[key] for key in _BY_TYPE["number" if name == "integer" else name] if key in schema
            }
            if not own:
                return self.leaf({"type": name})
            if name in ("number", "integer"):
                return self._number(own, name == "integer")
            return {"string": self._string, "array": self.array, "object": self.object_}[name](own)

        return self._alternatives((partial(of_type, name) for name in names), "type")

    # Scalars

    def _number(self, schema: dict[str, Any], whole: bool) -> str:
        """Return the alternatives of a number within bounds."""
        try:
            texts = number_texts(Bounds.of(schema, whole))
        except UnsatisfiableError:
            raise
        except ValueError as error:
            raise RefusedError(str(error)) from error
        alternatives = []
        for text in texts:
            if text.multiples is None:
                alternatives.append(self.new(" & ".join(f"/{part}/" for part in text.patterns), "NUMBER"))
            else:
                sign = f"{literal(text.sign)} " if text.sign else ""
                alternatives.append(sign + self.leaf(text.multiples))
        return " | ".join(alternatives)

    def _string(self, schema: dict[str, Any]) -> str:
        """Return a string; a pattern or a format that no expression can hold is left out."""
        own = {"type": "string", **schema}
        if isinstance(own.get("pattern"), str):
            own["pattern"] = held(own["pattern"])
        for left_out in ((), ("format",), ("pattern",), ("pattern", "format")):
            reduced = {key: value for key, value in own.items() if key not in left_out}
            reason = self.refusal(reduced)
            if not reason:
                self.unheld |= {key for key in left_out if key in own}
                return self.leaf(reduced)
            if reason.startswith("Unsatisfiable schema"):
                raise UnsatisfiableError(reason.partition(": ")[2])
        raise RefusedError(reason)


def _line(name: str, body: str) -> str:
    return f"{name}{'::_' if name.startswith('distinct_') else ''}: {body}"
