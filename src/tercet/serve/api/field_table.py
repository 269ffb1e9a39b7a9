"""The class of each field of a request: what is used, what is only a hint, what is refused.

Every field of a body carries its class as an annotation. `Body.review` applies them to a request, and
scripts/generate_docs.py writes docs/reference/fields.md from them, so that the two cannot differ.

What would change the answer and cannot be honoured is refused. What is a hint, or without meaning for the
model, is taken and named in the response header ``x-ignored``; with `Settings.strict` it is refused too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from tercet.serve.errors import invalid_value, unsupported

HEADER = "x-ignored"
_SCOPE = "tercet.ignored"
_LONGEST_PATH = 120  # characters; names of unknown fields are the client's own
_LONGEST_HEADER = 2048  # clients limit all headers together, some to 8 KiB


@dataclass(frozen=True)
class Used:
    """A field that has its effect. ``meaning``: for the documentation."""

    meaning: str
    label = "used"


@dataclass(frozen=True)
class WhereKnown:
    """A field that has its effect where the model or its chat template knows it, and else is a hint."""

    meaning: str
    label = "used where the model knows it, otherwise ignored"


@dataclass(frozen=True)
class Hint:
    """A field that changes no answer of this server.

    reason: why, for the documentation and for strict servers.
    followed: values that this server follows anyway, so that nothing of them is ignored.
    """

    reason: str
    followed: tuple[Any, ...] = ()
    label = "ignored"


@dataclass(frozen=True)
class Refused:
    """A field that would change the answer. ``followed``: values that ask for nothing."""

    reason: str
    followed: tuple[Any, ...] = ()
    label = "refused"


FieldClass = Used | WhereKnown | Hint | Refused
Kinds = Mapping[str, FieldClass]  # by the ``type`` of an entry: a block, an item, a part


class Ignored:
    """The fields of one request that were taken and have no effect.

    strict: whether they are refused instead.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.paths: list[str] = []

    def add(self, path: str, reason: str) -> None:
        """Note a field. APIError 400 where the server is strict."""
        if self.strict:
            raise unsupported(path, f"{reason} (this server's setting `strict` refuses what it would ignore)")
        if path not in self.paths:
            self.paths.append(path)

    def add_unknown(self, entry: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        """Note the keys of ``entry`` that are not ``known``, unless their value says nothing."""
        for name, value in entry.items():
            if name not in known and value is not None:
                self.add(f"{where}.{name}", UNKNOWN)

    @property
    def header(self) -> str:
        """The paths, separated by commas; those that differ in their indices only are joined (``a[].b``)."""
        groups: dict[str, list[str]] = {}
        for path in self.paths:
            groups.setdefault(re.sub(r"\[\d+\]", "[]", path), []).append(path)
        texts = [paths[0] if len(paths) == 1 else general for general, paths in groups.items()]
        header = ""
        for text in texts:
            part = quote(text[:_LONGEST_PATH].encode("utf-8", "replace"), safe="[]._-$:")
            if len(header) + len(part) > _LONGEST_HEADER:
                return f"{header}, ..."
            header += f", {part}" if header else part
        return header


UNKNOWN = "this server does not know it"


def ignored_of(request: Request) -> Ignored:
    """Return the request's list of ignored fields, of which `ignored_header` makes its answer's header."""
    ignored: Ignored = request.scope.setdefault(_SCOPE, Ignored(request.app.state.settings.strict))
    return ignored


def ignored_header(scope: Mapping[str, Any]) -> str:
    """Return the value of the header ``x-ignored`` for the answer to a request; "" for none."""
    ignored: Ignored | None = scope.get(_SCOPE)
    return "" if ignored is None else ignored.header


class Body(BaseModel):
    """A request, or a part of a request. Strings are not converted to numbers; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False)

    def review(self, ignored: Ignored, where: str = "") -> None:
        """Apply the classes of all fields that are set, also those of parts.

        Raises:
            APIError: 400; a field that is refused, or one that a strict server would ignore.
        """
        for name, info in type(self).model_fields.items():
            value, path = getattr(self, name), f"{where}{info.alias or name}"
            if value is None or name not in self.model_fields_set:
                continue
            kind = class_of(info)
            if isinstance(kind, Hint | Refused):
                _apply(kind, value, path, ignored)
            elif isinstance(value, Body):
                value.review(ignored, f"{path}.")
            elif isinstance(value, list):
                for number, entry in enumerate(value):
                    if isinstance(entry, Body):
                        entry.review(ignored, f"{path}[{number}].")
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                ignored.add(f"{where}{name}", UNKNOWN)


class OpenBody(Body):
    """A part of a request whose unknown fields are ignored and named."""

    model_config = ConfigDict(extra="allow")


def _apply(kind: Hint | Refused, value: Any, path: str, ignored: Ignored) -> None:
    if any(value == followed and type(value) is type(followed) for followed in kind.followed):
        return
    if isinstance(kind, Refused):
        raise unsupported(path, kind.reason)
    ignored.add(path, kind.reason)


def check_kind(kinds: Kinds, entry: Mapping[str, Any], path: str, ignored: Ignored) -> bool:
    """Return whether an entry with a ``type`` is used; note it where it is ignored.

    Raises:
        APIError: 400; its type is refused, or unknown.
    """
    name = entry.get("type")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        used = ", ".join(name for name, kind in kinds.items() if not isinstance(kind, Refused | Hint))
        raise invalid_value(f"{path}.type", f"is {name!r:.60}; it must be one of {used}", "unsupported_value")
    if isinstance(kind, Refused):
        raise invalid_value(f"{path}.type", f"is {name:.60}, and {kind.reason}", "unsupported_value")
    if isinstance(kind, Hint):
        ignored.add(path, kind.reason)
    return not isinstance(kind, Hint)


# For the documentation


def class_of(info: FieldInfo) -> FieldClass | None:
    """Return the class in a field's annotation."""
    return next((entry for entry in info.metadata if isinstance(entry, FieldClass)), None)


def field_classes(body: type[Body], where: str = "") -> Iterator[tuple[str, FieldClass]]:
    """Yield path and class of every field of a body, and of the bodies inside it."""
    for name, info in body.model_fields.items():
        path = f"{where}{info.alias or name}"
        kind = class_of(info)
        if kind is not None:
            yield path, kind
        if isinstance(kind, Hint | Refused):
            continue
        for inner, is_list in _bodies(info.annotation):
            yield from field_classes(inner, f"{path}[]." if is_list else f"{path}.")


def _bodies(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[Body], bool]]:
    """Yield the bodies in a type, and whether each is in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation, is_list
    listed = is_list or getattr(annotation, "__origin__", None) is list
    for argument in getattr(annotation, "__args__", ()):
        yield from _bodies(argument, listed)
