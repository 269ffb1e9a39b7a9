"""llguidance's verdict on a grammar, with its error messages shortened to one line.

https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits


def parser_limits() -> LLParserLimits:
    """Return llguidance's limits with short errors: verbose ones carry the parser's whole state."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def refusal(source: str) -> str:
    """Return why llguidance does not compile ``source``, or "" when it does."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(source, None, limits=parser_limits())
    return error_line(messages[0]) if is_error else ""


def error_line(message: str) -> str:
    """Return the essential part of an llguidance error in one line."""
    if "\nerror: " in message:  # llguidance draws the regular expression above its error
        return message.rpartition("\nerror: ")[2].partition("\n")[0]
    line = first_line(message)
    line = re.sub(r"^Unimplemented keys: \[(.*)\]$", r"JSON Schema keyword \1 is not supported", line)
    line = re.sub(r'invalid regex ".*" \(in regex\): ', "", line)
    line = re.sub(r"^(?:at )?([0-9]+)\(([0-9]+)\): ", r"line \1, column \2: ", line)
    return re.sub(r" in regex /.*/$", "", line)


def first_line(error: object) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]
