"""Requests to Anthropic's Messages API: their fields, and the settings of the engine.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tercet.engine.grammar import Grammar
from tercet.engine.request import Sampling
from tercet.serve.api.field_table import Body, Hint, Ignored, OpenBody, Refused, Used, WhereKnown
from tercet.serve.api.fields import NO_CACHE_SETTINGS, NO_TIERS, NO_USERS, ModelName, sampling_values
from tercet.serve.api.response_format import checked_schema
from tercet.serve.models import Served

Json = dict[str, Any]
_NO_THREADS = "this server holds no conversations, so the request has the whole one"


class InputMessage(OpenBody):
    """One turn."""

    role: Annotated[
        Literal["user", "assistant", "system"], Used("system messages keep their place in the conversation")
    ]
    content: Annotated[str | list[dict[str, Any]], Used("a text, or a list of blocks")] = ""
    clear_at: Annotated[
        Literal["next_user_message", "never"] | None,
        Used("`next_user_message`: the system message ends with the user's turn that it follows"),
    ] = None


class ToolChoice(OpenBody):
    """``tool_choice``."""

    type: Annotated[Literal["auto", "any", "tool", "none"], Used("enforced by constrained decoding")]
    name: Annotated[str | None, Used("with type `tool`")] = None
    disable_parallel_tool_use: Annotated[bool | None, Used("true: one call at most, enforced")] = None


class JSONFormat(Body):
    """``output_config.format``."""

    type: Annotated[Literal["json_schema"], Used("`json_schema`")]
    schema_: Annotated[dict[str, Any], Field(alias="schema"), Used("enforced token by token")]


class OutputConfig(OpenBody):
    """``output_config``."""

    format: Annotated[JSONFormat | None, Used("the form of the answer's text")] = None
    effort: Annotated[str | None, WhereKnown("`reasoning_effort` of the chat template")] = None
    task_budget: Annotated[Any, Hint("models of this server do not see a budget")] = None


class Thinking(OpenBody):
    """``thinking``."""

    type: Annotated[str, WhereKnown("`enable_thinking` of the chat template; `disabled` turns it off")]
    budget_tokens: Annotated[Any, Hint("the length of an answer is limited as a whole, by `max_tokens`")] = (
        None
    )
    display: Annotated[Any, Hint("reasoning is not told from the answer")] = None


class Thread(OpenBody):
    """``thread`` of the client's tool runner: ``continue`` would need a conversation on the server."""

    type: Annotated[str, Refused("this server holds no conversations; send the whole one", ("create",))]


class CountRequest(Body):
    """The body of ``POST /v1/messages/count_tokens``."""

    model: ModelName = None
    messages: Annotated[
        Annotated[list[InputMessage], Field(min_length=1)],
        Used("the conversation; consecutive turns of one role are one turn"),
    ]
    system: Annotated[str | list[dict[str, Any]] | None, Used("a text, or blocks of text")] = None
    tools: Annotated[
        list[dict[str, Any]] | None,
        Used(
            "tools of type `custom`; Anthropic's own are not offered to the model, and named in `x-ignored`"
        ),
    ] = None
    tool_choice: Annotated[ToolChoice | None, Used("how the model may call them")] = None
    output_config: Annotated[OutputConfig | None, Used("see its fields")] = None
    thinking: Annotated[Thinking | None, WhereKnown("see its fields")] = None
    thread: Annotated[Thread | None, Used("`create` is ignored, and `continue` refused")] = None
    cache_control: Annotated[Any, NO_CACHE_SETTINGS] = None
    context_management: Annotated[
        Any, Hint("this server does not shorten conversations; one that is too long is refused")
    ] = None
    metadata: Annotated[Any, NO_USERS] = None
    speed: Annotated[Any, NO_TIERS] = None
    service_tier: Annotated[Any, NO_TIERS] = None
    inference_geo: Annotated[Any, Hint("this server is in one place")] = None
    user_profile_id: Annotated[Any, NO_USERS] = None
    workspace_id: Annotated[Any, NO_USERS] = None
    mcp_servers: Annotated[Any, Hint("this server calls no other servers for tools", ([],))] = None

    def review(self, ignored: Ignored, where: str = "") -> None:
        """Apply the classes of the fields."""
        super().review(ignored, where)
        if self.thread is not None:
            ignored.add(f"{where}thread", _NO_THREADS)

    async def form(self) -> Grammar | None:
        """Return the grammar of the answer's text. APIError 400 for a schema that cannot be enforced."""
        form = self.output_config and self.output_config.format
        if not form:
            return None
        return await checked_schema(form.schema_, "output_config.format.schema")


class MessageRequest(CountRequest):
    """The body of ``POST /v1/messages``."""

    max_tokens: Annotated[Annotated[int, Field(ge=1)], Used("the largest length of the answer")]
    temperature: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None, Used("0 to 1; 0 selects the most probable token")
    ] = None
    top_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Used("0 to 1")] = None
    top_k: Annotated[Annotated[int, Field(ge=0)] | None, Used("0: off")] = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Used("the answer ends before them; the response names the one that ended it"),
    ] = None
    stream: Annotated[bool | None, Used("send the answer while it is written")] = None
    container: Annotated[Any, Hint("this server runs no code")] = None
    diagnostics: Annotated[Any, Hint("this server reports none")] = None
    billing_policy: Annotated[Any, Hint("this server bills nobody")] = None
    fallbacks: Annotated[Any, Hint("the model of the request answers, and no other")] = None
    fallback_credit_token: Annotated[Any, Hint("the model of the request answers, and no other")] = None
    compaction: Annotated[
        Any, Refused("this server does not summarize conversations; ask for a summary in a message")
    ] = None

    def sampling(self, served: Served, max_tokens: int) -> Sampling:
        """Return the engine's settings."""
        return Sampling(
            max_tokens=max_tokens,
            stop=tuple(self.stop_sequences or ()),
            **sampling_values(served, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k),
        )
