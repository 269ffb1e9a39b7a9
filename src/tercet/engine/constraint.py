"""Outputs of a given form: grammars, and which tokens they allow after the tokens so far.

A grammar is compiled to a matcher by llguidance (https://github.com/guidance-ai/llguidance): a lexer
of derivatives of regular expressions under an Earley parser, walked over the vocabulary as a trie of
bytes. What a matcher allows at each step can always be completed to a text of the grammar, so an
output is wrong only when it was cut off.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tercet.engine.text import TokenBytes
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILED = 64  # grammars kept ready by a Constraints; a server may see any number of them
# One layout, that of Python's json.dumps: free whitespace lets a weak model write blanks without end, and
# with it nothing between two values would be certain enough to be written without asking the model.
JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# Put before a text to see how it is encoded inside of one: characters that no token joins to what follows.
_BEFORE = ("", "\x02", "\n", "\x00")


class GrammarError(UserError):
    """A grammar that can't be used: it is no grammar, or the tokenizer can't write what it wants."""


@dataclass(frozen=True)
class Grammar:
    """A form that a whole output must have. Equal grammars are compiled once.

    Build one with `json_schema`, `regex`, `choices` or `lark`. That checks its type; `check` whether it
    can be compiled.
    """

    kind: Literal["json_schema", "regex", "choices", "lark"]
    text: str  # the schema or the list of choices as JSON, the regular expression, the Lark grammar

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that is valid under a JSON Schema (2020-12), as ``json.dumps`` lays it out.

        Properties come in the order of the schema. An object whose schema has ``properties`` and is
        silent about ``additionalProperties`` gets the properties named and no others (still valid, and
        a model can't go on inventing more), unless the schema combines others (allOf, oneOf).
        """
        if not isinstance(schema, Mapping):
            raise GrammarError(f"schema is a {type(schema).__name__}; it must be a JSON Schema as a dict")
        try:
            return cls("json_schema", json.dumps(dict(schema), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as problem:
            raise GrammarError(f"schema can't be written as JSON: {_first_line(problem)}") from problem

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""Text that a regular expression matches from beginning to end.

        The syntax is that of Rust's regex crate: no look-around and no back references. Characters are
        Unicode ones, except that ``\d`` is 0 to 9.
        """
        return cls("regex", _text(pattern, "regex"))

    @classmethod
    def choices(cls, choices: Sequence[str]) -> Grammar:
        """One of some texts."""
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise GrammarError("choices must be a list of strings with at least one")
        texts = [_text(choice, f"choices[{number}]") for number, choice in enumerate(choices)]
        return cls("choices", json.dumps(list(dict.fromkeys(texts))))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in llguidance's kind of Lark syntax; ``start`` is its first rule."""
        return cls("lark", _text(text, "grammar"))

    def check(self) -> None:
        """Raise GrammarError, saying what is wrong and where, for a grammar that can't be compiled."""
        if refusal := _why_not(self):
            raise GrammarError(refusal)

    def compile(self, table: LLTokenizer) -> LLMatcher:
        """A matcher at the beginning of a text. GrammarError as `check`, and for a vocabulary too poor."""
        from llguidance import LLMatcher

        self.check()
        matcher = LLMatcher(table, self._source(), log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(self._described(_reason(matcher.get_error())))
        return matcher

    def _source(self) -> str:
        """What llguidance reads."""
        from llguidance import LLMatcher, regex_to_lark

        if self.kind == "json_schema":
            return _json_source(self._schema())
        if self.kind == "regex":
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(self.text, 'd')}/")
        if self.kind == "choices":
            # One terminal: thousands of alternatives are nothing to a lexer and too much for a parser.
            either = " | ".join(json.dumps(choice) for choice in json.loads(self.text))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {either}")
        return LLMatcher.grammar_from_lark(self.text)

    def in_lark(self) -> str:
        """A JSON Schema as a part of a rule in a Lark grammar: ``f'start: "answer: " {form.in_lark()}'``."""
        if self.kind != "json_schema":
            raise ValueError(f"a {self.kind} can't be a part of a Lark rule; a JSON Schema can")
        return f"%json {json.dumps(self._schema() | {'x-guidance': JSON_LAYOUT})}"

    def _schema(self) -> dict[str, Any]:
        """The schema that is compiled."""
        schema: dict[str, Any] = json.loads(self.text)
        closed: dict[str, Any] = _closed(schema)
        return schema if closed != schema and _schema_refusal(closed) else closed

    def _described(self, reason: str) -> str:
        name = {"json_schema": "schema", "lark": "grammar"}.get(self.kind, self.kind)
        if self.kind == "lark":
            return f"{name}: {reason}"
        shown = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        # The place is one in the grammar that was made of it.
        return f"{name} {shown!r} can't be used: {re.sub(r'^line [0-9]+, column [0-9]+: ', '', reason)}"


class Constraints:
    """Grammars on the vocabulary of one model.

    vocab_size: rows of the model's logits; rows without a token of the tokenizer are never allowed.
    stop_ids: the tokens that end an output. They, and special tokens, are never text.

    The vocabulary's table is made at the first matcher (about a second for 150 000 tokens).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._stops = np.array(sorted({token for token in stop_ids if 0 <= token < vocab_size}), np.intp)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an output.

        Raises:
            GrammarError: llguidance refuses the grammar, or the tokenizer has no tokens for it.
        """
        ready = self._compiled.pop(grammar, None)
        if ready is None:
            ready = grammar.compile(self._table)
            if len(self._compiled) >= COMPILED:
                self._compiled.popitem(last=False)
        self._compiled[grammar] = ready
        return Matcher(ready.deep_copy(), self.vocab_size, self._stops)

    @cached_property
    def _table(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        wrapper = TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab_size, set(self._stops.tolist())))
        return LLTokenizer(wrapper, eos_token=self.vocab_size)


class Matcher:
    """The state of one output under a grammar.

    Methods raise GrammarError when there is no way on: the tokenizer lacks characters that the grammar
    wants (one without all bytes), or the grammar grew beyond llguidance's limits.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, stops: NDArray[np.intp]) -> None:
        self._matcher, self._vocab_size, self._stops = matcher, vocab_size, stops
        self._stop_set = frozenset(stops.tolist())
        self._mask: NDArray[np.bool_] | None = None
        self._may_end = False

    def mask(self) -> NDArray[np.bool_]:
        """[V] tokens that may come now, stop ids where the text may end. Read-only; none without stop ids."""
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            allowed = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
            self._may_end = bool(allowed[self._vocab_size])
            mask = allowed[: self._vocab_size]
            mask[self._stops] |= self._may_end
            mask.flags.writeable = False
            self._mask = mask
        return self._mask

    def forced(self) -> list[int]:
        """Tokens that must come now, whatever the model says; they are not accepted by this.

        They are those that the tokenizer itself encodes the certain text to. Where the last of them
        might be joined with what follows, it is left to the model.
        """
        found: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return found

    def accept(self, token: int) -> None:
        """Go on after ``token``. ValueError when the mask does not allow it."""
        if not 0 <= token < self._vocab_size:
            raise ValueError(f"token {token} is none of 0 to {self._vocab_size - 1}")
        accepted = self._matcher.consume_token(self._own(token))
        self._mask = None
        if not accepted:
            if "doesn't satisfy the grammar" not in self._matcher.get_error():
                self._check()
            raise ValueError(f"the grammar does not allow token {token} here")

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` would be accepted in a row; the state stays as it is.

        What counts is the text: where some text is certain, tokens that write it in another way than
        the tokenizer would are accepted too, though `mask` leaves them out.
        """
        own = []
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                break
            own.append(self._own(token))
        count: int = self._matcher.validate_tokens(own)
        return count

    @property
    def ended(self) -> bool:
        """Nothing but the end may follow."""
        if self._matcher.is_stopped():
            self._check()
            return True
        if not self._matcher.is_accepting():
            return False
        # A parser may learn only from the vocabulary that nothing can follow.
        mask = self.mask()
        return self._may_end and np.count_nonzero(mask) == len(self._stops)

    def _own(self, token: int) -> int:
        """llguidance's token: all stop ids are one, which lies behind the vocabulary."""
        return self._vocab_size if token in self._stop_set else token

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = _reason(self._matcher.get_error())
        if reason.startswith("NoExtension"):
            raise GrammarError(
                "the output can't go on: the tokenizer has no tokens for characters that the grammar wants"
            )
        raise GrammarError(f"the grammar is too complex to follow ({reason}); make it simpler")


class _Vocabulary:
    """A tokenizer as llguidance wants to see it: the bytes of each token, and a function that encodes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stops: set[int]) -> None:
        bytes_of = TokenBytes(tokenizer)
        known = min(vocab_size, tokenizer.vocab_size)
        visible = [b"" if token in stops else bytes_of(token) for token in range(known)]
        self._tokenizer, self._bytes = tokenizer, visible + [b""] * (vocab_size - known)
        self._before: dict[str, list[int]] = {}
        # The names of special tokens, so that a Lark grammar may ask for one.
        named = [found or tokenizer.token_bytes(token) for token, found in enumerate(visible)]
        self.tokens = named + [b""] * (vocab_size - known) + [b"<|end of output|>"]
        self.special_token_ids = [token for token, found in enumerate(self._bytes) if not found]
        self.special_token_ids.append(vocab_size)
        self.eos_token_id, self.bos_token_id = vocab_size, None

    def __call__(self, data: bytes) -> list[int]:
        """Tokens that add exactly ``data`` to a text: the tokenizer's own where it can be asked for them."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # the rest of a character
            return self._greedy(data)
        for before in _BEFORE:
            if before not in self._before:
                self._before[before] = self._tokenizer.encode(before, special=False)
            start = self._before[before]
            tokens = self._tokenizer.encode(before + text, special=False)
            if tokens[: len(start)] == start and self._join(tokens[len(start) :]) == data:
                return tokens[len(start) :]
        return self._greedy(data)

    def _join(self, tokens: Sequence[int]) -> bytes | None:
        """What the tokens add to a text; None when one of them adds nothing."""
        parts = [self._bytes[token] if token < len(self._bytes) else b"" for token in tokens]
        return b"".join(parts) if all(parts) else None

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token each time; fewer bytes than ``data`` where no token goes on."""
        found: list[int] = []
        place = 0
        while place < len(data):
            for length in range(min(self._longest, len(data) - place), 0, -1):
                token = self._ids.get(data[place : place + length])
                if token is not None:
                    found.append(token)
                    place += length
                    break
            else:
                break
        return found

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {found: token for token, found in enumerate(self._bytes) if found}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


@lru_cache(COMPILED)  # a grammar is checked before every call that uses it
def _why_not(grammar: Grammar) -> str:
    """What is wrong with a grammar, and where; "" when nothing is."""
    if grammar.kind != "json_schema":
        reason = _refusal(grammar._source())
        return reason and grammar._described(reason)
    schema = json.loads(grammar.text)
    reason = _schema_refusal(schema)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return reason and _placed(schema, shared, reason)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise GrammarError(f"{what} is {value!r:.60}; it must be a string that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise GrammarError(f"{what} is not valid Unicode text (character {problem.start})") from problem
    return value


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)  # otherwise an error carries the parser's whole state


def _json_source(schema: Any) -> str:
    from llguidance import LLMatcher

    # Defaults: a schema's own "x-guidance" may ask for another layout.
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_LAYOUT)  # type: ignore[arg-type]


def _refusal(source: str) -> str:
    """Why llguidance does not compile ``source``; "" when it does."""
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(source, None, limits=_limits())
    return _reason(messages[0]) if wrong else ""


def _schema_refusal(schema: Any) -> str:
    try:
        return _refusal(_json_source(schema))
    except ValueError as problem:  # not an object, or its "x-guidance" is wrong
        return _first_line(problem)


def _reason(message: str) -> str:
    """The point of an error of llguidance, in one line."""
    if "\nerror: " in message:  # the regular expression is drawn above it
        return message.rpartition("\nerror: ")[2].partition("\n")[0]
    line = message.strip().partition("\n")[0]
    line = re.sub(r"^Unimplemented keys: \[(.*)\]$", r"JSON Schema keyword \1 is not supported", line)
    line = re.sub(r'invalid regex ".*" \(in regex\): ', "", line)
    line = re.sub(r"^(?:at )?([0-9]+)\(([0-9]+)\): ", r"line \1, column \2: ", line)
    return re.sub(r" in regex /.*/$", "", line)


def _first_line(problem: object) -> str:
    return str(problem).strip().partition("\n")[0]


_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_UNSATISFIABLE = "Unsatisfiable schema"
_SINGLE = ("items", "additionalProperties")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly inside of one, each with its place."""
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from (
                (f"{key}.{name}", part) for name, part in schema[key].items() if isinstance(part, dict)
            )
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            parts = enumerate(schema[key])
            yield from ((f"{key}[{number}]", part) for number, part in parts if isinstance(part, dict))
    yield from ((key, schema[key]) for key in _SINGLE if isinstance(schema.get(key), dict))


def _placed(schema: dict[str, Any], shared: dict[str, Any], reason: str, where: str = "schema") -> str:
    """The refusal of a schema with the innermost part that is to blame; ``shared``: what it may refer to."""
    for name, part in _parts(schema):
        inner = _schema_refusal({**shared, **part})
        # What nothing can satisfy is told in other words from outside.
        if inner == reason or (inner.startswith(_UNSATISFIABLE) and reason.startswith(_UNSATISFIABLE)):
            return _placed(part, shared, inner, f"{where}.{name}")
    return f"{where}: {reason}"


def _closed(schema: Any) -> Any:
    """The schema with its objects closed where it is silent; unchanged where that might change more.

    Under oneOf, not and if, a narrower part can make the whole wider (not where a discriminator tells the
    alternatives apart); allOf means to add properties.
    """
    for part in _all_parts(schema):
        if any(key in part for key in ("allOf", "not", "if")) or (
            "oneOf" in part and "discriminator" not in part
        ):
            return schema
    return _close(schema)


def _all_parts(schema: Any) -> Iterator[dict[str, Any]]:
    yield schema
    for _, part in _parts(schema):
        yield from _all_parts(part)


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = dict(schema)
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _close(part) for name, part in schema[key].items()}
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            closed[key] = [_close(part) for part in schema[key]]
    for key in _SINGLE:
        if key in schema:
            closed[key] = _close(schema[key])
    named, required = schema.get("properties"), schema.get("required", [])
    others = ("additionalProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref", "minProperties")
    if not isinstance(named, dict) or not isinstance(required, list) or any(key in schema for key in others):
        return closed
    if all(name in named for name in required):
        closed["additionalProperties"] = False
    return closed
