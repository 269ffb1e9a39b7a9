#!/usr/bin/env bash
# llguidance 1.9.1 builds grammars of JSON numbers from the bounds of a schema. Which spelling of a number it allows
# then depends on the bound, although JSON Schema bounds the value:
#   minimum 0.25, maximum 0.75    0.7 is refused and 0.70 is allowed, 0.75 is allowed and 0.750 refused
#   exclusiveMinimum 0            0.5 is allowed and 0.50 refused (minimum 0 allows both)
#   multipleOf 0.25               0.5 is refused and 0.50 allowed
#   exclusiveMinimum 0, maximum 0.1   0 is allowed, although 0 is excluded
#   any bound                     1e3 is refused, which the same schema without a bound allows
# We guessed that every spelling of a value within the bounds is allowed.
# A model that has written "0.7" must go on to "0.70"; one that has written "0.50" can't stop there.
set -euo pipefail
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
python3 -m venv "$where/venv"
"$where/venv/bin/pip" install --quiet llguidance==1.9.1
"$where/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def allowed(schema: dict, text: str) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


print("llguidance", version("llguidance"))
seen = {}
for bounds, texts in (
    ({"minimum": 0.25, "maximum": 0.75}, ("0.7", "0.70", "0.75", "0.750")),
    ({"exclusiveMinimum": 0}, ("0.5", "0.50", "1e3")),
    ({"minimum": 0}, ("0.5", "0.50", "1e3")),
    ({"multipleOf": 0.25}, ("0.5", "0.50")),
    ({"exclusiveMinimum": 0, "maximum": 0.1}, ("0", "0.1")),
    ({}, ("0.50", "1e3")),
):
    for text in texts:
        seen[json.dumps(bounds), text] = allowed({"type": "number"} | bounds, text)
        print(f"{json.dumps(bounds):40} {text:6} {'allowed' if seen[json.dumps(bounds), text] else 'refused'}")
expected = [False, True, True, False, True, False, False, True, True, False, False, True, True, True, True, True]
assert list(seen.values()) == expected, "the behaviour has changed"
PYTHON
