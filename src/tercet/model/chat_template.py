"""Chat templates: jinja2 programs from checkpoints, run in a sandbox with transformers' rules.

The rules are those of ``apply_chat_template`` in transformers 5: blocks are trimmed, ``break`` and
``continue`` work, ``tojson`` keeps HTML characters and other alphabets unchanged, templates can
call ``raise_exception`` and ``strftime_now``, and ``{% generation %}`` marks the assistant's text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tercet.errors import UserError

# Servers and data sets name a message's reasoning in these ways; templates read the first name.
REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(jinja2.ext.Extension):
    """The block ``{% generation %}…{% endgeneration %}``, which renders its content in its own scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """jinja2's ``namespace()`` without underscored names, which lead to Python's internals."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        entries = dict(*rest, **attributes)
        for name in entries:
            _check_name(name)
        Namespace.__init__(self, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace can't hold {name!r}: it begins with an underscore"
        )


def _dict(*args: Any, **entries: Any) -> dict[Any, Any]:
    return dict(*args, **entries)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_dict,
        namespace=_Namespace,
    )
    return environment


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _plain(value: Any, where: str) -> Any:
    """Return a copy with JSON values only: other objects have methods that the sandbox can't judge."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise UserError(f"{where} contains a {type(value).__name__}; it must consist of JSON values")


def _message(message: Any, number: int, null_content: bool) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is a {type(message).__name__}; it must be an object with role and content")
    # Servers write null for absent fields; templates would print it as None.
    plain = {key: _plain(value, where) for key, value in message.items() if value is not None}
    if null_content:
        plain.setdefault("content", None)
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    null_content: bool = False,
    **variables: Any,
) -> str:
    """Return the text of a conversation, as transformers' ``apply_chat_template(tokenize=False)`` does.

    Args:
        template: the template's text.
        messages: the conversation.
        tools: JSON schemas of the tools that the assistant can call.
        add_generation_prompt: end with the beginning of an assistant's answer.
        special_tokens: ``bos_token`` and the like, visible to the template.
        null_content: messages without content have the content null; otherwise they have none.
        **variables: more variables for the template, which take precedence over special tokens.

    Raises:
        UserError: the conversation is empty or not JSON, or the template is wrong or refuses it.
    """
    if not messages:
        raise UserError("the conversation is empty; a chat template needs at least one message")
    documents = variables.pop("documents", None)
    context = {
        **(special_tokens or {}),
        **{name: _plain(value, f"template variable {name!r}") for name, value in variables.items()},
        "messages": [
            _message(message, number, null_content) for number, message in enumerate(messages, start=1)
        ],
        "tools": None if tools is None else _plain(list(tools), "tools"),
        "documents": _plain(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compile(template).render(context)
    except jinja2.TemplateSyntaxError as problem:
        raise UserError(f"chat template, line {problem.lineno}: {_line(problem)}") from problem
    except jinja2.TemplateError as problem:
        raise UserError(f"the chat template refuses this conversation: {_line(problem)}") from problem
    except Exception as problem:  # a template is a program from a checkpoint: it may raise anything
        raise UserError(f"the chat template fails: {type(problem).__name__}: {_line(problem)}") from problem


@functools.lru_cache(maxsize=32)
def literal_text(template: str) -> str:
    """Return the texts that a template itself can write: the text around its tags, and its string constants.

    They are joined by null characters. The text of a template with a mistake is empty.
    """
    try:
        tree = _environment().parse(template)
    except jinja2.TemplateSyntaxError:
        return ""
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())
