"""The tokenizer of a GGUF file as ``tokenizer.json``: vocabulary, merges, pre-tokenizer, special tokens.

Two kinds are read. ``gpt2`` is byte-level BPE with merges; ``tokenizer.ggml.pre`` names the way it splits text into
words (`tercet.model.gguf_splits`). ``llama`` is SentencePiece's BPE, which merges the neighbours whose joint token has
the highest score. The result encodes text as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tercet.errors import UserError
from tercet.model.gguf_file import GGUFFile
from tercet.model.gguf_splits import Split, split_of
from tercet.model.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from tercet.model.tokenizer import CLASS

# A token with one of these texts ends a generation, whatever else the file says (llama.cpp's list).
END_TEXTS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
     "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
     "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}
)  # fmt: skip
# Tokens of code models for padding, a repository's name and the separator of files end one too: one of each.
_FILL_TEXTS = (
    ("fim_pad_token_id", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep_token_id", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep_token_id", ("<|file_sep|>",)),
)
_ID_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """A file's tokenizer.

    Attributes:
        tokenizer: the content of tokenizer.json.
        config: the content of tokenizer_config.json.
        bos_id: the token that begins a text, if the file names one.
        pad_id: the token for padding, if the file names one.
        ends: every token that ends a generation; the file's own EOS first.
        templates: chat templates by name.
    """

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    bos_id: int | None
    pad_id: int | None
    ends: tuple[int, ...]
    templates: dict[str, str] = field(default_factory=dict)


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Return the tokenizer of a file.

    Raises:
        UserError: the kind of tokenizer or the pre-tokenizer is not known, or the vocabulary is damaged.
    """
    model = file.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{file.paths[0]}: a tokenizer of kind {model!r} (field 'tokenizer.ggml.model') is not supported; "
            "supported are gpt2 and llama"
        )
    tokens, types = _tokens(file)
    ids = {text: index for index, text in enumerate(tokens)}
    ends = _ends(file, ids, len(tokens))
    for index in ends:  # whatever the file says, as in llama.cpp
        types[index] = CONTROL
    split = split_of(file) if model == "gpt2" else None
    bos_id = _token_id(file, "bos_token_id", len(tokens))
    add_bos = file.boolean("tokenizer.ggml.add_bos_token", split is None or split.add_bos)
    add_eos = file.boolean("tokenizer.ggml.add_eos_token", False)
    if split is not None:
        parts = _byte_level(file, tokens, types, split)
    else:
        parts = _sentencepiece(file, tokens, types)
        bos_id = bos_id if bos_id is not None or len(tokens) < 2 else 1
    before = tokens[bos_id] if add_bos and bos_id is not None else None
    after = tokens[ends[0]] if add_eos and ends else None
    unknown = _token_id(file, "unknown_token_id", len(tokens))
    pad_id = _token_id(file, "padding_token_id", len(tokens))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(file, tokens, types),
        **parts,
        "post_processor": _around(before, after, ids, parts["post_processor"]),
    }
    named = {
        "bos_token": bos_id,
        "eos_token": ends[0] if ends else None,
        "pad_token": pad_id,
        "unk_token": unknown,
    }
    config: dict[str, Any] = {
        "tokenizer_class": CLASS,
        "clean_up_tokenization_spaces": False,
        **{key: tokens[index] for key, index in named.items() if index is not None},
    }
    return Vocabulary(tokenizer, config, bos_id, pad_id, ends, _templates(file))


# Tokens


def _tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Return texts and types by id."""
    tokens = file.list_of("tokenizer.ggml.tokens", str)
    if not tokens:
        raise UserError(
            f"{file.paths[0]} has no vocabulary (field 'tokenizer.ggml.tokens'); convert the model again"
        )
    types = file.list_of("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) < len(tokens):
        raise UserError(
            f"{file.paths[0]} has {len(tokens)} tokens and {len(types)} types of tokens; convert the model again"
        )
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        double = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise UserError(
            f"{file.paths[0]}: token {double!r} occurs twice in the vocabulary; convert the model again"
        )
    return tokens, list(types[: len(tokens)])


def _token_id(file: GGUFFile, name: str, count: int) -> int | None:
    """Return a special token's id; None if the file names none or one that does not exist."""
    value = file.value(f"tokenizer.ggml.{name}")
    return value if type(value) is int and 0 <= value < count else None


def _ends(file: GGUFFile, ids: dict[str, int], count: int) -> tuple[int, ...]:
    named = [index for key in _ID_KEYS if (index := _token_id(file, key, count)) is not None]
    if (
        "tokenizer.ggml.eos_token_id" not in file
        and file.text("tokenizer.ggml.model") == "llama"
        and count > 2
    ):
        named.insert(0, 2)
    by_text = {ids[text] for text in END_TEXTS & ids.keys()}
    for key, texts in _FILL_TEXTS:
        index = _token_id(file, key, count)
        present = [ids[text] for text in texts if text in ids]
        by_text.update([index] if index is not None else present[:1])
    # Models whose turns have several parts: the end of a part is not the end of a turn.
    parts = ids.keys() & {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>"}
    if parts & {"<|call|>", "<|calls|>"} and parts & {"<|return|>", "<|flush|>"}:
        by_text.discard(ids.get("<|end|>", -1))
    if "<|tool_response>" in ids:
        by_text.discard(ids.get("</s>", -1))
    return tuple(dict.fromkeys([*named, *sorted(by_text)]))


def _added(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Return the tokens that are cut out of a text before anything else."""
    # llama.cpp knows by the model's name that these tokens of Phi-3 take the spaces behind them.
    name = file.value("general.name")
    phi3 = isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and text not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _around(before: str | None, after: str | None, ids: dict[str, int], plain: Any) -> Any:
    """Return the post-processor that puts special tokens around a text; ``plain`` is the one without any."""
    if before is None and after is None:
        return plain
    special = [text for text in (before, after) if text is not None]

    def piece(text: str, number: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": number}}

    def sequence(name: str, number: int) -> list[dict[str, Any]]:
        return [
            *([] if before is None else [piece(before, number)]),
            {"Sequence": {"id": name, "type_id": number}},
            *([] if after is None else [piece(after, number)]),
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in special},
    }


def _templates(file: GGUFFile) -> dict[str, str]:
    """Return the chat templates; that of ``tokenizer.chat_template`` is named "default"."""
    start = "tokenizer.chat_template"
    templates = {
        "default" if key == start else key.removeprefix(f"{start}."): file.text(key)
        for key in file.keys
        if key == start or key.startswith(f"{start}.")
    }
    for name in templates:
        if not name.replace("_", "").replace("-", "").isalnum():  # it becomes the name of a file
            raise UserError(f"{file.paths[0]}: {name!r} is no name of a chat template")
    return templates


# Byte-level BPE


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int], split: Split) -> dict[str, Any]:
    stored = file.list_of("tokenizer.ggml.merges", str)
    if stored is None:
        raise UserError(
            f"{file.paths[0]} has no merges (field 'tokenizer.ggml.merges'); convert the model again"
        )
    vocabulary = {
        text: index
        for index, text in enumerate(tokens)
        if types[index] in (NORMAL, BYTE) or not (types[index] == UNUSED and text == f"[PAD{index}]")
    }
    merges = []
    for number, merge in enumerate(stored):
        left, _, right = merge[1:].partition(" ")
        left = merge[:1] + left
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise UserError(f"{file.paths[0]}: merge {number}, {merge!r}, names a token that does not exist")
        merges.append([left, right])
    return {
        "normalizer": None,
        "pre_tokenizer": split.pre_tokenizer(),
        "post_processor": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=split.ignore_merges),
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **options,
    }


# SentencePiece


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = file.list_of("tokenizer.ggml.scores", float, int)
    if scores is None or len(scores) < len(tokens):
        raise UserError(f"{file.paths[0]} has no score for each token (field 'tokenizer.ggml.scores')")
    vocabulary = {
        text: index for index, text in enumerate(tokens) if not _is_filler(text, index, types[index])
    }
    unknown = _token_id(file, "unknown_token_id", len(tokens))
    if unknown is None:
        unknown = next((index for index, kind in enumerate(types) if kind == UNKNOWN), 0)
    prefix = file.boolean("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}, replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if prefix else replace,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocabulary,
            _merges(tokens, types, scores, vocabulary),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _is_filler(text: str, index: int, kind: int) -> bool:
    """Return whether a token only fills a row of the embedding."""
    return kind == UNUSED and text == f"[PAD{index}]"


def _merges(
    tokens: list[str], types: list[int], scores: Sequence[float], vocabulary: dict[str, int]
) -> list[list[str]]:
    """Return every pair of tokens that is a token, in the order of the scores of the joint tokens.

    Pairs of the same token are in the order of their ids, as in a tokenizer.json converted from SentencePiece.
    """
    ranked = sorted(
        (index for index, kind in enumerate(types) if kind in (NORMAL, USER_DEFINED, UNUSED)),
        key=lambda index: -scores[index],
    )
    merges: list[list[str]] = []
    for index in ranked:
        text = tokens[index]
        if len(text) < 2 or text not in vocabulary:
            continue
        pairs = [
            (vocabulary[text[:cut]], vocabulary[text[cut:]], cut)
            for cut in range(1, len(text))
            if text[:cut] in vocabulary and text[cut:] in vocabulary
        ]
        pairs.sort()
        merges.extend([text[:cut], text[cut:]] for _, _, cut in pairs)
    return merges
