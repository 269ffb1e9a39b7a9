"""litellm over chat completions, OpenAI's responses and Anthropic's messages."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it loads a price list from the network
import litellm

HI: list[Any] = [{"role": "user", "content": "Say hello."}]


def main(base_url: str, model_name: str) -> None:
    checked = []
    for provider, address in (
        ("openai", f"{base_url}/v1"),
        ("hosted_vllm", f"{base_url}/v1"),
        ("anthropic", base_url),
    ):
        fields: Any = {
            "model": f"{provider}/{model_name}",
            "api_base": address,
            "api_key": "none",
            "messages": HI,
            "max_tokens": 40,
            "temperature": 0,
        }
        text = litellm.completion(**fields).choices[0].message.content
        chunks = litellm.completion(**fields, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text and text == streamed, (provider, text, streamed)
        checked += [provider, f"{provider} streamed"]
    response = litellm.responses(
        model=f"openai/{model_name}",
        api_base=f"{base_url}/v1",
        api_key="none",
        input="Hi",
        max_output_tokens=40,
    )
    assert response.output
    print(
        json.dumps({"client": "litellm", "version": version("litellm"), "checked": [*checked, "responses"]})
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
