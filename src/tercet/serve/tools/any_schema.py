"""One JSON Schema for an answer that has a form of its own or is a call, where both are JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tercet.engine.grammar import Grammar, GrammarError

_DEFINITIONS = ("$defs", "definitions")


def form_or_call(form: Grammar, functions: Mapping[str, Grammar], arguments: str) -> Grammar:
    """Return the grammar of JSON that has the form, or calls one of the functions.

    Args:
        form: a JSON Schema.
        functions: the JSON Schemas of the arguments by the function's name.
        arguments: the key of the arguments in a call.

    Raises:
        GrammarError: a schema refers to something outside of its definitions.
    """
    definitions: dict[str, Any] = {}
    choices = [_moved(json.loads(form.text), "form", definitions)]
    for number, (name, grammar) in enumerate(functions.items()):
        call = {
            "name": {"const": name},
            arguments: _moved(json.loads(grammar.text), f"call{number}", definitions),
        }
        choices.append(
            {"type": "object", "properties": call, "required": list(call), "additionalProperties": False}
        )
    return Grammar.json_schema({"anyOf": choices, **({"$defs": definitions} if definitions else {})})


def _moved(schema: dict[str, Any], place: str, definitions: dict[str, Any]) -> Any:
    """Return the schema for another document; its definitions move to ``definitions`` under names of their own."""

    def rewrite(value: Any) -> Any:
        if isinstance(value, list):
            return [rewrite(item) for item in value]
        if not isinstance(value, dict):
            return value
        changed = {key: rewrite(item) for key, item in value.items()}
        if isinstance(reference := value.get("$ref"), str):
            root, _, name = reference.rpartition("/")
            if root not in ("#/$defs", "#/definitions"):
                raise GrammarError(f"$ref {reference:.80} does not lead to a definition")
            changed["$ref"] = f"#/$defs/{place}.{name}"
        return changed

    for key in _DEFINITIONS:
        for name, definition in schema.get(key, {}).items():
            definitions[f"{place}.{name}"] = rewrite(definition)
    return rewrite({key: value for key, value in schema.items() if key not in _DEFINITIONS})
