"""GGUF files of tiny models for tests: exported ones, and copies of them with other metadata or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from tercet.conversion.export import export
from tercet.model.gguf_tokenizer import SINGLE
from tercet.model.tokenizer import Tokenizer
from tiny_checkpoints import save_random
from tiny_tokenizers import byte_level, isolated

ROWS = 384  # of the embedding: 64 more than there are tokens


def exported(
    directory: Path, family: str, type_name: str = "f32", tokenizer: Tokenizer | None = None, **fields: Any
) -> tuple[Path, Path]:
    """Return a checkpoint directory with random weights and its GGUF file, both below ``directory``."""
    checkpoint, path = directory / f"{family}-checkpoint", directory / f"{family}.gguf"
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    save_random(checkpoint, family, **{"vocab_size": ROWS, **ids, **fields})
    (tokenizer or byte_level(isolated(SINGLE))).save(checkpoint)
    export(str(checkpoint), "gguf", path, type_name, check=False)
    return checkpoint, path


def copy(
    source: Path,
    target: Path,
    keys: Mapping[str, tuple[Any, gguf.GGUFValueType] | None] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Copy a GGUF file. ``keys`` and ``tensors`` replace or add entries, or remove them if they are None."""
    reader = gguf.GGUFReader(source)
    keys, tensors = dict(keys or {}), dict(tensors or {})
    architecture = keys.pop("general.architecture", None)
    name = architecture[0] if architecture else reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, name)
    for key, stored in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = stored.types[0]
        inner = stored.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if key in keys:
            replacement = keys.pop(key)
            if replacement is None:
                continue
            writer.add_key_value(key, replacement[0], replacement[1])
        else:
            writer.add_key_value(key, stored.contents(), kind, inner)
    for key, value in keys.items():
        if value is not None:
            writer.add_key_value(key, value[0], value[1])
    for tensor in reader.tensors:
        data: Any = tensor.data
        if tensor.name in tensors:
            data = tensors.pop(tensor.name)
            if data is not None:
                writer.add_tensor(tensor.name, data)
            continue
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    for tensor_name, data in tensors.items():
        if data is not None:
            writer.add_tensor(tensor_name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
