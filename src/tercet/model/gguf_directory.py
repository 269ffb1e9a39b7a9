"""A GGUF file as a checkpoint directory: everything but the weights, made of its metadata, in the user's cache.

Whatever reads a checkpoint directory reads such a directory too: ``gguf.json`` names the file, and the tensors are
read from there by memory map.
"""

from __future__ import annotations

import json
from pathlib import Path

from tercet.errors import UserError
from tercet.files import atomic_directory, cache_directory, fingerprint, write_atomic, write_json
from tercet.model.families import config_to_hf
from tercet.model.gguf_config import config_of
from tercet.model.gguf_file import GGUFFile
from tercet.model.gguf_index import INDEX, source_file, source_files, write_index
from tercet.model.gguf_tensors import GGUFTensors
from tercet.model.gguf_vocabulary import Vocabulary, read_vocabulary
from tercet.model.hf_fields import HF
from tercet.model.tokenizer import CONFIG, MORE_TEMPLATES, TEMPLATE, TOKENIZER, Tokenizer
from tercet.progress import say

FORMAT = 1  # change it whenever the content of a directory changes, so that older ones are made again
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_directory(path: str | Path) -> Path:
    """Return a checkpoint directory for a GGUF file, made at the first use.

    Args:
        path: the file; of a split one any part.

    Raises:
        UserError: the file is missing or damaged, or its architecture, tokenizer or types are not supported; the
            cache can't be written to.
    """
    # Not resolved: in the Hub's cache the name, which tells the parts of a split file, is a link's.
    path = Path(path).expanduser().absolute()
    source = source_file(path)
    name = fingerprint([FORMAT, str(source.path), source.size, source.mtime_ns])
    directory = cache_directory() / "gguf" / f"{path.stem}-{name}"
    if not _is_current(directory):
        _make(path, directory)
    return directory


def _is_current(directory: Path) -> bool:
    if not (directory / INDEX).is_file():
        return False
    try:
        source_files(directory)
    except UserError:  # another part of a split file has changed
        return False
    return True


def _make(path: Path, directory: Path) -> None:
    file = GGUFFile(path)
    vocabulary = read_vocabulary(file)
    ids = _token_ids(vocabulary)
    config = config_of(file, ids)
    if (count := len(file.value("tokenizer.ggml.tokens"))) > config.vocab_size:
        raise UserError(
            f"{path}: the vocabulary has {count} tokens and the embedding {config.vocab_size} rows; convert the "
            "model again"
        )
    with atomic_directory(directory) as temporary:
        write_index(temporary, file)
        tensors = GGUFTensors(
            temporary, config
        )  # so that unsupported tensors are reported before a first use
        try:
            write_json(temporary / "config.json", config_to_hf(config, _DTYPES[tensors.dtype]))
        except ValueError as problem:
            raise UserError(f"{path}: {problem}") from problem
        write_json(
            temporary / "generation_config.json",
            {key: value for key, value in ids.items() if value is not None},
        )
        # Without indentation, which takes json ten times as long.
        write_atomic(temporary / TOKENIZER, json.dumps(vocabulary.tokenizer, ensure_ascii=False))
        write_json(temporary / CONFIG, vocabulary.config)
        _compare_tokenizers(path, temporary)
        for name, template in vocabulary.templates.items():
            target = (
                temporary / TEMPLATE if name == "default" else temporary / MORE_TEMPLATES / f"{name}.jinja"
            )
            write_atomic(target, template)


# Texts on which splitters differ: digits, line breaks and spaces before digits, contractions.
_PROBES = (
    "Hello world",
    "\n\n1. 2024",
    "it's 12345.67 I'LL",
    "  a   b\n\n\nc",
    "日本 1️⃣",
    "x=10;\n\t\treturn",
)


def _compare_tokenizers(path: Path, directory: Path) -> None:
    """Report a tokenizer.json beside a GGUF file that encodes text in another way; the file's own is used."""
    if not (path.parent / TOKENIZER).is_file():
        return
    try:
        beside = Tokenizer.load(path.parent)
    except UserError:
        return
    own = Tokenizer.load(directory)
    for text in _PROBES:
        ours, theirs = own.encode(text, special=False), beside.encode(text, special=False)
        if ours != theirs:
            say(
                f"{path.parent / TOKENIZER} disagrees with {path.name}: it encodes {text!r} as {theirs}, not as {ours}; "
                "the GGUF file's own tokenizer is used"
            )
            return


def _token_ids(vocabulary: Vocabulary) -> HF:
    """Return the fields that name special tokens, as config.json and generation_config.json have them."""
    ends = vocabulary.ends
    return {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": vocabulary.pad_id,
    }
