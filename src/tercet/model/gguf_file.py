"""The container of GGUF files: metadata and a table of tensors, read by memory map.

The layout is that of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header,
key-value pairs, tensor infos, then the tensors' bytes at multiples of an alignment. Nothing is allocated by
what a header claims: every count is compared with the bytes that are left first. Values are decoded when they are
needed, since a vocabulary of 262,144 tokens takes longer to decode than everything else.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tercet.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # they differ in nothing but the byte order that version 3 permits
ALIGNMENT = 32  # bytes, where the file names none
MAX_DIMENSIONS = 4
_MAX_NAME = 1 << 16  # bytes of a key or of a tensor's name
_MAX_NESTING = 4

# Number of a tensor type, to its name, elements in a block and bytes in a block.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in TENSOR_TYPES.values()}

# Number of a metadata type to its struct format, for values of a fixed size. 8: string, 9: array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: ``shape`` in numpy's order (rows first), ``offset`` in bytes from the file's begin."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class Array:
    """An array of the metadata that has not been decoded: ``count`` values of type ``kind`` at ``position``."""

    kind: int
    count: int
    position: int


class GGUFFile:
    """Metadata and table of tensors of a GGUF file, or of all parts of a split one.

    Attributes:
        paths: the file, or its parts in their order.
        tensors: every tensor, by its name.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file; a part of a split file stands for all of them.

        Raises:
            UserError: a file is missing, has another format or version, or is damaged.
        """
        first = _Reader(_first_part(Path(path)))
        self._first = first
        self.paths = [first.path]
        self.tensors = dict(first.tensors)
        count = self.integer("split.count", 1)
        if count > 1:
            self._add_parts(count)

    def _add_parts(self, count: int) -> None:
        path = self._first.path
        match = _PART.fullmatch(path.name)
        if match is None or int(match[3]) != count:
            raise UserError(
                f"{path} is one of {count} parts (field 'split.count'), so it must be named as such, "
                f"like NAME-00001-of-{count:05d}.gguf"
            )
        for number in range(2, count + 1):
            other = path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
            if not other.is_file():
                raise UserError(f"{other} is missing; {path.name} is the first of {count} parts")
            part = _Reader(other)
            if part.value("split.no") != number - 1 or part.value("split.count") != count:
                raise UserError(f"{other} is no part of {path.name}; download its parts again")
            if double := self.tensors.keys() & part.tensors.keys():
                raise UserError(f"{other} contains tensor {min(double)}, which an earlier part contains too")
            self.paths.append(other)
            self.tensors |= part.tensors
        total = self.integer("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise UserError(
                f"{path}: its {count} parts have {len(self.tensors)} tensors, not {total} (field "
                "'split.tensors.count'); download its parts again"
            )

    # Metadata

    def __contains__(self, key: str) -> bool:
        """Return whether the metadata has a key."""
        return key in self._first.values

    @property
    def keys(self) -> list[str]:
        """Return the keys of the metadata in the order of the file."""
        return list(self._first.values)

    def value(self, key: str) -> Any:
        """Return a value, decoded; None if there is no such key.

        Raises:
            UserError: a string is not UTF-8.
        """
        return self._first.value(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; ``default`` if there is no such key. UserError for other types or without default."""
        value = self._present(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; ``default`` if there is no such key."""
        value = self._present(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(key, value, "a number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return a boolean; ``default`` if there is no such key."""
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "a boolean")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; ``default`` if there is no such key."""
        value = self._present(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def list_of(self, key: str, *kinds: type) -> list[Any] | None:
        """Return an array whose values are of one of these types; None if there is no such key."""
        stored = self._first.values.get(key)
        if stored is None:
            return None
        value = self.value(key)
        if not isinstance(value, list) or (value and type(value[0]) not in kinds):
            raise self.wrong(key, value, f"an array of {kinds[0].__name__}")
        return value

    def _present(self, key: str, default: Any) -> Any:
        value = self.value(key)
        if value is None:
            if default is None:
                raise UserError(f"{self.paths[0]}: the metadata has no {key!r}; convert the model again")
            return default
        return value

    def wrong(self, key: str, value: object, expected: str) -> UserError:
        """Return the error for a value of the metadata."""
        shown = repr(value)
        shown = f"{shown[:60]}..." if len(shown) > 60 else shown
        return UserError(f"{self.paths[0]}: field {key!r} of the metadata is {shown}; it must be {expected}")


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def _first_part(path: Path) -> Path:
    match = _PART.fullmatch(path.name)
    if match is None or int(match[2]) == 1 or int(match[3]) < 2:
        return path
    first = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
    if not first.is_file():
        raise UserError(f"{first} is missing; {path.name} is one of {int(match[3])} parts")
    return first


class _Reader:
    """A single file, mapped into memory; positions of metadata values, and its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                head = stream.read(24)
                _check_head(path, head)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise UserError(f"cannot read {path}: {problem.strerror or problem}") from problem
        self._size = len(self._map)
        self._at = 24
        tensor_count, key_count = struct.unpack_from("<QQ", head, 8)
        self.values: dict[str, Any] = {}
        self._need(key_count * 12, "the metadata")  # a length, a type and the smallest value
        for _ in range(key_count):
            key = self._string("a key of the metadata", _MAX_NAME)
            if key in self.values:
                self._damaged(f"the metadata has {key!r} twice")
            self.values[key] = self._skip_value(self._fixed("I", key), key)
        alignment = self.values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._damaged(f"field 'general.alignment' is {alignment!r}, which is no power of two")
        self.tensors = self._read_tensors(tensor_count, alignment)

    def _read_tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        self._need(count * 24, "the table of tensors")
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string("the name of a tensor", _MAX_NAME)
            if name in entries:
                self._damaged(f"it has tensor {name} twice")
            entries[name] = self._tensor(name, alignment)
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: TensorInfo(name, kind, shape, start + offset, nbytes, self.path)
            for name, (kind, shape, offset, nbytes) in entries.items()
        }
        end = start
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                self._damaged(f"tensor {info.name} overlaps another one")
            end = info.offset + info.nbytes
            if end > self._size:
                raise UserError(
                    f"{self.path} is cut short: tensor {info.name} ends at byte {end} and the file has "
                    f"{self._size}; copy or download it again"
                )
        return tensors

    def _tensor(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's entry after its name; return its type, shape, offset and size in bytes."""
        dimensions = self._fixed("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._damaged(f"tensor {name} has {dimensions} dimensions; there may be 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._fixed("Q", name) for _ in range(dimensions))
        if min(shape) < 1:
            self._damaged(f"tensor {name} has shape {list(shape)}, without any value")
        number, offset = self._fixed("I", name), self._fixed("Q", name)
        if number not in TENSOR_TYPES:
            raise UserError(
                f"{self.path}: tensor {name} has type {number}, which is not known; quantise the model to a "
                "current type"
            )
        kind, elements, size = TENSOR_TYPES[number]
        if shape[0] % elements:
            self._damaged(f"rows of tensor {name} have {shape[0]} values, no multiple of {kind}'s {elements}")
        if offset % alignment:
            self._damaged(f"tensor {name} begins at byte {offset} of the data, no multiple of {alignment}")
        return kind, tuple(reversed(shape)), offset, math.prod(shape) // elements * size

    # Values

    def value(self, key: str) -> Any:
        """Return a value of the metadata; None if there is no such key."""
        stored = self.values.get(key)
        if isinstance(stored, Array):
            stored = self.values[key] = self._decode(stored, key)
        return stored

    def _decode(self, array: Array, key: str) -> list[Any]:
        self._at = array.position
        if array.kind == _STRING:
            return list(self._strings(array.count, key))
        if array.kind == _ARRAY:
            inner = [self._skip_value(_ARRAY, key) for _ in range(array.count)]
            return [self._decode(part, key) for part in inner]
        return list(struct.unpack_from(f"<{array.count}{_FORMATS[array.kind]}", self._map, array.position))

    def _strings(self, count: int, key: str) -> Iterator[str]:
        data, at, unpack = self._map, self._at, struct.Struct("<Q").unpack_from
        for number in range(count):
            (length,) = unpack(data, at)
            at += 8 + length
            try:
                yield data[at - length : at].decode()
            except UnicodeDecodeError as problem:
                raise UserError(f"{self.path}: entry {number} of {key!r} is not UTF-8 text") from problem

    def _skip_value(self, kind: int, key: str, nesting: int = 0) -> Any:
        """Return a value of a fixed size or a string, or where an array's values lie, and move behind it."""
        if kind in _FORMATS:
            return self._fixed(_FORMATS[kind], key)
        if kind == _STRING:
            return self._string(repr(key), self._size)
        if kind != _ARRAY or nesting > _MAX_NESTING:
            self._damaged(f"field {key!r} of the metadata has type {kind}, which is not known")
        inner, count = self._fixed("I", key), self._fixed("Q", key)
        position = self._at
        if inner not in _FORMATS and inner not in (_STRING, _ARRAY):
            self._damaged(f"field {key!r} of the metadata is an array of type {inner}, which is not known")
        if inner in _FORMATS:
            size = count * struct.calcsize(_FORMATS[inner])
            self._need(size, repr(key))
            self._at += size
        elif inner == _STRING:
            self._need(count * 8, repr(key))
            self._at = self._end_of_strings(count, key)
        else:
            self._need(count * 12, repr(key))
            for _ in range(count):
                self._skip_value(inner, key, nesting + 1)
        return Array(inner, count, position)

    def _end_of_strings(self, count: int, key: str) -> int:
        data, at, unpack = self._map, self._at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):  # beyond the end
            self._cut(repr(key))
        if at > self._size:
            self._cut(repr(key))
        return at

    def _fixed(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self._need(size, what)
        (value,) = struct.unpack_from(f"<{code}", self._map, self._at)
        self._at += size
        return value

    def _string(self, what: str, longest: int) -> str:
        length = self._fixed("Q", what)
        if length > longest:
            self._damaged(f"{what} has {length} bytes")
        self._need(length, what)
        self._at += length
        try:
            return self._map[self._at - length : self._at].decode()
        except UnicodeDecodeError as problem:
            raise UserError(f"{self.path} is damaged: {what} is not UTF-8 text") from problem

    def _need(self, nbytes: int, what: str) -> None:
        if nbytes > self._size - self._at:
            self._cut(what)

    def _cut(self, what: str) -> NoReturn:
        raise UserError(
            f"{self.path} is cut short or damaged: {what} needs more bytes than the file's {self._size}; "
            "copy or download it again"
        )

    def _damaged(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} is damaged: {what}; copy or download it again")


def _check_head(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights; run 'git lfs pull' in its repository")
    if head[:4] != MAGIC:
        raise UserError(f"{path} is not a GGUF file: it begins with {head[:4]!r}, not with {MAGIC!r}")
    if len(head) < 24:
        raise UserError(f"{path} is cut short: it has {len(head)} bytes; copy or download it again")
    version = int.from_bytes(head[4:8], "little")
    if version not in VERSIONS and int.from_bytes(head[4:8], "big") in (1, *VERSIONS):
        raise UserError(f"{path} is a big-endian GGUF file; only little-endian ones can be read")
    if version not in VERSIONS:
        raise UserError(f"{path} has version {version} of the GGUF format; versions 2 and 3 can be read")
