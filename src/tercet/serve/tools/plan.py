"""Tools for a model that runs here: what the model sees, what it may write, and how its answer is read.

    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)    # OpenAI's shapes
    plan = plan_tools(tools, tokenizer, form)          # form: response_format as a Grammar, or None
    messages = template_messages(messages, tokenizer)  # earlier calls, as the template needs them
    tokens = served.prompt_tokens(messages, plan.tools)
    request = Request(tuple(tokens), sampling, plan.constraint)

    answer = plan.read(completion)             # a whole answer: .content (None beside calls), .calls
    parser = plan.parser()                     # a stream: one for each choice
    for delta in deltas:
        for piece in parser.push(delta): ...   # a str is content, a CallDelta a piece of a call
    for piece in parser.finish(): ...          # once, after the last delta

A plan without tools has no constraint but ``form``, and its parser returns all text as content, so that
callers need not distinguish. Everything that is wrong raises APIError 400.

Constrained decoding enforces ``tool_choice`` "required" and a named function, and, where the model is free to
call or not, ``strict`` functions and ``parallel_tool_calls: false``. With "none" the model does not see the
tools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.request import Completion, Delta
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import BAD_SCHEMA, UNSUPPORTED, APIError, invalid_value
from tercet.serve.tools.answer import Answer, gather
from tercet.serve.tools.formats import ToolFormat, tool_format
from tercet.serve.tools.parser import ToolParser
from tercet.serve.tools.request import ToolRequest


@dataclass(frozen=True)
class ToolPlan:
    """How one request's tools are carried out.

    tools: for the chat template; None where the model is to see none.
    constraint: the form of the whole output, tools and ``response_format`` together.
    """

    tools: list[dict[str, Any]] | None
    constraint: Grammar | None
    form: ToolFormat | None
    names: frozenset[str]
    tokenizer: Tokenizer | None

    def parser(self, *, whole: bool = False) -> ToolParser:
        """For one choice of a stream; ``whole`` as in `ToolParser`."""
        return ToolParser(self.form, self.names, self.tokenizer, whole=whole)

    def read(self, completion: Completion) -> Answer:
        """Content and calls of a whole answer."""
        parser = self.parser(whole=True)
        pieces = parser.push(Delta(0, completion.text, completion.tokens, None))
        return gather([*pieces, *parser.finish()])


def plan_tools(
    wanted: ToolRequest,
    tokenizer: Tokenizer | None,
    form: Grammar | None = None,
    form_param: str = "response_format",
) -> ToolPlan:
    """What to show to the model, what to hold it to, and how to read what it writes.

    tokenizer: the model's; with None (no chat template here), tools are refused.
    form: what content has to be, where it is not a call; ``form_param``: what it is called in the request.

    Raises:
        APIError: 400; the template knows no tools, or a schema can't be enforced.
    """
    if not wanted.functions or wanted.mode == "none":
        return ToolPlan(None, form, None, frozenset(), None)
    written = None if tokenizer is None else tool_format(tokenizer)
    if tokenizer is None or written is None:
        raise APIError(
            400,
            "this model's chat template has no way to call tools that is known here (Hermes and Qwen, "
            "Llama 3, Mistral); leave out tools, or use another model",
            param="tools",
            code=UNSUPPORTED,
        )
    functions = [one for one in wanted.functions if wanted.only in (None, one.name)]
    required = wanted.mode == "required"
    constraint = None
    if required or form is not None or not wanted.parallel or any(one.strict for one in functions):
        constraint = written.grammar(
            {one.name: one.arguments(enforced=required or one.strict) for one in functions},
            tokenizer,
            required=required,
            several=wanted.parallel and wanted.only is None,
            otherwise=None if required else _otherwise(form, written, form_param),
        )
        try:
            constraint.check()
        except GrammarError as problem:
            raise invalid_value("tools", f"can't be enforced together: {problem}", BAD_SCHEMA) from problem
    return ToolPlan(
        [one.for_template() for one in wanted.functions],
        constraint,
        written,
        frozenset(one.name for one in functions),
        tokenizer,
    )


def _otherwise(form: Grammar | None, written: ToolFormat, param: str) -> Grammar | None:
    if form is None:
        return None
    if form.kind != "json_schema":
        raise invalid_value(param, "together with tools can only be JSON", UNSUPPORTED)
    if not written.trigger:
        raise invalid_value(
            param,
            "and tools go together only with tool_choice required or none: this model's calls are JSON too, "
            "so that they can't be told from its answers",
            UNSUPPORTED,
        )
    return form
