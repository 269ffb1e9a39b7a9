"""Semantic Kernel's agents, whose messages carry names: two of them in one thread, and one with a function."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from openai import AsyncOpenAI
from semantic_kernel.agents import ChatCompletionAgent, ChatHistoryAgentThread
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion
from semantic_kernel.functions import kernel_function


class Notes:
    @kernel_function(name="read_note", description="Read a file.")
    def read_note(self, path: str) -> str:
        return Path(path).read_text()


async def check(base_url: str, model_name: str) -> None:
    client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    service = OpenAIChatCompletion(ai_model_id=model_name, async_client=client)
    thread = ChatHistoryAgentThread()
    for name in ("Ann", "Bob"):
        agent = ChatCompletionAgent(service=service, name=name, instructions="Be brief.")
        answer = await agent.get_response(messages="Say hello.", thread=thread)
        assert str(answer), answer
    with tempfile.TemporaryDirectory() as directory:
        note = Path(directory) / "note.txt"
        note.write_text("The colour is teal.\n")
        agent = ChatCompletionAgent(service=service, name="Reader", plugins=[Notes()])
        answer = await agent.get_response(messages=f"Which colour is in {note}?")
        assert "The note says teal" in str(answer), answer


def main(base_url: str, model_name: str) -> None:
    asyncio.run(check(base_url, model_name))
    checked = ["two agents in one thread", "an agent with a function"]
    print(
        json.dumps({"client": "semantic-kernel", "version": version("semantic-kernel"), "checked": checked})
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
