"""Anthropic's client with tools: forced, free, streamed, and with results."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import anthropic

WEATHER: Any = {
    "name": "weather",
    "description": "Return the weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def main(base_url: str, model_name: str) -> None:
    client = anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    fields: Any = {"model": model_name, "max_tokens": 50, "tools": [WEATHER]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        answer = client.messages.create(**fields, messages=messages, tool_choice=choice)
        call = answer.content[0]
        assert answer.stop_reason == "tool_use" and call.type == "tool_use" and "city" in call.input, answer
    with client.messages.stream(**fields, messages=messages, tool_choice={"type": "any"}) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].type == "tool_use", streamed
    messages.append({"role": "assistant", "content": answer.content})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain in Oslo."}
    messages.append({"role": "user", "content": [result]})
    last = client.messages.create(**fields, messages=messages)
    assert last.content, last
    counted = client.messages.count_tokens(model=model_name, messages=messages, tools=[WEATHER])
    assert counted.input_tokens == last.usage.input_tokens, (counted, last.usage)
    checked = ["any", "a named tool", "streamed", "auto with a result", "count_tokens"]
    print(json.dumps({"client": "anthropic", "version": version("anthropic"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
