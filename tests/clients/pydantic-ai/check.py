"""pydantic-ai's default output mode: the answer is the call of a tool, which the server must enforce."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


async def streamed(agent: Agent[None, City]) -> City:
    async with agent.run_stream("The capital of Italy.") as result:
        return await result.get_output()


def population(city: str) -> int:
    """Return the population of a city."""
    return len(city) * 100_000


async def main(base_url: str, model_name: str) -> None:
    provider = OpenAIProvider(base_url=f"{base_url}/v1", api_key="none")
    settings = {"max_tokens": 60, "temperature": 0.0}
    checked = []
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(model_name, provider=provider)
        agent = Agent(model, output_type=City, model_settings=settings, retries=0)
        city = (await agent.run("The capital of France.")).output
        assert isinstance(city, City), city
        city = await streamed(agent)
        assert isinstance(city, City), city
        talker = Agent(model, tools=[population], model_settings=settings)
        text = (await talker.run("Say hello.")).output
        assert isinstance(text, str), text
        checked += [f"{kind.__name__}: {part}" for part in ("tool output", "streamed", "free choice")]
    print(json.dumps({"client": "pydantic-ai", "version": version("pydantic-ai-slim"), "checked": checked}))


if __name__ == "__main__":
    # The client of the provider belongs to one event loop.
    asyncio.run(main(*sys.argv[1:3]))
