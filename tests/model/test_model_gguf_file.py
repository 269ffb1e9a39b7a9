"""The container of GGUF files, checked against files that the gguf package writes and its own reader."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES

from tercet.errors import UserError
from tercet.model.gguf_file import TENSOR_TYPES, GGUFFile
from tercet.model.gguf_values import QUANTISED_TYPES, row_bytes, rows_of, to_float32

VALUES: dict[str, Any] = {
    "a.uint8": (gguf.GGUFValueType.UINT8, 200),
    "a.int8": (gguf.GGUFValueType.INT8, -100),
    "a.uint16": (gguf.GGUFValueType.UINT16, 60_000),
    "a.int16": (gguf.GGUFValueType.INT16, -30_000),
    "a.uint32": (gguf.GGUFValueType.UINT32, 4_000_000_000),
    "a.int32": (gguf.GGUFValueType.INT32, -2_000_000_000),
    "a.uint64": (gguf.GGUFValueType.UINT64, 2**63),
    "a.int64": (gguf.GGUFValueType.INT64, -(2**62)),
    "a.float32": (gguf.GGUFValueType.FLOAT32, 0.5),
    "a.float64": (gguf.GGUFValueType.FLOAT64, 1e-300),
    "a.bool": (gguf.GGUFValueType.BOOL, True),
    "a.string": (gguf.GGUFValueType.STRING, "日本 ▁"),
    "a.texts": (gguf.GGUFValueType.ARRAY, ["", "x", "日本"]),
    "a.numbers": (gguf.GGUFValueType.ARRAY, [1, -2, 3]),
    "a.floats": (gguf.GGUFValueType.ARRAY, [0.25, -1.5]),
    "a.flags": (gguf.GGUFValueType.ARRAY, [True, False]),
}


def write(path: Path, tensors: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Write a file with `VALUES`, more ``keys`` and tensors of float32."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, value) in VALUES.items():
        writer.add_key_value(name, value, kind)
    for name, value in keys.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, values in (tensors or {"x": np.arange(96, dtype=np.float32).reshape(3, 32)}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_type_is_what_was_written(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "a.gguf"))
    assert {name: file.value(name) for name in VALUES} == {name: value for name, (_, value) in VALUES.items()}
    assert file.text("general.architecture") == "llama"
    assert file.value("no.such.key") is None and "a.bool" in file


def test_types_and_block_sizes_are_those_of_the_package() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {number: TENSOR_TYPES[number] for number in theirs} == theirs


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_tensors_are_those_of_the_packages_reader(
    tmp_path: Path, alignment: int | None, version: int
) -> None:
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "vector": generator.standard_normal(5).astype(np.float32),
        "half": generator.standard_normal((3, 7)).astype(np.float16),
        "stack": generator.standard_normal((2, 3, 4)).astype(np.float32),
    }
    keys = {} if alignment is None else {"general__alignment": alignment}
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del keys
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + path.read_bytes()[8:])
    data = np.memmap(path, np.uint8, mode="r")
    infos = GGUFFile(path).tensors
    assert list(infos) == list(tensors)
    for name, values in tensors.items():
        info = infos[name]
        assert info.shape == values.shape
        np.testing.assert_array_equal(to_float32(info.type, rows_of(info, data), info.shape[-1]), values)


@pytest.mark.parametrize("kind", sorted(QUANTISED_TYPES | {"F32", "F16", "BF16"}))
def test_values_of_every_type_are_those_of_the_package(kind: str) -> None:
    """Any bytes are blocks of any type, except that scales must be finite to be compared."""
    columns = 512
    rows = np.random.default_rng(1).integers(0, 60, (2100, row_bytes(kind, columns)), dtype=np.uint8)
    rows = rows.reshape(3, 700, -1)  # more than are dequantised at once
    actual = to_float32(kind, rows, columns)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert actual.shape == (3, 700, columns) and actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


def test_every_type_that_the_package_dequantises_is_read() -> None:
    traits = gguf.quants._type_traits
    assert {kind.name for kind in traits} - {"BF16"} == QUANTISED_TYPES


def test_dequantising_needs_little_more_memory_than_the_result() -> None:
    rows = np.zeros((30_000, row_bytes("Q4_K", 512)), np.uint8)
    to_float32("Q4_K", rows[:1], 512)
    tracemalloc.start()
    values = to_float32("Q4_K", rows, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.nbytes < peak < 1.8 * values.nbytes


def test_a_large_vocabulary_is_parsed_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    tokens = [f"▁token{index}" for index in range(262_144)]
    joined = b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in tokens)
    key = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, 8, len(tokens))
    (tmp_path / "a.gguf").write_bytes(head + joined)
    start = time.process_time()
    file = GGUFFile(tmp_path / "a.gguf")
    assert time.process_time() - start < 0.3
    assert file.value("tokenizer.ggml.tokens") == tokens
    assert time.process_time() - start < 0.7


# Split files


def parts(tmp_path: Path, count: int = 3) -> list[Path]:
    paths = [tmp_path / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        values = np.full((2, 4), number, np.float32)
        total = {"split__tensors__count": count} if number == 0 else {}
        write(path, {f"t{number}": values}, split__no=number, split__count=count, **total)
    return paths


def test_any_part_of_a_split_file_stands_for_all(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    for path in paths:
        file = GGUFFile(path)
        assert file.paths == paths
        assert {name: info.file for name, info in file.tensors.items()} == dict(
            zip(("t0", "t1", "t2"), paths, strict=True)
        )


def test_wrong_parts_are_reported(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    content = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(UserError, match=r"00003-of-00003.gguf is missing; .* is the first of 3 parts"):
        GGUFFile(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(UserError, match="is no part of"):
        GGUFFile(paths[0])
    paths[2].write_bytes(content)
    (tmp_path / "alone.gguf").write_bytes(paths[0].read_bytes())
    with pytest.raises(UserError, match=r"must be named as such, like NAME-00001-of-00003\.gguf"):
        GGUFFile(tmp_path / "alone.gguf")
    paths[0].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(UserError, match=r"00001-of-00003\.gguf is missing"):
        GGUFFile(paths[1])


# Broken files


def header(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str = "x", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(40), "is not a GGUF file: it begins with"),
    "pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (header(1), "has version 1 of the GGUF format; versions 2 and 3"),
    "version 9": (header(9), "has version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "only a beginning": (header()[:15], "cut short: it has 15 bytes"),
    "too many keys": (header(keys=2**60), "the metadata needs more bytes"),
    "too many tensors": (header(tensors=2**61), "the table of tensors needs more bytes"),
    "long key": (header(keys=1, rest=struct.pack("<Q", 2**63) + bytes(40)), "a key of the metadata has"),
    "long string": (header(keys=1, rest=text("k") + struct.pack("<IQ", 8, 2**40)), "'k' has|'k' needs more bytes"),
    "long array": (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 2**62)), "'k' needs more bytes"),
    "long list of strings": (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a")), "'k' needs more"),
    "string of a list": (
        header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 2**64 - 1)), "'k' needs more",
    ),
    "unknown type of value": (header(keys=1, rest=text("k") + struct.pack("<IQ", 13, 0)), "type 13, which is not known"),
    "unknown type of list": (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 77, 0)), "an array of type 77"),
    "key twice": (header(keys=2, rest=2 * (text("k") + struct.pack("<IQ", 10, 0))), "has 'k' twice"),
    "key not UTF-8": (header(keys=1, rest=struct.pack("<Q", 1) + b"\xff" + bytes(20)), "is not UTF-8"),
    "value not UTF-8": (header(keys=1, rest=text("k") + struct.pack("<IQ", 8, 1) + b"\xff"), "'k' is not UTF-8"),
    "alignment": (
        header(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 24)), "24, which is no power of two",
    ),
    "no dimensions": (header(tensors=1, rest=tensor(shape=()) + bytes(64)), "0 dimensions"),
    "five dimensions": (header(tensors=1, rest=tensor(shape=(1,) * 5) + bytes(64)), "5 dimensions"),
    "a dimension of zero": (header(tensors=1, rest=tensor(shape=(4, 0)) + bytes(64)), r"shape \[4, 0\], without"),
    "removed type": (header(tensors=1, rest=tensor(kind=4) + bytes(64)), "type 4, which is not known"),
    "partial block": (header(tensors=1, rest=tensor(shape=(33,), kind=8) + bytes(64)), "33 values, no multiple of Q8_0"),
    "odd offset": (header(tensors=1, rest=tensor(offset=4) + bytes(96)), "no multiple of 32"),
    "beyond the end": (header(tensors=1, rest=tensor(shape=(2**62, 2**62)) + bytes(64)), "is cut short: tensor x ends"),
    "overlap": (header(tensors=2, rest=tensor() + tensor("y") + bytes(96)), "tensor y overlaps another"),
    "tensor twice": (header(tensors=2, rest=tensor() + tensor() + bytes(96)), "has tensor x twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_reported_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        GGUFFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert peak < 2**20


def test_a_token_that_is_not_utf8_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(
        header(
            keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a") + struct.pack("<Q", 1) + b"\xc3"
        )
    )
    file = GGUFFile(path)
    with pytest.raises(UserError, match="entry 1 of 'k' is not UTF-8"):
        file.value("k")


def mutations(content: bytes, count: int, seed: int) -> list[bytes]:
    """Return copies of a file, each with a few bytes of its first part changed, added or removed."""
    generator = random.Random(seed)
    numbers = (0, 1, 8, 9, 255, 10**6, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    change: list[Callable[[bytearray, int], None]] = [
        lambda data, at: data.__delitem__(slice(at, None)),
        lambda data, at: data.__setitem__(at, generator.randrange(256)),
        lambda data, at: data.__setitem__(slice(at, at + 8), struct.pack("<Q", generator.choice(numbers))),
        lambda data, at: data.__setitem__(
            slice(at, at + 4), struct.pack("<I", generator.choice(numbers[:8]))
        ),
        lambda data, at: data.__delitem__(slice(at, at + generator.randrange(1, 9))),
        lambda data, at: data.__setitem__(slice(at, at), generator.randbytes(generator.randrange(1, 9))),
    ]
    copies = []
    for _ in range(count):
        data = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 5))):
            if len(data) > 8:
                generator.choice(change)(data, generator.randrange(4, len(data)))
        copies.append(bytes(data))
    return copies


def test_only_user_errors_come_out_of_damaged_files(tmp_path: Path) -> None:
    content = write(tmp_path / "a.gguf").read_bytes()
    errors = 0
    for number, data in enumerate(mutations(content, 1500, seed=0)):
        path = tmp_path / "b.gguf"
        path.write_bytes(data)
        try:
            file = GGUFFile(path)
            for key in file.keys:
                file.value(key)
        except UserError as problem:
            errors += 1
            assert "\n" not in str(problem), number
    assert 500 < errors < 1500
