"""Tools in chat completions, through the openai client, for every format of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tool_templates as templates
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel, PositiveFloat, conint
from scripted_server import ScriptedServer, serve_script

SPECIAL = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]",),
    "named": ("[TOOL_CALLS]", "[ARGS]"),
    "identified": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "bare": ("<|python_tag|>",),
}
SAYS = {
    "hermes": '<tool_call>\n{"name": "Weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "Weather", "arguments": {"city": "Köln", "days": 2}}]',
    "named": '[TOOL_CALLS]Weather[ARGS]{"city": "Köln", "days": 2}',
    "identified": '[TOOL_CALLS]Weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Köln", "days": 2}',
    "bare": '<|python_tag|>{"name": "Weather", "parameters": {"city": "Köln", "days": 2}}',
}
ARGUMENTS = {"city": "Köln", "days": 2}


class Weather(BaseModel):
    city: str
    days: int


TOOL: Any = {"type": "function", "function": {"name": "Weather", "parameters": Weather.model_json_schema()}}


@pytest.fixture(scope="module", params=SAYS)
def style(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(style: str) -> Iterator[ScriptedServer]:
    with serve_script(templates.tokenizer_with(templates.ALL[style], SPECIAL[style])) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ScriptedServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def fields_with(fields: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Rain?"}]
    return {"model": "scripted", "messages": messages, "tools": [TOOL], "temperature": 0} | fields


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**fields_with(fields))


def test_a_call_comes_back_and_its_result_goes_in(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    server.says(SAYS[style])
    first = ask(client).choices[0]
    (call,) = first.message.tool_calls
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert (call.function.name, json.loads(call.function.arguments)) == ("Weather", ARGUMENTS)
    server.says("It rains.")
    messages = [
        {"role": "user", "content": "Rain?"},
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": "yes"},
    ]
    assert ask(client, messages=messages).choices[0].message.content == "It rains."
    written = SAYS[style].removeprefix("<|python_tag|>").partition("[CALL_ID]")[0].rstrip("]}")
    assert written in server.prompt() and "<|tool|>yes" in server.prompt()


def test_the_clients_accumulator_builds_the_same_from_a_stream(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    server.says(SAYS[style])
    state = ChatCompletionStreamState(input_tools=[TOOL])
    chunks = list(ask(client, stream=True))
    for chunk in chunks:
        state.handle_chunk(chunk)
    message = state.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("Weather", ARGUMENTS)
    assert not message.content
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    pieces = [call_delta for chunk in chunks for call_delta in chunk.choices[0].delta.tool_calls or []]
    assert len(pieces) > 1 and [piece.id is not None for piece in pieces].count(True) == 1


def test_a_model_that_would_not_call_is_made_to(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    server.says("x" * 300)
    for choice in ("required", {"type": "function", "function": {"name": "Weather"}}):
        (call,) = ask(client, tool_choice=choice, max_tokens=200).choices[0].message.tool_calls
        assert call.function.name == "Weather" and call.function.arguments.startswith('{"city": "')


def test_a_strict_function_can_only_be_called_rightly(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    server.says(SAYS[style].removeprefix("<|python_tag|>").replace("2}", "oh}"))
    tool = openai.pydantic_function_tool(Weather)
    completion = client.chat.completions.parse(
        model="scripted",
        messages=[{"role": "user", "content": "Rain?"}],
        tools=[tool],
        temperature=0,
        max_tokens=300,
    )
    (call,) = completion.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    server.says("Just text.")
    plain = client.chat.completions.parse(
        model="scripted", messages=[{"role": "user", "content": "Rain?"}], tools=[tool], temperature=0
    )
    assert plain.choices[0].message.content == "Just text." and not plain.choices[0].message.tool_calls


def test_a_call_that_was_cut_off_ends_for_length(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    server.says(SAYS[style])
    tokens = len(
        templates.tokenizer_with(templates.ALL[style], SPECIAL[style]).encode(SAYS[style], special=False)
    )
    choice = ask(client, max_tokens=tokens - len(' "days": 2}') - 12).choices[0]
    assert choice.finish_reason == "length"


def test_without_tools_their_format_is_text(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    server.says("Weather: sun")
    answer = ask(client, tool_choice="none").choices[0]
    assert answer.message.content == "Weather: sun" and answer.message.tool_calls is None
    assert "<|tools|>" not in server.prompt()


class Dose(BaseModel):
    grams: PositiveFloat
    times: conint(ge=1, le=4)  # type: ignore[valid-type]


class Color(BaseModel):
    names: set[str]


def test_bounded_arguments_of_several_functions_are_kept(
    server: ScriptedServer, client: openai.OpenAI, style: str
) -> None:
    said = SAYS[style].removeprefix("<|python_tag|>").replace("Weather", "Dose")
    said = said.replace('{"city": "Köln", "days": 2}', '{"grams": 0.50, "times": 9}')
    server.says(said)
    completion = client.chat.completions.parse(
        model="scripted",
        messages=[{"role": "user", "content": "How much?"}],
        tools=[openai.pydantic_function_tool(Dose), openai.pydantic_function_tool(Weather)],
        temperature=0,
        max_tokens=300,
    )
    (call, *_) = completion.choices[0].message.tool_calls or ()
    dose = call.function.parsed_arguments
    assert isinstance(dose, Dose)
    assert (dose.grams, call.function.arguments[:14]) == (0.5, '{"grams": 0.50')


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_that_no_grammar_can_hold_are_validated(
    server: ScriptedServer, client: openai.OpenAI, style: str, stream: bool
) -> None:
    said = SAYS[style].removeprefix("<|python_tag|>").replace("Weather", "Color")
    server.says(said.replace('{"city": "Köln", "days": 2}', '{"names": ["red", "red"]}'))
    tool: Any = {
        "type": "function",
        "function": {"name": "Color", "parameters": Color.model_json_schema(), "strict": True},
    }
    with pytest.raises(
        openai.APIError, match=r"arguments of Color are not valid under its schema: names: .*unique"
    ) as problem:
        answer = client.chat.completions.create(
            **fields_with({"tools": [tool], "stream": stream, "max_tokens": 200})
        )
        list(answer)
    assert problem.value.code == "json_validate_failed"
