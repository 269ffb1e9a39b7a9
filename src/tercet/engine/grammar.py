"""Grammars: the form that a whole output must have.

A grammar is compiled to a matcher by llguidance (https://github.com/guidance-ai/llguidance): a lexer
of derivatives of regular expressions under an Earley parser, walked over the vocabulary as a trie of
bytes. `tercet.engine.constraint` applies it to the tokens of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from tercet.engine.guidance import error_line, first_line, parser_limits, refusal
from tercet.engine.json_schema import located_refusal, schema_grammar
from tercet.engine.schema_check import violation
from tercet.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CHECKED = 64  # grammars whose check is remembered; a server may see any number of them


class GrammarError(UserError):
    """A grammar that cannot be used: it is invalid, or the tokenizer has no tokens for its texts."""


@dataclass(frozen=True)
class Grammar:
    """A form that a whole output must have. Equal grammars are compiled once.

    Build a grammar with `json_schema`, `regex`, `choices` or `lark`. These check the type of their
    argument; `check` tries whether the grammar can be compiled.
    """

    kind: Literal["json_schema", "regex", "choices", "lark"]
    text: str  # the schema or the list of choices as JSON, the regular expression, the Lark grammar

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of JSON that is valid under a JSON Schema (2020-12), laid out as by ``json.dumps``.

        Properties come in the order of the schema. An object whose schema has ``properties`` and does not
        mention ``additionalProperties`` gets only the named properties, unless the schema combines others
        (allOf, oneOf). The JSON is then still valid, and a model cannot invent properties without end.
        """
        if not isinstance(schema, Mapping):
            raise GrammarError(f"`schema` is a {type(schema).__name__}; it must be a JSON Schema as a dict")
        try:
            return cls("json_schema", json.dumps(dict(schema), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"`schema` can't be written as JSON: {first_line(error)}") from error

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""Return the grammar of texts that a regular expression matches from beginning to end.

        The syntax is that of Rust's regex crate: no look-around and no back references. Characters are
        Unicode characters, except that ``\d`` is 0 to 9.
        """
        return cls("regex", _checked_text(pattern, "regex"))

    @classmethod
    def choices(cls, choices: Sequence[str]) -> Grammar:
        """Return the grammar of a list of texts."""
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise GrammarError("`choices` must be a list of strings with at least one")
        texts = [_checked_text(choice, f"choices[{number}]") for number, choice in enumerate(choices)]
        return cls("choices", json.dumps(list(dict.fromkeys(texts))))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return a context-free grammar in llguidance's variant of Lark; ``start`` is its first rule."""
        return cls("lark", _checked_text(text, "grammar"))

    def check(self) -> None:
        """Raise GrammarError, with the cause and its place, for a grammar that cannot be compiled."""
        if reason := _check(self):
            raise GrammarError(reason)

    def compile(self, table: LLTokenizer) -> LLMatcher:
        """Return a matcher at the beginning of a text.

        Raises:
            GrammarError: as `check`, or the vocabulary of ``table`` lacks tokens for the grammar.
        """
        from llguidance import LLMatcher

        self.check()
        matcher = LLMatcher(table, self._source(), log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise GrammarError(self._describe(error_line(matcher.get_error())))
        return matcher

    def in_lark(self) -> str:
        """Return a JSON Schema as part of a Lark rule: ``f'start: "answer: " {grammar.in_lark()}'``."""
        if self.kind != "json_schema":
            raise ValueError(f"a {self.kind} can't be a part of a Lark rule; a JSON Schema can")
        return schema_grammar(self.text).in_lark()

    def violation(self, text: str) -> str:
        """Return why a whole output is not valid under the JSON Schema, or "" where it is.

        A grammar can't hold all of a schema: `unheld` names the rest. Other grammars hold everything.
        """
        return violation(self.text, text) if self.kind == "json_schema" else ""

    @property
    def unheld(self) -> frozenset[str]:
        """Keywords of the JSON Schema that the grammar does not hold."""
        return schema_grammar(self.text).unheld if self.kind == "json_schema" else frozenset()

    def _source(self) -> str:
        """Return the source that llguidance compiles."""
        from llguidance import LLMatcher, regex_to_lark

        if self.kind == "json_schema":
            return schema_grammar(self.text).source()
        if self.kind == "regex":
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(self.text, 'd')}/")
        if self.kind == "choices":
            # One terminal: a lexer copes with thousands of alternatives, a parser does not.
            alternatives = " | ".join(json.dumps(choice) for choice in json.loads(self.text))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {alternatives}")
        return LLMatcher.grammar_from_lark(self.text)

    def _describe(self, reason: str) -> str:
        """Return the error message for ``reason``, with the grammar it is about."""
        name = {"json_schema": "schema", "lark": "grammar"}.get(self.kind, self.kind)
        if self.kind == "lark":
            return f"{name}: {reason}"
        shown = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        # The place is one in the Lark grammar that was generated, which the user has not seen.
        return f"{name} {shown!r} can't be used: {re.sub(r'^line [0-9]+, column [0-9]+: ', '', reason)}"


@lru_cache(CHECKED)  # a grammar is checked before every call that uses it
def _check(grammar: Grammar) -> str:
    """Return what is wrong with a grammar and where, or "" when nothing is."""
    if grammar.kind == "json_schema":
        return located_refusal(grammar.text)
    reason = refusal(grammar._source())
    return reason and grammar._describe(reason)


def _checked_text(text: object, name: str) -> str:
    """Return ``text`` if it is a non-empty string that UTF-8 can encode; ``name`` names it in the error."""
    if not isinstance(text, str) or not text:
        raise GrammarError(f"`{name}` is {text!r:.60}; it must be a string that is not empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GrammarError(f"`{name}` is not valid Unicode text (character {error.start})") from error
    return text
