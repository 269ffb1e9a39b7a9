"""Read a task file: YAML to checked fields. Error messages name the line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.errors import UserError, nearest
from tercet.files import read_text

# Field: its types, and their description in messages.
_Fields = dict[str, tuple[tuple[type, ...], str]]
_COMMON: _Fields = {
    "name": ((str,), "text"),
    "description": ((str,), "text"),
    "kind": ((str,), "text"),
}
_EXAMPLES: _Fields = {
    **_COMMON,
    "data": ((str, list, dict), "a path, a list of paths, or a mapping with train, dev and test"),
    "prompt": ((str,), "text with {field} in it"),
    "target": ((str,), "a field name, or text with {field} in it"),
    "labels": ((list, str), "a list of labels, or auto"),
    "metric": ((str, dict), "a name, or a mapping with a name and its options"),
    "corpus": ((str, list), "a path or a list of paths"),
    "system": ((str,), "text"),
    "few_shot": ((int,), "a whole number"),
    "max_tokens": ((int,), "a whole number"),
    "test_size": ((int, float), "a share below 1, or a number of examples"),
    "dev_size": ((int, float), "a share below 1, or a number of examples"),
}
_MINIMAL_PAIRS: _Fields = {
    **_COMMON,
    "data": ((str, list), "a path or a list of paths"),
    "good": ((str,), "the name of a field"),
    "bad": ((str,), "the name of a field"),
    "group": ((str,), "the name of a field"),
    "sample": ((int,), "a whole number"),
}
EXAMPLES, MINIMAL_PAIRS = "examples", "minimal_pairs"
# Kind of task: its fields, and the required ones.
_KINDS: dict[str, tuple[_Fields, tuple[str, ...]]] = {
    EXAMPLES: (_EXAMPLES, ("data", "prompt", "target")),
    MINIMAL_PAIRS: (_MINIMAL_PAIRS, ("data",)),
}
_DATA_FIELDS = ("path", "train", "dev", "test", "format", "columns", "encoding", "quoting")


@dataclass(frozen=True)
class Origin:
    """The files, lines and rows that the parts of a task come from, for error messages."""

    name: str  # the task file, or the task's name
    fields: dict[str, str] = dataclasses.field(default_factory=dict)  # "file:line" of each field
    files: dict[str, list[tuple[str, int]]] = dataclasses.field(
        default_factory=dict
    )  # split: (file, rows in it)

    def field(self, name: str) -> str:
        """Return ``file:line`` of a field; the file alone if it has no such field."""
        return self.fields.get(name, self.name)

    def data(self, split: str) -> str:
        """Return the files of a split."""
        return ", ".join(file for file, _ in self.files.get(split, [])) or f"the {split} data"

    def row(self, split: str, number: int) -> str:
        """Return the file of row ``number`` (from 1) of a split, and the row's number in it."""
        for file, count in self.files.get(split, []):
            if number <= count:
                return f"{file}, row {number}"
            number -= count
        return f"{self.name}: {split} row {number}"


class TaskFile:
    """The fields of a task file, each with its line.

    ``kind`` is "examples" if the file names none; it is not in ``values``.

    Raises:
        UserError: not YAML, not a mapping, a repeated, unknown or missing field, or a wrong type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values, self._lines = _parse(path)
        self.kind: str = self.values.pop("kind", EXAMPLES)
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise UserError(f"{self.at('kind')}: kind is {self.kind!r}; it must be {' or '.join(_KINDS)}")
        fields, required = _KINDS[self.kind]
        unknown = [name for name in self.values if name not in fields]
        if unknown:
            raise UserError(
                f"{self.at(unknown[0])}: unknown field {unknown[0]!r}; {field_hint(unknown[0], list(fields))}"
            )
        for name, value in self.values.items():
            kinds, words = fields[name]
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UserError(f"{self.at(name)}: {name} must be {words}, not {_kind(value)}")
        missing = [name for name in required if name not in self.values]
        if missing:
            raise UserError(
                f"{path}: the field {missing[0]!r} is missing; a task needs {', '.join(required)}"
            )

    def at(self, field: str) -> str:
        """Return ``file:line`` of a field; the file alone if it has no such field."""
        return f"{self.path}:{self._lines[field]}" if field in self._lines else str(self.path)

    def data(self) -> dict[str, Any]:
        """Return ``data`` as a mapping: lists of paths for train, dev and test, and the options of ``read_rows``."""
        value = self.values["data"]
        where = self.at("data")
        data: dict[str, Any] = dict(value) if isinstance(value, dict) else {"train": value}
        for key in data:
            if key not in _DATA_FIELDS:
                raise UserError(
                    f"{where}: data has no field {key!r}; {field_hint(str(key), list(_DATA_FIELDS))}"
                )
        if "path" in data:
            if "train" in data:
                raise UserError(
                    f"{where}: data has both path and train, which mean the same; leave out one of them"
                )
            data["train"] = data.pop("path")
        if "train" not in data:
            raise UserError(
                f"{where}: data has no train; give a path, or train: with paths (and test:, dev:)"
            )
        for key in ("train", "dev", "test"):
            if key in data:
                data[key] = [data[key]] if isinstance(data[key], str) else data[key]
                if not isinstance(data[key], list) or not all(isinstance(path, str) for path in data[key]):
                    raise UserError(f"{where}: data.{key} must be a path or a list of paths")
                if not data[key]:
                    raise UserError(f"{where}: data.{key} is an empty list; give a path")
        for key in ("format", "encoding"):
            if key in data and not isinstance(data[key], str):
                raise UserError(f"{where}: data.{key} must be text")
        if "quoting" in data and not isinstance(data["quoting"], bool):
            raise UserError(f"{where}: data.quoting must be true or false")
        columns = data.get("columns", ["a name"])
        if not isinstance(columns, list) or not columns or not all(isinstance(name, str) for name in columns):
            raise UserError(f"{where}: data.columns must be a list of names, such as [label, text]")
        return data

    def paths(self) -> list[str]:
        """Return ``data`` of a task of minimal pairs: files and directories."""
        value = self.values["data"]
        paths = [value] if isinstance(value, str) else value
        if not paths or not all(isinstance(path, str) for path in paths):
            raise UserError(f"{self.at('data')}: data must be a path or a list of paths")
        return paths

    def labels(self) -> list[str] | str | None:
        """Return ``labels``: a list of text, ``"auto"``, or None for an open task."""
        value = self.values.get("labels")
        if value is None or value == "auto":
            return value
        where = self.at("labels")
        if isinstance(value, str):
            raise UserError(f"{where}: labels must be a list, or auto, not {value!r}")
        for label in value:
            if isinstance(label, bool):
                raise UserError(
                    f"{where}: YAML reads a label as {str(label).lower()}; put it in quotes, such as 'yes'"
                )
            if not isinstance(label, str | int | float):
                raise UserError(f"{where}: each label must be text, not {_kind(label)}")
        return [str(label) for label in value]


def field_hint(name: str, known: Sequence[str]) -> str:
    """Return ``did you mean X?``, or all known names if none is similar."""
    near = nearest(name, known)
    return f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    names = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
    return names.get(type(value), f"a {type(value).__name__}")


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the top-level values, and the line of each field."""
    import yaml

    text = read_text(path)
    try:
        # The file is composed and then loaded: nodes know their lines, and a dict would lose repeated keys.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise UserError(f"{path} is empty; a task needs {', '.join(_KINDS[EXAMPLES][1])}")
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                f"{path}:{root.start_mark.line + 1}: a task file is a mapping (name: ..., data: ...)"
            )
        _refuse_repeated(root, path)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        reason = " ".join(str(problem.problem or problem.context).split())
        line = text.split("\n")[mark.line] if mark and mark.line < text.count("\n") + 1 else ""
        hint = (
            "; put text that contains { or ': ' in quotes"
            if "{" in line or "mapping values" in reason
            else ""
        )
        raise UserError(f"{place} is not valid YAML: {reason}{hint}") from problem
    except (yaml.YAMLError, ValueError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from problem
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{path}: unknown field {key!r}; {field_hint(str(key), list(_EXAMPLES))}")
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    return value, lines


def _refuse_repeated(node: Any, path: Path, seen_nodes: set[int] | None = None) -> None:
    import yaml

    seen_nodes = seen_nodes if seen_nodes is not None else set()
    if id(node) in seen_nodes:  # an alias may form a loop
        return
    seen_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, inner in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(
                        f"{path}:{line}: {key.value!r} is repeated; it first occurs in line {seen[key.value]}"
                    )
                seen[key.value] = line
            _refuse_repeated(inner, path, seen_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _refuse_repeated(inner, path, seen_nodes)


def check_label_list(labels: Sequence[str], where: str) -> None:
    """Raise UserError for fewer than two labels, an empty label or a repeated label."""
    for label in labels:
        if not label.strip():
            raise UserError(f"{where}: a label is empty")
        if label != label.strip():
            raise UserError(f"{where}: the label {label!r} has spaces around it; remove them")
    repeated = [label for index, label in enumerate(labels) if label in labels[:index]]
    if repeated:
        raise UserError(f"{where}: the label {repeated[0]!r} is repeated")
    if len(labels) < 2:
        present = f"there is only {labels[0]!r}" if labels else "there is none"
        raise UserError(f"{where}: a closed task needs at least 2 labels, and {present}")


def canonical_target(value: Any) -> Any:
    """Return an object or a list as JSON with sorted keys, the form that a model learns; other values unchanged."""
    import json

    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return value


def canonical_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `canonical_target` to every value."""
    return {name: canonical_target(value) for name, value in fields.items()}
