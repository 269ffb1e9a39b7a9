"""openai-agents with function tools over chat completions and responses: forced, free, and with results."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

called: list[str] = []


@function_tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    called.append(city)
    return f"Rain in {city}."


async def check(base_url: str, model_name: str) -> list[str]:
    client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    checked = []
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=model_name, openai_client=client)
        for choice in ("required", "auto"):
            called.clear()
            settings = ModelSettings(tool_choice=choice, max_tokens=50, temperature=0)
            agent = Agent(
                name="guide", instructions="Be brief.", model=model, tools=[weather], model_settings=settings
            )
            result = await Runner.run(agent, "What is the weather in Oslo?", max_turns=4)
            assert isinstance(result.final_output, str) and result.final_output, result
            assert called or choice == "auto"
            checked.append(f"{kind.__name__} {choice}")
        settings = ModelSettings(tool_choice="required", max_tokens=50, temperature=0)
        agent = Agent(
            name="guide",
            model=model,
            tools=[weather],
            model_settings=settings,
            tool_use_behavior="stop_on_first_tool",
        )
        stream = Runner.run_streamed(agent, "What is the weather in Rome?")
        async for _ in stream.stream_events():
            pass
        assert str(stream.final_output).startswith("Rain in"), stream.final_output
        checked.append(f"{kind.__name__} streamed")
    return checked


def main(base_url: str, model_name: str) -> None:
    set_tracing_disabled(True)
    checked = asyncio.run(check(base_url, model_name))
    print(json.dumps({"client": "openai-agents", "version": version("openai-agents"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
