"""OpenAI's client: chat completions, responses, completions and embeddings, whole and streamed."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import openai

HI: list[Any] = [{"role": "user", "content": "Say hello."}]


def main(base_url: str, model_name: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    assert model_name in [model.id for model in client.models.list()]
    fields: Any = {"model": model_name, "messages": HI, "max_tokens": 40, "temperature": 0}
    answer = client.chat.completions.create(**fields)
    text = answer.choices[0].message.content
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and streamed == text and chunks[-1].usage == answer.usage, (text, streamed)
    raw = client.chat.completions.with_raw_response.create(
        **fields, user="u", metadata={"a": "b"}, store=True
    )
    assert raw.headers["x-ignored"] == "user, metadata, store", raw.headers
    asked: Any = {"model": model_name, "input": "Say hello.", "max_output_tokens": 40, "temperature": 0}
    response = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    parts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert response.output_text == "".join(parts) == text
    count = client.responses.input_tokens.count(model=model_name, input="Say hello.")
    assert response.usage is not None and count.input_tokens == response.usage.input_tokens
    again: Any = [
        {"role": "user", "content": "Say hello."},
        {"type": "item_reference", "id": response.output[0].id},
    ]
    assert client.responses.create(**asked | {"input": [*again, *HI]}).output_text
    assert client.completions.create(model=model_name, prompt="<|assistant|>", max_tokens=4).choices
    assert client.embeddings.create(model=model_name, input=["a", "b"]).data[1].embedding
    checked = [
        "chat",
        "streamed",
        "x-ignored",
        "responses",
        "items",
        "input_tokens",
        "completions",
        "embeddings",
    ]
    print(json.dumps({"client": "openai", "version": version("openai"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
