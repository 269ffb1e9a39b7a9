#!/usr/bin/env bash
# llguidance 1.9.1 matches the pattern of a JSON string against the string's value, and writes its characters with the
# escapes of JSON. A class of characters that has all control characters then allows every escape sequence, also of
# characters that it excludes:
#   ^[^"]*$      the string "\"" is allowed (its value is one quote)
#   ^[^\\]*$     the string "\\" is allowed (its value is one backslash)
# The same classes without control characters, ^[^"\x00-\x1f]*$ and ^[^\\\x00-\x1f]*$, refuse both, and so does
# ^[a-z]*$. We guessed that a pattern which excludes a character excludes it in every spelling.
set -euo pipefail
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
python3 -m venv "$where/venv"
"$where/venv/bin/pip" install --quiet llguidance==1.9.1
"$where/venv/bin/python" - <<'PYTHON'
import json
import re
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def allowed(pattern: str, value: str) -> bool:
    schema = json.dumps({"type": "string", "pattern": pattern})
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    tokens = tokenizer.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


print("llguidance", version("llguidance"))
seen = []
for pattern in (r'^[^"]*$', r"^[^\\]*$", r'^[^"\x00-\x1f]*$', r"^[^\\\x00-\x1f]*$", "^[a-z]*$"):
    for value in ('"', "\\", "a"):
        seen.append(allowed(pattern, value))
        matches = bool(re.search(pattern, value))
        print(f"{pattern:20} {json.dumps(value):6} {'allowed' if seen[-1] else 'refused'}, matches: {matches}")
expected = [True, True, True, True, True, True, False, True, True, True, False, True, False, False, True]
assert seen == expected, "the behaviour has changed"
PYTHON
