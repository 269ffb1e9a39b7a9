"""Convert a tokenizer to llama.cpp's form: tokens, their types, merges or scores, and the pre-tokenizer.

llama.cpp does not read regular expressions from the file. It has named sets of them
(``tokenizer.ggml.pre``), so a byte-level tokenizer can be written only if one of those sets splits text
as its own pre-tokenizer does. SentencePiece-like BPE does not split words; llama.cpp merges it by scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

# Types of tokens (the GGUF specification, tokenizer.ggml.token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's character for a space

# GPT-4's splitting of words, with single digits or up to three at a time.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SINGLE, TRIPLES = _GPT4 % r"\p{N}", _GPT4 % r"\p{N}{1,3}"
# Steps of a pre-tokenizer before the byte-level mapping, and ignore_merges, to llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("words of GPT-2",), False): "gpt-2",
    (("single digits", "words of GPT-2"), False): "smollm",
    ((SINGLE,), False): "qwen2",
    ((TRIPLES,), False): "dbrx",
    ((TRIPLES,), True): "llama-bpe",
}
# Patterns that split text exactly as a named step does.
_SAME = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "words of GPT-2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "words of GPT-2",
    r"\p{N}": "single digits",
}
# llama.cpp ends a generation at a token with one of these texts, whatever the file says.
KNOWN_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
     "<|end_of_text|>", "<end_of_utterance>"}
)  # fmt: skip


@dataclass(frozen=True)
class GGUFTokenizer:
    """The content of ``tokenizer.ggml.*``.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece-like).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: texts of the tokens, one for each row of the embedding.
        types: likewise their types.
        merges: merges of "gpt2", by rank.
        scores: scores of "llama"; the highest is merged first.
        bos_id: the token that begins a text.
        ends: every token that ends a generation: the first is EOS, then EOT and EOM.
        pad_id: the padding token, if there is one.
        unk_id: the token for unknown text, if there is one.
        add_bos: whether BOS is put before a text.
        add_eos: whether EOS is put after a text.
        add_space_prefix: whether a space is put before a text.
        templates: chat templates by name.
        notes: differences of llama.cpp's results, a line each.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    bos_id: int
    ends: tuple[int, ...]
    pad_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    templates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gguf_tokenizer(tokenizer: Tokenizer, rows: int, stop_ids: Sequence[int], where: str) -> GGUFTokenizer:
    """Convert a tokenizer.

    Args:
        tokenizer: the tokenizer.
        rows: rows of the model's embedding.
        stop_ids: tokens that end a generation.
        where: names the tokenizer in errors.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same tokens, or there is no end token.
    """
    content: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    model, notes = content["model"], list[str]()
    try:
        _check_model(model)
        tokens, types = _tokens(tokenizer, rows)
        merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        ]
        scores: list[float] = []
        prefix, pre = False, "default"
        byte_level = "ByteLevel" in json.dumps(content["pre_tokenizer"])
        if byte_level:
            pre = pre_tokenizer_name(content["pre_tokenizer"], bool(model.get("ignore_merges")))
            notes += _normalizer_notes(content["normalizer"])
        else:
            prefix, prefix_notes = _space_prefix(
                content["normalizer"], content["pre_tokenizer"], tokens, types
            )
            scores = _scores(tokens, types, merges)
            _mark_bytes(tokens, types)
            notes += prefix_notes
        add_bos, add_eos, bos = _around(tokenizer)
        if bos is not None and bos >= rows:
            raise UserError(
                f"token {bos}, put before each text, does not exist; the embedding has {rows} rows"
            )
        ends = _ends(tokenizer, stop_ids, len(tokens))
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from problem
    unknown = model.get("unk_token")
    unk_id = None if unknown is None or byte_level else tokenizer.id_of(unknown)
    if unk_id is not None and types[unk_id] in (NORMAL, CONTROL):
        types[unk_id] = UNKNOWN
    notes += _added_notes(content["added_tokens"], rows)
    if unnamed := [tokens[index] for index in ends[3:] if tokens[index] not in KNOWN_ENDS]:
        notes.append(
            f"llama.cpp will not stop at {', '.join(unnamed)}: a file can name only three end tokens"
        )
    return GGUFTokenizer(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(merge) for merge in merges] if byte_level else [],
        scores=scores,
        # If it were missing, llama.cpp would use token 11 (or 1).
        bos_id=next(index for index in (bos, _within(tokenizer.bos_id, rows), ends[0]) if index is not None),
        ends=ends,
        pad_id=_within(tokenizer.pad_id, rows),
        unk_id=unk_id,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        templates=dict(tokenizer.templates),
        notes=notes,
    )


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise UserError(
            f"a {model.get('type')} tokenizer can't be exported to GGUF; only a BPE tokenizer can"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UserError(f"llama.cpp has no counterpart to the tokenizer's {name!r}, {model[name]!r}")


def _tokens(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Return texts and types by id; rows without a token get a text that no input is encoded to."""
    if any(index >= rows for index in tokenizer.backend.get_vocab(with_added_tokens=False).values()):
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has only {rows} rows; "
            "they are not of the same model"
        )
    added = tokenizer.backend.get_added_tokens_decoder()
    texts = {index: text for text, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    used = set(texts.values())
    tokens, types = list[str](), list[int]()
    for index in range(rows):
        text = texts.get(index)
        if text is None:
            text = f"[PAD{index}]"
            while text in used:
                text = f"[{text}]"
            types.append(UNUSED)
        elif index in added:
            types.append(CONTROL if added[index].special else USER_DEFINED)
        else:
            types.append(NORMAL)
        if "\x00" in text:
            raise UserError(
                f"token {index} contains a zero character, at which llama.cpp would cut its text off"
            )
        tokens.append(text)
        used.add(text)
    return tokens, types


def _around(tokenizer: Tokenizer) -> tuple[bool, bool, int | None]:
    """Return whether BOS and EOS are put around a text, and the token that is put before it."""
    plain, full = tokenizer.encode("a", special=False), tokenizer.encode("a")
    size = len(plain)
    for before, after in ((0, 0), (1, 0), (0, 1), (1, 1)):
        if full[before : before + size] == plain and len(full) == before + size + after:
            if after and full[-1] != tokenizer.eos_id:
                break
            return bool(before), bool(after), full[0] if before else None
    raise UserError(
        f"the tokenizer adds special tokens to {plain} and returns {full}; llama.cpp can only put BOS before a text "
        "and EOS after it"
    )


def _ends(tokenizer: Tokenizer, stop_ids: Sequence[int], rows: int) -> tuple[int, ...]:
    """Return the end tokens, the tokenizer's own first; without any, llama.cpp would use token 11 (or 2)."""
    named = [index for index in (tokenizer.eos_id, *stop_ids) if index is not None]
    if not named:
        raise UserError("the model has no end token; set 'eos_token' in tokenizer_config.json")
    if unknown := [index for index in named if index >= rows]:
        raise UserError(f"end token {unknown[0]} does not exist; the embedding has {rows} rows")
    return tuple(dict.fromkeys(named))


# Byte-level


def pre_tokenizer_name(content: Any, ignore_merges: bool) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer as tokenizer.json describes it.

    Raises:
        UserError: llama.cpp has no pre-tokenizer that splits words in this way.
    """
    steps = tuple(_steps(content))
    name = PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is not None:
        return name
    if (steps, not ignore_merges) in PRE_TOKENIZERS:
        raise UserError(
            f"llama.cpp has this pre-tokenizer only with 'ignore_merges' {str(not ignore_merges).lower()}"
        )
    digits = {
        _GPT4 % r"\p{N}{1,2}": "splits numbers into pairs of digits",
        _GPT4 % r"\p{N}+": "does not split numbers",
    }
    if len(steps) == 1 and steps[0] in digits:
        raise UserError(
            f"the tokenizer {digits[steps[0]]}, and llama.cpp has no pre-tokenizer that does so; tokenizers that "
            "split numbers into single digits or groups of three can be exported"
        )
    raise UserError(
        f"llama.cpp has no pre-tokenizer that splits words as this tokenizer does: {', then '.join(steps) or 'not'}"
    )


def _steps(content: Any) -> list[str]:
    """Return the steps before the byte-level mapping, each as a name or a pattern."""
    members = content["pretokenizers"] if content["type"] == "Sequence" else [content]
    steps: list[str] = []
    for member in members:
        kind = member["type"]
        if kind == "ByteLevel":
            if member.get("add_prefix_space"):
                steps.append("a space before the text")
            if member.get("use_regex", True):
                steps.append("words of GPT-2")
        elif kind == "Digits" and member["individual_digits"]:
            steps.append("single digits")
        elif kind == "Split" and member["behavior"] == "Isolated" and not member["invert"]:
            pattern = member["pattern"]
            regex = pattern.get("Regex")
            steps.append(f"the text {pattern['String']!r}" if regex is None else _SAME.get(regex, regex))
        else:
            steps.append(json.dumps(member))
    return steps


def _normalizer_notes(content: Any) -> list[str]:
    if content is None:
        return []
    if content["type"] in ("NFC", "NFKC"):
        return [
            f"llama.cpp doesn't normalise text ({content['type']}), so text that is not normalised may get other tokens"
        ]
    raise UserError(f"llama.cpp has no counterpart to the tokenizer's normalizer {content['type']}")


def _within(index: int | None, rows: int) -> int | None:
    """Return a token id that has a row of the embedding; None for another one."""
    return index if index is not None and index < rows else None


def _added_notes(added: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """Return notes on added tokens: without a row, or stripping adjacent spaces (llama.cpp has no field for it)."""

    def names(tokens: list[str]) -> str:
        return ", ".join(tokens[:3]) + (", ..." if len(tokens) > 3 else "")

    notes = []
    if rowless := [token["content"] for token in added if token["id"] >= rows]:
        notes.append(f"left out {names(rowless)}: the model's embedding has no row for it")
    stripping = [
        token["content"]
        for token in added
        if token["id"] < rows and (token["lstrip"] or token["rstrip"] or token["single_word"])
    ]
    if stripping:
        notes.append(f"llama.cpp keeps the spaces beside {names(stripping)}, which the tokenizer removes")
    return notes


# SentencePiece-like


def _space_prefix(normalizer: Any, pre: Any, tokens: list[str], types: list[int]) -> tuple[bool, list[str]]:
    """Return whether a space is put before a text, and notes.

    Raises:
        UserError: a step does anything else than replace spaces by `SPACE`.
    """
    members = _members(normalizer, "normalizers") + _members(pre, "pretokenizers")
    prefix, replaced, notes = False, False, list[str]()
    for member in members:
        kind = member["type"]
        if kind == "Prepend" and member["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and member["pattern"] == {"String": " "} and member["content"] == SPACE:
            replaced = True
        elif kind == "Metaspace" and member["replacement"] == SPACE:
            replaced, scheme = True, member.get("prepend_scheme", "always")
            prefix = prefix or scheme != "never"
            if scheme == "first":
                notes.append(
                    "llama.cpp puts a space before text after a special token too, not only at the start"
                )
            if member.get("split", True):
                _check_no_inner_space(tokens, types)
        elif kind == "Split" and member["pattern"] == {"String": " "} and replaced:
            pass  # Gemma has this step, which has no effect: spaces are replaced before it
        else:
            raise UserError(f"llama.cpp has no counterpart to the tokenizer's step {json.dumps(member)}")
    if not replaced:
        raise UserError(
            "the tokenizer is neither byte-level nor SentencePiece-like, so it can't be exported to GGUF"
        )
    return prefix, notes


def _members(content: Any, name: str) -> list[Any]:
    if content is None:
        return []
    return list(content[name]) if content["type"] == "Sequence" else [content]


def _check_no_inner_space(tokens: list[str], types: list[int]) -> None:
    """Raise UserError if a token spans words: llama.cpp merges across words, this tokenizer does not."""
    for text, kind in zip(tokens, types, strict=True):
        if kind == NORMAL and SPACE in text[1:]:
            raise UserError(
                f"token {text!r} spans two words, which llama.cpp would merge and this tokenizer does not"
            )


def _scores(tokens: list[str], types: list[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Return a score for each token, minus the rank of the merge that makes it.

    SentencePiece joins the neighbours whose joint token has the highest score, tokenizer.json those of
    the lowest rank. The results agree if ranks are in the order of the tokens made, and if any two tokens
    that together form a third have a merge. Both hold for a tokenizer.json converted from SentencePiece.

    Raises:
        UserError: a condition does not hold.
    """
    made: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != last and token in made:
            raise UserError(
                f"merges of two different ranks make token {token!r}; llama.cpp has a single score for each token"
            )
        made.setdefault(token, rank)
        last = token
    known, vocab = set(merges), set(tokens)
    for token, kind in zip(tokens, types, strict=True):
        for cut in range(1, len(token)) if kind == NORMAL else ():
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                raise UserError(
                    f"tokens {pair[0]!r} and {pair[1]!r} have no merge, but llama.cpp would join them"
                )
    return [-float(made[token] + 1) if token in made else 0.0 for token in tokens]


def _mark_bytes(tokens: list[str], types: list[int]) -> None:
    missing = {f"<0x{byte:02X}>" for byte in range(256)}
    for index, text in enumerate(tokens):
        if text in missing and types[index] in (NORMAL, CONTROL):
            types[index] = BYTE
            missing.discard(text)
    if missing:
        raise UserError(
            f"the tokenizer has no token {min(missing)}, so llama.cpp could not encode every byte"
        )
