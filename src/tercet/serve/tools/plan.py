"""Plan the tools of a local model: what the model sees, what it may write, and how its answer is read.

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

from tercet.data.tool_format import ToolFormat, tool_format
from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.request import Completion, Delta
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import BAD_SCHEMA, UNSUPPORTED, APIError, invalid_value
from tercet.serve.tools.answer import Answer, gather
from tercet.serve.tools.formats import call_grammar
from tercet.serve.tools.parser import ToolParser
from tercet.serve.tools.request import ToolRequest


@dataclass(frozen=True)
class ToolPlan:
    """How the tools of one request are shown, enforced and read.

    tools: for the chat template; None where the model is to see none.
    constraint: the grammar of the whole output, tools and ``response_format`` together.
    form: the format in which the model writes calls; None without tools.
    names: the functions that it may call.
    tokenizer: of the model; None without tools.
    """

    tools: list[dict[str, Any]] | None
    constraint: Grammar | None
    form: ToolFormat | None
    names: frozenset[str]
    tokenizer: Tokenizer | None

    def parser(self, *, whole: bool = False) -> ToolParser:
        """Return a parser for one choice of a stream; ``whole`` as in `ToolParser`."""
        return ToolParser(self.form, self.names, self.tokenizer, whole=whole)

    def read(self, completion: Completion) -> Answer:
        """Return content and calls of a whole answer."""
        parser = self.parser(whole=True)
        pieces = parser.push(Delta(0, completion.text, completion.tokens, None))
        return gather([*pieces, *parser.finish()])


def plan_tools(
    request: ToolRequest,
    tokenizer: Tokenizer | None,
    form: Grammar | None = None,
    form_param: str = "response_format",
) -> ToolPlan:
    """Plan how the tools of a request are shown to the model, enforced, and read from its answer.

    Args:
        request: the tools.
        tokenizer: of the model; None: its chat template is unknown, and tools are refused.
        form: the grammar of content that is not a call; None: any text.
        form_param: the name of that form in the request, for errors.

    Raises:
        APIError: 400; the template supports no tools, or a schema cannot be enforced.
    """
    if not request.functions or request.mode == "none":
        return ToolPlan(None, form, None, frozenset(), None)
    call_format = None if tokenizer is None else tool_format(tokenizer)
    if tokenizer is None or call_format is None:
        raise APIError(
            400,
            "this model's chat template has none of the supported formats of tool calls (Hermes and Qwen, "
            "Llama 3, Mistral); leave out tools, or use another model",
            param="tools",
            code=UNSUPPORTED,
        )
    functions = [function for function in request.functions if request.only in (None, function.name)]
    required = request.mode == "required"
    constraint = None
    if required or form is not None or not request.parallel or any(function.strict for function in functions):
        constraint = call_grammar(
            call_format,
            {
                function.name: function.arguments(enforced=required or function.strict)
                for function in functions
            },
            tokenizer,
            required=required,
            several=request.parallel and request.only is None,
            otherwise=None if required else _otherwise(form, call_format, form_param),
        )
        try:
            constraint.check()
        except GrammarError as problem:
            raise invalid_value("tools", f"cannot be enforced together: {problem}", BAD_SCHEMA) from problem
    return ToolPlan(
        [function.for_template() for function in request.functions],
        constraint,
        call_format,
        frozenset(function.name for function in functions),
        tokenizer,
    )


def _otherwise(form: Grammar | None, call_format: ToolFormat, param: str) -> Grammar | None:
    """Return the grammar of an answer that is not a call; APIError 400 where the two cannot be combined."""
    if form is None:
        return None
    if form.kind != "json_schema":
        raise invalid_value(param, "must be JSON when there are tools", UNSUPPORTED)
    if not call_format.trigger:
        raise invalid_value(
            param,
            "and tools can be combined only with tool_choice required or none: this model's calls are JSON "
            "too, so they cannot be distinguished from its answers",
            UNSUPPORTED,
        )
    return form
