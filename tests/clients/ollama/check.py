"""Ollama's Python client: every method that this server answers, and the errors of the others."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version

import ollama

SCHEMA = {"type": "object", "properties": {"capital": {"enum": ["Oslo", "Rome"]}}, "required": ["capital"]}
QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]
SHORT = {"temperature": 0, "num_predict": 24, "num_ctx": 2048}


def weather(city: str, unit: str = "C") -> str:
    """Return the weather of a city.

    Args:
        city: the city.
        unit: of the temperature.
    """
    return f"Rain in {city}, 7 {unit}."


async def streamed(base_url: str, model: str) -> str:
    client = ollama.AsyncClient(base_url)
    parts = [part async for part in await client.chat(model, messages=QUESTION, options=SHORT, stream=True)]
    assert parts[-1].done and parts[-1].eval_count and len(parts) > 3, parts[-1]
    return "".join(part.message.content or "" for part in parts)


def main(base_url: str, model: str) -> None:
    client = ollama.Client(base_url)
    whole = client.chat(model, messages=QUESTION, options=SHORT, keep_alive="5m")
    assert whole.message.content and whole.done_reason in ("stop", "length"), whole
    assert whole.total_duration and whole.prompt_eval_count, whole
    assert asyncio.run(streamed(base_url, model)) == whole.message.content

    answer = client.chat(model, messages=QUESTION, options=SHORT, format=SCHEMA)
    assert json.loads(answer.message.content or "")["capital"] in ("Oslo", "Rome"), answer

    called = client.chat(model, messages=QUESTION, options=SHORT, tools=[weather])
    assert called.message.content is not None or called.message.tool_calls, called
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    result = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "tool_name": "weather", "content": weather("Oslo")},
    ]  # fmt: skip
    assert client.chat(model, messages=result, tools=[weather], options=SHORT).done

    first = client.generate(model, "Say one word.", system="Be brief.", options=SHORT)
    assert first.response and first.context, first
    assert client.generate(model, "Another.", context=first.context, options=SHORT).response
    assert client.generate(model, "Oslo is the capital of", raw=True, options=SHORT).response
    assert client.generate(model).done_reason == "load"
    assert client.generate(model, "Hi.", think=True, options=SHORT).done

    vectors = client.embed(model, ["one", "two"]).embeddings
    assert len(vectors) == 2 and abs(sum(value * value for value in vectors[0]) - 1) < 1e-3
    assert len(client.embeddings(model, "one").embedding) == len(vectors[0])

    names = [entry.model for entry in client.list().models]
    assert names == [f"{model}:latest"] and client.ps().models[0].model == names[0], names
    shown = client.show(names[0])
    assert shown.modelinfo and shown.details and shown.details.family and shown.capabilities, shown

    for method, status in (
        (lambda: client.chat("nothing", messages=QUESTION), 404),
        (lambda: client.pull("org/nothing"), 403),
        (lambda: client.delete(model), 501),
        (lambda: client.copy(model, "other"), 501),
        (lambda: client.chat(model, messages=QUESTION, options={"temperature": -1}), 400),
    ):
        try:
            method()
        except ollama.ResponseError as problem:
            assert problem.status_code == status and isinstance(problem.error, str), problem
        else:
            raise AssertionError(f"no error {status}")
    checked = [
        "chat", "streamed", "format", "tools", "generate", "context", "raw", "think", "embed", "list", "ps",
        "show", "errors",
    ]  # fmt: skip
    print(json.dumps({"client": "ollama", "version": version("ollama"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
