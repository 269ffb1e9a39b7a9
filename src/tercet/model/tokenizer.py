"""Text to token ids and back, over the ``tokenizers`` library, and conversations to text.

A tokenizer is the files of a Hugging Face checkpoint: ``tokenizer.json`` (what encodes),
``tokenizer_config.json`` (which tokens begin, end and pad), ``chat_template.jinja``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tercet.errors import UserError
from tercet.files import read_json, read_text, write_atomic, write_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZER, CONFIG, LEGACY_SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


class Tokenizer:
    """Encodes, decodes and renders. Make one with `load` or `from_backend`.

    chat_template: the default template's text, None where there is none.
    bos_id, eos_id, pad_id: None where the tokenizer names no such token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any],
        templates: dict[str, str],
        ids: dict[str, Any],
    ) -> None:
        """``config``: tokenizer_config.json; ``ids``: token ids of config.json, where the former is silent."""
        self.backend = backend
        self.config = config
        self.templates = templates
        # A length limit or padding that tokenizer.json was saved with would change every result.
        if backend.padding is not None:
            self.config = {"pad_token": backend.padding["pad_token"], **config}
        backend.no_truncation()
        backend.no_padding()
        self.named_tokens = _named_tokens(self.config)
        _add_special_tokens(backend, [*self.named_tokens.values(), *_extra_tokens(config)])
        self.bos_id = self._named_id("bos", ids)
        self.eos_id = self._named_id("eos", ids)
        self.pad_id = self._named_id("pad", ids)

    def _named_id(self, kind: str, ids: dict[str, Any]) -> int | None:
        if (token := self.named_tokens.get(f"{kind}_token")) is not None:
            return self.id_of(token)
        value = ids.get(f"{kind}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, int) or not 0 <= first < 2**32 or self.backend.id_to_token(first) is None:
            return None
        return first

    # Files

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The tokenizer of a checkpoint or adapter directory.

        Raises:
            UserError: a file is missing or broken.
        """
        import tokenizers

        directory = Path(directory)
        path = directory / TOKENIZER
        if not path.is_file():
            raise UserError(_missing(directory))
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path))
        except UserError:
            raise
        except Exception as problem:  # the library raises plain exceptions
            raise UserError(f"{path} is not a tokenizer: {' '.join(str(problem).split())}") from problem
        config = _read_object(directory / CONFIG)
        if "added_tokens_decoder" not in config:
            config |= {key: value for key, value in _read_object(directory / LEGACY_SPECIAL).items() if value}
        _add_decoder_tokens(backend, config.get("added_tokens_decoder"), directory / CONFIG)
        return cls(
            backend, config, _read_templates(directory, config), _read_object(directory / "config.json")
        )

    @classmethod
    def from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        eos: str,
        bos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> Self:
        """A tokenizer just trained. Tokens that the vocabulary lacks are added to it."""
        named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        # This class takes tokenizer.json as it is; others of transformers would rebuild parts of it.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {key: token for key, token in named.items() if token is not None}
        return cls(backend, config, {} if chat_template is None else {"default": chat_template}, {})

    def with_template(self, template: str) -> Tokenizer:
        """The same tokenizer with ``template`` as its only chat template."""
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        return Tokenizer(self.backend, self.config, {"default": template}, ids)

    def save(self, directory: str | Path) -> None:
        """Write what `load`, and transformers, read. Raises UserError when the disk refuses."""
        directory = Path(directory)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        write_atomic(directory / TOKENIZER, self.backend.to_str(pretty=True))
        write_json(directory / CONFIG, config)
        for name, template in self.templates.items():
            file = directory / TEMPLATE if name == "default" else directory / MORE_TEMPLATES / f"{name}.jinja"
            write_atomic(file, template)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ where any text may be encoded or rendered differently."""
        parts = [self.backend.to_str(), self.named_tokens, self.templates]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()[:16]

    # Tokens

    @cached_property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens and holes included: the rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_tokens(self) -> list[str]:
        """Texts of the tokens that no ordinary text is encoded to, by id."""
        added = self.backend.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self.backend.token_to_id(token)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that the token stands for in text: b"" for an id that no token has."""
        token = self.backend.id_to_token(index)
        if token is None:
            return b""
        if index in self._added:
            return token.encode("utf-8")
        if self._byte_level:
            return b"".join(_BYTE_OF.get(c, c.encode("utf-8")) for c in token)
        if (
            len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        ):  # SentencePiece's byte fallback
            return bytes.fromhex(token[3:5])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8")

    def byte_length(self, index: int) -> int:
        """How many bytes of text the token stands for; 0 for special tokens."""
        added = self._added.get(index)
        return 0 if added is not None and added.special else len(self.token_bytes(index))

    def token_text(self, index: int) -> str:
        """The token's text for people, a replacement character for each part of a character."""
        return self.token_bytes(index).decode("utf-8", errors="replace")

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in str(self.backend.decoder)

    # Text

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around it (BOS, say)."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [one.ids for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters [start, end) of ``text`` that each stands for.

        Every character is covered: spaces that a tokenizer leaves out of its offsets belong to the
        token after them, at the end to the last one. Tokens that share a character all cover it.
        Tokens that were added around the text have (0, 0).
        """
        encoding = self.backend.encode(text, add_special_tokens=special)
        offsets: list[tuple[int, int]] = []
        reached, last = 0, None
        for (start, end), around in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            if around:
                offsets.append((0, 0))
                continue
            offsets.append((min(start, reached), end))
            reached, last = max(reached, end), len(offsets) - 1
        if last is not None:
            offsets[last] = (offsets[last][0], len(text))
        return encoding.ids, offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; what is not whole UTF-8 becomes replacement characters."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    # Conversations

    @property
    def chat_template(self) -> str | None:
        """The default template."""
        return self.templates.get("default")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text: transformers' ``apply_chat_template(tokenize=False)``.

        template: text of a template, or the name of one of `templates`; None: the default, or the
            one named ``tool_use`` where there are tools and such a template.

        Raises:
            UserError: there is no template, or it fails on this conversation.
        """
        from tercet.model.chat_template import render_template

        chosen = self.template_text(template, tools=tools is not None)
        return render_template(chosen, messages, tools, add_generation_prompt, self.named_tokens, **variables)

    def template_text(self, template: str | None = None, *, tools: bool = False) -> str:
        """The template that `render` chooses. UserError where there is none."""
        if template is not None:
            return self.templates.get(template, template)
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if self.templates:
            raise UserError(
                f"the tokenizer has no default chat template; choose one of {', '.join(self.templates)}"
            )
        raise UserError(
            "the tokenizer has no chat template, so it can't render messages; give plain text or a template"
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `render`; the template has written BOS where the model wants it, so none is added."""
        return self.encode(self.render(messages, **options), special=False)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019): themselves where printable, else from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"there is no directory {directory}"
    convert = "convert it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    if (directory / "tokenizer.model").is_file():
        return (
            f"{directory} has only a SentencePiece tokenizer (tokenizer.model), which is not read; {convert}"
        )
    if (directory / "vocab.json").is_file():
        return f"{directory} has vocab.json but no {TOKENIZER}; {convert}"
    return f"{directory} has no {TOKENIZER}"


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def _text(token: Any) -> str | None:
    """A token's text: given as it is, or as an object with ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ... and a model's own (``image_token``): what templates can name."""
    extra = config.get("extra_special_tokens")
    entries = {**config, **extra} if isinstance(extra, dict) else config
    named = {key: _text(value) for key, value in entries.items() if key.endswith("_token")}
    return {key: text for key, text in named.items() if text is not None}


def _extra_tokens(config: dict[str, Any]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [text for token in extra if (text := _text(token)) is not None] if isinstance(extra, list) else []


def _add_special_tokens(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    """Make each text a special token: found whole in any text, left out of decoded text."""
    from tokenizers import AddedToken

    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in dict.fromkeys(texts):
        known = added.get(text)
        if known is None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif not known.special:
            known.special = True
            backend.add_special_tokens([known])


def _add_decoder_tokens(backend: tokenizers.Tokenizer, tokens: Any, path: Path) -> None:
    """Tokens that only tokenizer_config.json knows (``added_tokens_decoder``: id to token)."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    try:
        for _, token in sorted((tokens or {}).items(), key=lambda item: int(item[0])):
            if token["content"] not in known:
                backend.add_tokens([AddedToken(**token)])
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{path}: field 'added_tokens_decoder' must map token ids to tokens") from problem


def _read_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files, or else the older field: one text, or a list of named ones."""
    more = sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
    files = {path.stem: read_text(path) for path in more}
    if (directory / TEMPLATE).is_file():
        files["default"] = read_text(directory / TEMPLATE)
    field = config.get("chat_template")
    if files or field is None:
        return files
    if isinstance(field, str):
        return {"default": field}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in field}
    except (KeyError, TypeError) as problem:
        raise UserError(
            f"{directory / CONFIG}: field 'chat_template' must be a text or a list of named texts"
        ) from problem
