"""Chat templates that write tool calls in the formats of well-known models, and a tokenizer for them."""

from __future__ import annotations

from functools import cache

from tercet.model.tokenizer import Tokenizer

MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")

_TURN = "<|{{ m.role }}|>{{ m.content }}"
_BEGIN_ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
_TOOLS = "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}"

PLAIN = "{% for m in messages %}" + _TURN + "<|end|>{% endfor %}" + _BEGIN_ANSWER

HERMES = (
    _TOOLS + "{% for m in messages %}" + _TURN + "{% for c in m.tool_calls or [] %}"
    '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% endfor %}" + _BEGIN_ANSWER
)
# Requires the arguments as a string of JSON, as requests send them.
HERMES_STRINGS = HERMES.replace("c.function.arguments | tojson", "c.function.arguments + ''")
MISTRAL = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('identifiers have nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}" + _TURN + "{{ m.tool_call_id }}"
    "{% endif %}<|end|>{% endfor %}" + _BEGIN_ANSWER
)
NAMED = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}{% else %}"
    + _TURN
    + "{% endif %}<|end|>{% endfor %}"
    + _BEGIN_ANSWER
)
BARE = (
    _TOOLS + "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% set c = m.tool_calls[0].function %}"
    '<|{{ m.role }}|>{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
    "{% else %}" + _TURN + "{% endif %}<|end|>{% endfor %}" + _BEGIN_ANSWER
)
IDENTIFIED = NAMED.replace("[ARGS]", "[CALL_ID]{{ c.id }}[ARGS]")
ALL = {"hermes": HERMES, "mistral": MISTRAL, "named": NAMED, "identified": IDENTIFIED, "bare": BARE}


@cache
def tokenizer_with(template: str | None, special: tuple[str, ...] = ()) -> Tokenizer:
    """Return a tokenizer with one token per byte and per marker; tokens in ``special`` decode to nothing."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|tools|>"]
    vocabulary = {token: number for number, token in enumerate([*names, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    backend.add_special_tokens([AddedToken(marker, special=True) for marker in special])
    backend.add_tokens([AddedToken(marker, special=False) for marker in MARKERS if marker not in special])
    return Tokenizer.from_backend(backend, eos="</s>", chat_template=template)
