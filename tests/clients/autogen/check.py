"""AutoGen's assistants, whose messages carry names: one with a tool, and two that talk in turn."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient


async def read_note(path: str) -> str:
    """Read a file."""
    return Path(path).read_text()


async def check(base_url: str, model_name: str) -> None:
    info: Any = {
        "vision": False,
        "function_calling": True,
        "json_output": True,
        "family": "unknown",
        "structured_output": True,
        "multiple_system_messages": True,
    }
    client = OpenAIChatCompletionClient(
        model=model_name, base_url=f"{base_url}/v1", api_key="none", model_info=info, max_tokens=200
    )
    with tempfile.TemporaryDirectory() as directory:
        note = Path(directory) / "note.txt"
        note.write_text("The colour is teal.\n")
        reader = AssistantAgent("reader", client, tools=[read_note], reflect_on_tool_use=True)
        result = await reader.run(task=f"Which colour is in {note}?")
        assert "The note says teal" in result.messages[-1].to_text(), result
    team = RoundRobinGroupChat(
        [AssistantAgent("ann", client), AssistantAgent("bob", client)],
        termination_condition=MaxMessageTermination(4),
    )
    talk = await team.run(task="Say hello to each other.")
    assert [message.source for message in talk.messages] == ["user", "ann", "bob", "ann"], talk
    await client.close()


def main(base_url: str, model_name: str) -> None:
    asyncio.run(check(base_url, model_name))
    checked = ["an agent with a tool", "a group chat"]
    print(json.dumps({"client": "autogen", "version": version("autogen-agentchat"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
