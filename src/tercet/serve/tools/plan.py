"""Plan the tools of a local model: what the model sees, what it may write, and how its answer is read.

    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)    # OpenAI's shapes
    plan = plan_tools(tools, tokenizer, form)          # form: response_format as a Grammar, or None
    tokens = served.prompt_tokens(messages, plan.tools)
    plan = plan.after(tokens)                  # the prompt may have opened the model's reasoning
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
tools. A model whose template has no format for tools gets the generic one, which is always enforced: an answer
that begins as a call is one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tercet.data.reasoning import open_reasoning
from tercet.data.tool_format import GENERIC, ToolFormat, tool_format
from tercet.engine.grammar import Grammar, GrammarError
from tercet.engine.request import Completion, Delta
from tercet.model.tokenizer import Tokenizer
from tercet.serve.errors import BAD_SCHEMA, UNSUPPORTED, APIError, invalid_value
from tercet.serve.tools.answer import Answer, Piece, Thought, gather
from tercet.serve.tools.formats import call_grammar, end_of_reasoning
from tercet.serve.tools.parser import ToolParser
from tercet.serve.tools.request import Function, ToolRequest


@dataclass(frozen=True)
class ToolPlan:
    """How the tools of one request are shown, enforced and read.

    tools: for `Served.prompt_tokens`; None where the model is to see none.
    constraint: the grammar of the whole output, tools and ``response_format`` together.
    form: the format in which the model writes calls; None without tools.
    names: the functions that it may call.
    tokenizer: of the model; None without tools.
    thoughts: whether the output may contain reasoning, in which no text is a call.
    exact: whether JSON without arguments is an answer in the request's form, and no call.
    reasoning: the marker that ends reasoning which the prompt has opened; None: none, or the prompt is unknown.
    grammar: returns ``constraint`` for such a marker; None where it does not depend on one.
    content: the form of content that is not a call; None: any text.
    arguments: the enforced forms of arguments, by function.
    apart: whether reasoning is told from the content.
    """

    tools: list[dict[str, Any]] | None
    constraint: Grammar | None
    form: ToolFormat | None = None
    names: frozenset[str] = frozenset()
    tokenizer: Tokenizer | None = None
    thoughts: bool = True
    reasoning: str | None = None
    exact: bool = False
    grammar: Callable[[str | None], Grammar] | None = None
    content: Grammar | None = None
    arguments: Mapping[str, Grammar] = field(default_factory=dict)
    apart: bool = False

    def after(self, prompt: Sequence[int]) -> ToolPlan:
        """Return the plan for an answer to these tokens, which may have opened the model's reasoning."""
        if self.form is None or self.tokenizer is None:
            return self
        reasoning = open_reasoning(self.tokenizer, prompt)
        if reasoning is None:
            return self
        constraint = self.constraint if self.grammar is None else self.grammar(reasoning)
        return replace(self, constraint=constraint, reasoning=reasoning)

    def telling_thoughts(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> ToolPlan:
        """Return the plan of `after` for an answer whose reasoning is told from its content.

        Args:
            tokenizer: of the model.
            prompt: its tokens.
        """
        if self.form is not None:
            return replace(self, apart=True)
        if self.constraint is not None:  # the whole output has the form
            return self
        return replace(self, apart=True, tokenizer=tokenizer, reasoning=open_reasoning(tokenizer, prompt))

    def parser(self, *, whole: bool = False) -> ToolParser:
        """Return a parser for one choice of a stream; ``whole`` as in `ToolParser`."""
        ended = self.reasoning is not None and not self.thoughts
        return ToolParser(
            self.form,
            self.names,
            self.tokenizer,
            reasoning=None if ended else self.reasoning,
            skip=end_of_reasoning(self.reasoning) if self.reasoning is not None and ended else "",
            exact=self.exact,
            whole=whole,
            thoughts=self.apart,
        )

    def read(self, completion: Completion) -> Answer:
        """Return content and calls of a whole answer."""
        parser = self.parser(whole=True)
        pieces = parser.push(Delta(0, completion.text, completion.tokens, None))
        return gather([*pieces, *parser.finish()])

    def violation(self, pieces: Sequence[Piece]) -> str:
        """Return what in a whole answer is not valid under its schema, or "".

        A grammar can't hold all keywords of JSON Schema, so a whole answer is validated too.
        """
        answer = gather([piece for piece in pieces if not isinstance(piece, Thought)])
        for call in answer.calls:
            if call.name in self.arguments and (
                reason := self.arguments[call.name].violation(call.arguments)
            ):
                return f"the arguments of {call.name} are not valid under its schema: {reason}"
        content = answer.content or ""
        if self.content is not None and (reason := self.content.violation(content)):
            return f"the answer is not valid under its schema: {reason}"
        return ""


def plan_tools(
    request: ToolRequest,
    tokenizer: Tokenizer | None,
    form: Grammar | None = None,
    form_param: str = "response_format",
) -> ToolPlan:
    """Plan how the tools of a request are shown to the model, enforced, and read from its answer.

    Args:
        request: the tools.
        tokenizer: of the model; None: it is unknown, and tools are refused.
        form: the grammar of content that is not a call; None: any text.
        form_param: the name of that form in the request, for errors.

    Raises:
        APIError: 400; the model's tokenizer is unknown, or a schema cannot be enforced.
    """
    if not request.functions or request.mode == "none":
        return ToolPlan(None, form, content=form)
    if tokenizer is None:
        raise APIError(400, "this model takes no tools; leave them out", param="tools", code=UNSUPPORTED)
    call_format = tool_format(tokenizer) or GENERIC
    generic, required = call_format == GENERIC, request.mode == "required"
    functions = [function for function in request.functions if request.only in (None, function.name)]
    # A model that was not trained to call and must do so repeats its call until the answer is cut off.
    several = request.parallel is not False if not (generic and required) else bool(request.parallel)
    grammar = None
    strict = any(function.strict for function in functions)
    if required or generic or form is not None or request.parallel is False or strict:
        grammar = functools.partial(
            _constraint,
            call_format,
            {function.name: _arguments(function, required, generic) for function in functions},
            tokenizer,
            required=required,
            several=several and request.only is None,
            otherwise=None if required else _otherwise(form, call_format, form_param),
        )
    try:
        constraint = None if grammar is None else grammar(None)
        if constraint is not None:
            constraint.check()
    except GrammarError as problem:
        raise invalid_value("tools", f"cannot be enforced together: {problem}", BAD_SCHEMA) from problem
    return ToolPlan(
        [function.for_template() for function in request.functions],
        constraint,
        call_format,
        frozenset(function.name for function in functions),
        tokenizer,
        thoughts=not required and form is None,
        exact=form is not None,
        grammar=grammar,
        content=None if required else form,
        arguments={
            function.name: function.arguments(enforced=True)
            for function in functions
            if required or function.strict
        },
    )


def _constraint(
    call_format: ToolFormat,
    functions: Mapping[str, Grammar],
    tokenizer: Tokenizer,
    reasoning: str | None,
    **options: Any,
) -> Grammar:
    return call_grammar(call_format, functions, tokenizer, reasoning=reasoning, **options)


def _arguments(function: Function, required: bool, generic: bool) -> Grammar:
    """Return the grammar of a function's arguments; APIError 400 where the request enforces an impossible one."""
    if required or function.strict:
        return function.arguments(enforced=True)
    if generic:  # models that were not trained to call write better arguments under the schema
        with contextlib.suppress(APIError):
            return function.arguments(enforced=True)
    return function.arguments(enforced=False)


def _otherwise(form: Grammar | None, call_format: ToolFormat, param: str) -> Grammar | None:
    """Return the grammar of an answer that is not a call; APIError 400 where the two cannot be combined."""
    if form is None:
        return None
    if form.kind != "json_schema":
        raise invalid_value(param, "must be JSON when there are tools", UNSUPPORTED)
    if call_format.style == "bare":
        raise invalid_value(
            param,
            "and tools can be combined only with tool_choice required or none: this model's calls are JSON "
            "too, so they cannot be distinguished from its answers",
            UNSUPPORTED,
        )
    return form
