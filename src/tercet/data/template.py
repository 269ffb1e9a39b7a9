"""Prompt templates: ``{field}`` is replaced by a value, ``{{`` and ``}}`` by braces, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.errors import UserError, nearest
from tercet.files import read_text

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"[^\W\d][\w.-]*")


@dataclass(frozen=True)
class _Field:
    name: str


def _names(names: list[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


class Template:
    """A text with ``{field}`` placeholders, without expressions, formats or attribute access.

    Args:
        text: the template; ``{{`` stands for ``{`` and ``}}`` for ``}``.
        where: the template's name in messages (a file name, "prompt").

    Raises:
        UserError: a brace is unpaired or a field is not a name; the error gives line and column.
    """

    def __init__(self, text: str, where: str = "template") -> None:
        self.text, self.where = text, where
        self._parts: list[str | _Field] = []
        position = 0
        for match in _PIECE.finditer(text):
            self._parts.append(text[position : match.start()])
            self._parts.append(self._part(match))
            position = match.end()
        self._parts.append(text[position:])

    @classmethod
    def load(cls, path: str | Path) -> Template:
        """Read the template from a UTF-8 file; a final newline is not part of it."""
        text = read_text(path)
        return cls(text.removesuffix("\n").removesuffix("\r"), where=str(path))

    def _part(self, match: re.Match[str]) -> str | _Field:
        token = match.group()
        if token in ("{{", "}}"):
            return token[0]
        name = (match.group(1) or "").strip()
        if _FIELD.fullmatch(name):
            return _Field(name)
        line = self.text.count("\n", 0, match.start()) + 1
        column = match.start() - self.text.rfind("\n", 0, match.start())
        fault = f"{token} is not a field" if len(token) > 1 else f"a single {token} stands for nothing"
        raise UserError(
            f"{self.where}, line {line}, column {column}: {fault}; "
            "write {name} for a field, {{ or }} for a brace"
        )

    @property
    def fields(self) -> list[str]:
        """The distinct field names in order of first occurrence."""
        return list(dict.fromkeys(part.name for part in self._parts if isinstance(part, _Field)))

    def check(self, available: list[str], *, all_used: bool = False) -> None:
        """Raise UserError if a field has no value or, with ``all_used``, a value has no field."""
        missing = [name for name in self.fields if name not in available]
        unused = [name for name in available if name not in self.fields] if all_used else []
        if not missing and not unused:
            return
        faults = []
        if missing:
            near = nearest(missing[0], available)
            hint = f" (did you mean {{{near[0]}}}?)" if near else ""
            faults.append(f"no value for {_names(missing)}{hint}")
        if unused:
            faults.append(f"nothing uses {_names(unused)}")
        have = _names(available) if available else "none"
        needs = _names(self.fields) if self.fields else "none"
        raise UserError(f"{self.where}: {'; '.join(faults)}. Fields in it: {needs}; values given: {have}")

    def render(self, fields: Mapping[str, Any], *, all_used: bool = False) -> str:
        """Return the text with every field replaced by its value.

        Strings are inserted unchanged, other values (numbers, lists, objects, true, null) as JSON. Braces in
        values are not interpreted.

        Args:
            fields: values by name; rows usually have more than a template needs.
            all_used: refuse values that no field uses, such as one with a mistyped name.

        Raises:
            UserError: a field has no value or, with ``all_used``, a value is unused.
        """
        self.check(list(fields), all_used=all_used)
        return "".join(part if isinstance(part, str) else _text(fields[part.name]) for part in self._parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
