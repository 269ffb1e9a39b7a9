"""How byte-level tokenizers split text into words: the pre-tokenizers that ``tokenizer.ggml.pre`` names.

llama.cpp compares the tokens of a text with those of known tokenizers when a model is converted, and stores the
name of the splitter. Each name here stands for the ``pre_tokenizer`` of that tokenizer's own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tercet.errors import UserError
from tercet.model.gguf_file import GGUFFile
from tercet.model.gguf_tokenizer import SINGLE, TRIPLES

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_TEKKEN = _CASED % ("", "") + r"\p{N}" + _REST
_GPT4O = _CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + r"\p{N}{1,3}" + _REST
_MARKS = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DIGIT = r"\p{N}"


@dataclass(frozen=True)
class Split:
    """How text is split into words, and what goes with it.

    Attributes:
        patterns: regular expressions; each divides the pieces that the one before it left.
        ignore_merges: a word that is a token is not merged from its parts.
        add_bos: whether BOS is put before a text if the file does not say so.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """Return the content of ``pre_tokenizer`` in tokenizer.json."""
        words = self.patterns[-1] == _GPT2  # the byte-level step has GPT-2's pattern built in
        steps: list[dict[str, Any]] = [
            {"type": "Digits", "individual_digits": True}
            if pattern == _DIGIT
            else {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in (self.patterns[:-1] if words else self.patterns)
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
        return {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level


_BY_SPLIT: dict[Split, tuple[str, ...]] = {
    Split((_GPT2,)): (
        "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0", "mellum",
    ),
    Split((_DIGIT, _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    ),
    Split((SINGLE,)): ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo", "solar-open", "grok-2"),
    Split((_MARKS,)): ("qwen35",),
    Split((TRIPLES,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    Split((TRIPLES,), True, True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral",
        "midm-2.0", "lfm2",
    ),
    Split((_TEKKEN,), True, True): ("tekken",),
    Split((_GPT4O,)): ("gpt-4o", "llama4", "kanana2"),
    Split(_DEEPSEEK3): ("deepseek-v3", "hunyuan-dense"),
    Split(_DEEPSEEK_CODER): ("deepseek-coder",),
    Split(_FALCON): ("falcon",),
}  # fmt: skip
SPLITS = {name: split for split, names in _BY_SPLIT.items() for name in names}


def split_of(file: GGUFFile) -> Split:
    """Return how a file's byte-level tokenizer splits text.

    Raises:
        UserError: the file names no splitter, or one that is not known. None is guessed: with a wrong one most
            text gets the right tokens, and some of it does not.
    """
    name = file.value("tokenizer.ggml.pre")
    if name is None or name == "default":
        raise UserError(
            f"{file.paths[0]} does not say how its tokenizer splits words (field 'tokenizer.ggml.pre' is "
            f"{'missing' if name is None else repr(name)}); convert the model again with a newer llama.cpp"
        )
    if name not in SPLITS:
        raise UserError(
            f"{file.paths[0]}: the tokenizer splits words by {name!r} (field 'tokenizer.ggml.pre'), which is not "
            f"known; known are {', '.join(SPLITS)}"
        )
    return SPLITS[name]
