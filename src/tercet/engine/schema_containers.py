"""Rules of lists and objects for `tercet.engine.schema_rules`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tercet.engine.number_bounds import UnsatisfiableError
from tercet.engine.schema_check import is_valid
from tercet.engine.schema_keys import all_texts, held, matches, other_than
from tercet.engine.schema_merge import RefusedError, constraints, intersection, resolve

# Keywords that no rule holds.
UNHELD = ("contains", "minContains", "maxContains", "dependentRequired")
ENDLESS = "every value contains another one of its kind, so no answer can end"
_LONGEST_SET = 64  # the most distinct items of a list that one parameter of a rule can count
_STATES = 65_536  # the most states of the members of one object


class ContainerRules(ABC):
    """Writes lists and objects as rules.

    Attributes:
        root: the whole schema.
        refusal: returns why llguidance refuses a schema, or "".
        unheld: keywords of the schema that the rules do not hold.
    """

    root: Any
    refusal: Callable[[Any], str]
    unheld: set[str]

    @abstractmethod
    def rule(self, schema: Any) -> str:
        """Return the name of the rule of a schema. UnsatisfiableError where it has no value."""

    @abstractmethod
    def new(self, body: str, kind: str = "part") -> str:
        """Return the name of a new rule, or of a terminal where ``kind`` is in capitals."""

    @abstractmethod
    def leaf(self, schema: dict[str, Any]) -> str:
        """Return a JSON Schema as a part of a rule."""

    @abstractmethod
    def define(self, name: str, body: str) -> None:
        """Add a rule with a parameter under a name that `new` returned, with an ending."""

    # Arrays

    def array(self, schema: dict[str, Any]) -> str:
        """Return a list."""
        self.unheld |= {key for key in UNHELD if key in schema}
        first: list[Any] = schema.get("prefixItems") or []
        least, most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        if most is not None and least > most:
            raise UnsatisfiableError(f"minItems ({least}) is greater than maxItems ({most})")
        if schema.get("uniqueItems") and (most is None or most > 1):
            values = None if first else self.finite(schema.get("items", True))
            if values is not None and len(values) <= _LONGEST_SET:
                return self._distinct(values, least, most)
            self.unheld.add("uniqueItems")
        item = None
        if most is None or most > len(first):
            try:
                item = self.rule(schema.get("items", True))
            except UnsatisfiableError:
                if least > len(first):
                    raise
        rest = _repeat(item, max(least - len(first), 0), None if most is None else most - len(first))
        if not first:
            if item is None or most == 0:
                return '"[]"'
            tail = _repeat(item, max(least - 1, 0), None if most is None else most - 1)
            inner = f"{item} {tail}"
            return f'"[" {inner} "]"' if least else f'"[" ({inner})? "]"'
        for number in range(len(first) - 1, -1, -1):
            if most is not None and number >= most:
                rest = ""
                continue
            try:
                part = self.rule(first[number])
            except UnsatisfiableError:
                if number < least:
                    raise
                rest = ""
                continue
            body = f"{literal(', ') if number else ''} {part} {rest}"
            rest = body if number < least else f"({body})?"
        return f'"[" {rest} "]"'

    def finite(self, schema: Any, depth: int = 0) -> list[Any] | None:
        """Return all values of a schema; None where there are too many to list."""
        if not isinstance(schema, dict) or depth > 8:
            return None
        values: list[Any] | None = None
        if "enum" in schema or "const" in schema:
            values = [schema["const"]] if "const" in schema else list(schema["enum"])
        elif schema.get("type") in ("boolean", "null"):
            values = [False, True] if schema["type"] == "boolean" else [None]
        elif "$ref" in schema:
            values = self.finite(resolve(self.root, schema["$ref"]), depth + 1)
        elif isinstance(schema.get("anyOf"), list):
            lists = [self.finite(part, depth + 1) for part in schema["anyOf"]]
            values = None if None in lists else [value for part in lists for value in part or ()]
        if values is None:
            return None
        distinct = {json.dumps(value, sort_keys=True): value for value in values}.values()
        return [value for value in distinct if is_valid(schema, value, self.root)]

    def _distinct(self, values: list[Any], least: int, most: int | None) -> str:
        """Return a list of different values in any order; the bits of a parameter tell which ones it has."""
        if least > len(values):
            raise UnsatisfiableError(f"minItems ({least}) is greater than the number of different items")
        most = len(values) if most is None else min(most, len(values))
        name = self.new("", "distinct")
        for place, before in (("first", ""), ("next", f"{literal(', ')} ")):
            ends = least == 0 if place == "first" else True
            options = [f'"" %if bit_count_ge(_, {least})'] if ends else []
            for bit, value in enumerate(values):
                text = f"{before}{literal(json.dumps(value, ensure_ascii=False))}"
                condition = f"and(bit_clear({bit}), bit_count_lt(_, {most}))"
                options.append(f"{text} {name}_next::set_bit({bit}) %if {condition}")
            self.define(f"{name}_{place}", " | ".join(options))
        return f'"[" {name}_first::0 "]"'

    # Objects

    def object_(self, schema: dict[str, Any]) -> str:
        """Return an object: its named properties in their order, then others."""
        self.unheld |= {key for key in UNHELD if key in schema}
        least, most = _count(schema, "minProperties") or 0, _count(schema, "maxProperties")
        named, others, taken = self._properties(schema)
        members: list[tuple[str, str, bool]] = []
        required = set(schema.get("required") or ())
        for name, part in named.items():
            try:
                members.append((name, self.rule(part), name in required))
            except UnsatisfiableError as error:
                if name in required:
                    if str(error) == ENDLESS:
                        raise
                    raise UnsatisfiableError(f"required property '{name}' is unsatisfiable") from error
        other = self._others(schema, others, taken) if most is None or most > len(required) else None
        return self._members(members, other, least, most)

    def _properties(self, schema: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
        """Return the schemas of properties by name, those of others by pattern, and all names."""
        own: dict[str, Any] = schema.get("properties") or {}
        patterns: dict[str, Any] = schema.get("patternProperties") or {}
        form, rest = schema.get("propertyNames", True), schema.get("additionalProperties", True)
        listed = [name for pattern in patterns for name in all_texts(pattern) or ()]
        allowed = self.finite(form)
        if allowed is not None:
            listed += [name for name in allowed if isinstance(name, str)]
        names = dict.fromkeys([*own, *(schema.get("required") or ()), *listed])
        named: dict[str, Any] = {}
        for name in names:
            part = own.get(name, True)
            matching = [pattern for pattern in patterns if matches(pattern, name)]
            for pattern in matching:
                part = intersection(part, patterns[pattern], self.root)
            if name not in own and not matching:
                part = rest
            named[name] = part if form is True or self._is_valid_name(form, name) else False
        others = {pattern: part for pattern, part in patterns.items() if all_texts(pattern) is None}
        if allowed is not None or form is False:
            others, rest = {}, False
        if len(others) > 1:
            reason = self.refusal({"type": "object", "patternProperties": {key: {} for key in others}})
            if reason:
                raise RefusedError(reason)
        return named, others | ({} if rest is False else {"": rest}), set(names)

    def _is_valid_name(self, form: Any, name: str) -> bool:
        return is_valid(form, name, self.root)

    def _others(self, schema: dict[str, Any], others: dict[str, Any], taken: set[str]) -> str | None:
        """Return one property that is not named; None where there is none."""
        form = schema.get("propertyNames", True)
        patterns = [pattern for pattern in others if pattern]
        if patterns and "" in others:
            # No expression tells the names that match no pattern; a grammar may allow less than the schema.
            with suppress(UnsatisfiableError):
                self.rule(others[""])
                if others[""] is not True:
                    raise RefusedError(
                        "patternProperties beside a schema for additionalProperties is not supported"
                    )
            del others[""]
        alternatives = []
        for pattern, part in others.items():
            key: Any = {"type": "string"} | ({"pattern": held(pattern)} if pattern else {})
            excluded = {name for name in taken if not pattern or matches(pattern, name)}
            if excluded:
                key = {"allOf": [key, {"type": "string", "pattern": other_than(excluded)}]}
            if form is not True:
                key = {"allOf": [key, form if not isinstance(form, dict) else {"type": "string", **form}]}
            try:
                alternatives.append(f"{self._key(key)} {literal(': ')} {self.rule(part)}")
            except UnsatisfiableError:
                continue
        return self.new(" | ".join(alternatives)) if alternatives else None

    def _key(self, schema: Any) -> str:
        """Return the rule of a key; a part of its form that can't be held is left out."""
        if not self.refusal(schema):
            return self.new(self.leaf(schema))
        if "allOf" not in schema:
            return self.rule(schema)
        conditions: list[dict[str, Any]] = []
        for part in _flat(schema):
            own = constraints(part)
            if "$ref" in own:
                own = constraints(resolve(self.root, own["$ref"]))
            for reduced in (
                own,
                {key: value for key, value in own.items() if key not in ("format", "pattern")},
            ):
                if not self.refusal(reduced):
                    self.unheld |= {"propertyNames"} if reduced != own else set()
                    conditions.append(reduced)
                    break
            else:
                self.unheld.add("propertyNames")
        whole = {"allOf": [{"type": "string"}, *conditions]}
        if reason := self.refusal(whole):
            if reason.startswith("Unsatisfiable schema"):
                raise UnsatisfiableError(reason.partition(": ")[2])
            raise RefusedError(reason)
        return self.new(self.leaf(whole))

    def _members(
        self, members: list[tuple[str, str, bool]], other: str | None, least: int, most: int | None
    ) -> str:
        """Return an object of ``members`` (name, rule of the value, whether required) and of others."""
        counts = least > 0 or most is not None
        known: dict[tuple[int, int], str | None] = {}
        if counts and len(members) ** 2 > _STATES:
            raise RefusedError("minProperties and maxProperties of so many properties are not supported")

        def rest(index: int, count: int) -> str | None:
            """Return what follows ``count`` members before member ``index``; None where nothing can."""
            if most is not None and count > most:
                return None
            if index == len(members):
                return self._rest_of_others(other, count, least, most)
            state = (index, count if counts else min(count, 1))
            if state not in known:
                known[state] = None
                name, value, required = members[index]
                # The comma is a lexeme of its own: the lexer is greedy, and never goes back to a shorter lexeme.
                before = f"{literal(', ')} " if count else ""
                after = rest(index + 1, count + 1)
                bodies = []
                if after is not None:
                    key = literal(json.dumps(name, ensure_ascii=False))
                    bodies.append(f"{before}{key} {literal(': ')} {value} {after}")
                without = None if required else rest(index + 1, count)
                if without is not None:
                    bodies.append(without)
                if bodies:
                    known[state] = self.new(" | ".join(bodies))
            return known[state]

        for index in range(len(members) - 1, 0, -1):  # so that the recursion is never deep
            for count in range(index + 1) if counts else (0, 1):
                rest(index, count)
        inner = rest(0, 0)
        if inner is None:
            raise UnsatisfiableError(
                "no number of properties satisfies minProperties, maxProperties and required"
            )
        return f'"{{" {inner} "}}"'

    def _rest_of_others(self, other: str | None, count: int, least: int, most: int | None) -> str | None:
        """Return the properties that are not named, behind ``count`` others."""
        missing, room = max(least - count, 0), None if most is None else most - count
        if room is not None and missing > room:
            return None
        if other is None or room == 0:
            return None if missing else '""'
        if missing > 1:
            self.unheld.add("minProperties")  # a key may come twice, and counts once
        if count:
            return f"({_repeat(other, missing, room)})"
        body = f"{other} {_repeat(other, max(missing - 1, 0), None if room is None else room - 1)}"
        return f"({body})" if missing else f"({body})?"


def _flat(schema: Any) -> list[dict[str, Any]]:
    """Return the conditions of nested ``allOf``."""
    if isinstance(schema, dict) and isinstance(schema.get("allOf"), list):
        return [inner for part in schema["allOf"] for inner in _flat(part)]
    return [schema] if isinstance(schema, dict) else []


def _repeat(item: str | None, least: int, most: int | None) -> str:
    """Return ``item`` behind a comma, several times."""
    if item is None or most == 0:
        return ""
    one = f"({literal(', ')} {item})"
    if most is None:
        return f"{one}*" if least == 0 else f"{one}{{{least},}}"
    return f"{one}{{{least},{most}}}"


def _count(schema: dict[str, Any], key: str) -> int | None:
    value = schema.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise RefusedError(f"Expected positive integer for '{key}', got {json.dumps(value):.60}")


def literal(text: str) -> str:
    """Return a text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)
