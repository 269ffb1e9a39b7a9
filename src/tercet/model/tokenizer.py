"""Convert text to token ids and back with the ``tokenizers`` library, and conversations to text.

A tokenizer consists of files of a Hugging Face checkpoint: ``tokenizer.json`` (vocabulary and rules),
``tokenizer_config.json`` (names of special tokens) and ``chat_template.jinja``.
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
from tercet.model.control_text import ControlText, ControlTokenMode, encode_pieces

if TYPE_CHECKING:
    import tokenizers

    from tercet.model.control_tokens import ControlTokens
    from tercet.model.template_needs import TemplateNeeds

TOKENIZER, CONFIG, LEGACY_SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
CLASS = "PreTrainedTokenizerFast"  # uses tokenizer.json unchanged; GPT2Tokenizer drops its split into digits
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


class Tokenizer:
    """A tokenizer with its chat templates. Make it with `load` or `from_backend`.

    Attributes:
        backend: the tokenizer of the ``tokenizers`` library.
        config: the content of tokenizer_config.json.
        templates: texts of chat templates by name.
        named_tokens: texts of special tokens by name, such as ``bos_token``.
        bos_id: the token that begins a text; None if the tokenizer names none.
        eos_id: the token that ends a text; None if the tokenizer names none.
        pad_id: the token for padding; None if the tokenizer names none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any],
        templates: dict[str, str],
        ids: dict[str, Any],
    ) -> None:
        """Make a tokenizer from its parts.

        Args:
            backend: the tokenizer of the ``tokenizers`` library; it is modified.
            config: the content of tokenizer_config.json.
            templates: texts of chat templates by name.
            ids: token ids of config.json, for special tokens that ``config`` does not name.
        """
        self.backend = backend
        self.config = config
        self.templates = templates
        # A length limit or padding saved in tokenizer.json would change every result.
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
        if type(first) is not int or not 0 <= first < 2**32 or self.backend.id_to_token(first) is None:
            return None
        return first

    # Files

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Load the tokenizer of a checkpoint or adapter directory.

        Raises:
            UserError: a file is missing or damaged.
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
            raise UserError(
                f"{path} is not a tokenizer of the tokenizers library: {' '.join(str(problem).split())}"
            ) from problem
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
        """Make a tokenizer from a trained backend. Named tokens that the vocabulary lacks are added to it."""
        named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        config = {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False}
        config |= {key: token for key, token in named.items() if token is not None}
        return cls(backend, config, {} if chat_template is None else {"default": chat_template}, {})

    def with_template(self, template: str) -> Tokenizer:
        """Return the same tokenizer with ``template`` as its only chat template."""
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        return Tokenizer(self.backend, self.config, {"default": template}, ids)

    def save(self, directory: str | Path) -> None:
        """Write the files that `load` and transformers read.

        Raises:
            UserError: the directory can't be written to.
        """
        directory = Path(directory)
        config = {key: self.config[key] for key in self.config if key != "chat_template"}
        write_atomic(directory / TOKENIZER, self.backend.to_str(pretty=True))
        write_json(directory / CONFIG, {**config, "tokenizer_class": CLASS})
        for name, template in self.templates.items():
            file = directory / TEMPLATE if name == "default" else directory / MORE_TEMPLATES / f"{name}.jinja"
            write_atomic(file, template)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ if any text may be encoded or rendered differently."""
        parts = [self.backend.to_str(), self.named_tokens, self.templates]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()[:16]

    # Tokens

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens and gaps included: the rows that an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_tokens(self) -> list[str]:
        """Texts of the special tokens, in the order of their ids; no ordinary text is encoded to them."""
        added = self.backend.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, spelled as in the vocabulary; None if there is no such token."""
        return self.backend.token_to_id(token)

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes that a token stands for in text; b"" for an id without a token."""
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
        """Return the number of bytes of text that a token stands for; 0 for special tokens."""
        added = self._added.get(index)
        return 0 if added is not None and added.special else len(self.token_bytes(index))

    def token_text(self, index: int) -> str:
        """Return a token's text for display; incomplete characters become replacement characters."""
        return self.token_bytes(index).decode("utf-8", errors="replace")

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in str(self.backend.decoder)

    # Text

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of ``text``; ``special`` adds the tokenizer's special tokens (such as BOS).

        Every special token that the text spells becomes that token, except where a `ControlText` says that it is
        ordinary text. A template writes its own special tokens, so none can be added to such a text.
        """
        if isinstance(text, ControlText) and text.literal:
            return encode_pieces(self.backend, text)[0]
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Encode each text as `encode` does, on all cores."""
        if any(isinstance(text, ControlText) and text.literal for text in texts):
            return [self.encode(text, special) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids, and the characters [start, end) of ``text`` that each token stands for.

        Every character is covered: spaces that a tokenizer leaves out of its offsets belong to the
        next token, or to the last token at the end. Tokens that share a character all cover it.
        Special tokens that were added to the text have (0, 0).
        """
        if isinstance(text, ControlText) and text.literal:
            ids, places = encode_pieces(self.backend, text)
            added_mask = [0] * len(ids)
        else:
            encoding = self.backend.encode(text, add_special_tokens=special)
            ids, places, added_mask = encoding.ids, encoding.offsets, encoding.special_tokens_mask
        offsets: list[tuple[int, int]] = []
        reached, last = 0, None
        for (start, end), added in zip(places, added_mask, strict=True):
            if added:
                offsets.append((0, 0))
                continue
            offsets.append((min(start, reached), end))
            reached, last = max(reached, end), len(offsets) - 1
        if last is not None:
            offsets[last] = (offsets[last][0], len(text))
        return ids, offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids; incomplete UTF-8 becomes replacement characters."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    # Conversations

    @property
    def chat_template(self) -> str | None:
        """Text of the default chat template; None if there is none."""
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
        """Return the conversation as text, as transformers' ``apply_chat_template(tokenize=False)`` does.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the beginning of an assistant's answer.
            tools: JSON schemas of the tools that the assistant can call.
            template: text of a template, or a name in `templates`; None: the default, or the template
                named ``tool_use`` if there are tools and such a template.
            **variables: more variables for the template.

        Raises:
            UserError: there is no template, or it fails on this conversation.
        """
        from tercet.model.chat_template import render_template

        text = self.template_text(template, tools=tools is not None)
        return render_template(text, messages, tools, add_generation_prompt, self.named_tokens, **variables)

    def template_text(self, template: str | None = None, *, tools: bool = False) -> str:
        """Return the text of the template that `render` uses.

        Raises:
            UserError: there is no template.
        """
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
            "the tokenizer has no chat template, so it can't render messages; pass plain text or a template"
        )

    def control_tokens(self, template: str | None = None, *, tools: bool = False) -> ControlTokens:
        """Return the control tokens with the chat template that `render` uses for the same arguments.

        Raises:
            UserError: there is no template.
        """
        from tercet.model.control_tokens import ControlTokens

        text = self.template_text(template, tools=tools)
        if text not in self._control:
            self._control[text] = ControlTokens(list(self._added.values()), text, self.named_tokens)
        return self._control[text]

    def needs(self, *, tools: bool = False) -> TemplateNeeds:
        """Return what the chat template that `render` uses needs. UserError where there is none."""
        from tercet.model.template_needs import template_needs

        return template_needs(self.template_text(tools=tools), self.named_tokens)

    @cached_property
    def _control(self) -> dict[str, ControlTokens]:
        return {}

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        control_tokens: ControlTokenMode = "text",
        **options: Any,
    ) -> list[int]:
        """Return the token ids of `render`. No BOS is added, because the template writes it if needed.

        Args:
            messages: the conversation.
            tools: as for `render`.
            control_tokens: what control tokens that the messages spell become: ordinary text, or these tokens.
            **options: as for `render`.
        """
        if control_tokens == "control":
            return self.encode(self.render(messages, tools=tools, **options), special=False)
        control = self.control_tokens(options.get("template"), tools=tools is not None)
        text = self.render(control.mark(messages), tools=control.mark_value(tools), **options)
        return self.encode(control.unmark(text), special=False)


def _byte_alphabet() -> dict[str, bytes]:
    """Return GPT-2's characters for bytes (Radford et al. 2019): printable bytes themselves, else from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    unprintable = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + place): bytes([byte]) for place, byte in enumerate(unprintable)}


_BYTE_OF = _byte_alphabet()


def _missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"the directory {directory} does not exist"
    convert = "convert it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    if (directory / "tokenizer.model").is_file():
        return (
            f"{directory} has only a SentencePiece tokenizer (tokenizer.model), which is not read; {convert}"
        )
    if (directory / "vocab.json").is_file():
        return f"{directory} has vocab.json but no {TOKENIZER}; {convert}"
    return f"{directory} has no {TOKENIZER}; copy the tokenizer's files of the model there"


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def _text(token: Any) -> str | None:
    """Return the text of a token, which is a string or an object with ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that templates can name: ``bos_token`` and the like, and a model's own."""
    extra = config.get("extra_special_tokens")
    entries = {**config, **extra} if isinstance(extra, dict) else config
    named = {key: _text(value) for key, value in entries.items() if key.endswith("_token")}
    return {key: text for key, text in named.items() if text is not None}


def _extra_tokens(config: dict[str, Any]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [text for token in extra if (text := _text(token)) is not None] if isinstance(extra, list) else []


def _add_special_tokens(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    """Make each text a special token, which is matched whole in any text and left out of decoded text."""
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
    """Add the tokens that only tokenizer_config.json has (``added_tokens_decoder``: id to token)."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    try:
        for _, token in sorted((tokens or {}).items(), key=lambda item: int(item[0])):
            if token["content"] not in known:
                backend.add_tokens([AddedToken(**token)])
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{path}: field 'added_tokens_decoder' must map token ids to tokens") from problem


def _read_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return templates by name, from files or else from the older field: a text, or a list of named texts."""
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
            f"{directory / CONFIG}: field 'chat_template' must be a string or a list of named templates"
        ) from problem
