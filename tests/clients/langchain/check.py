"""LangChain's bind_tools: any tool, a named one and a free choice, whole and streamed, and results sent back."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"Rain in {city}."


@tool
def add(first: int, second: int) -> int:
    """Add two whole numbers."""
    return first + second


class Animal(BaseModel):
    """An animal."""

    kind: str


def main(base_url: str, model_name: str) -> None:
    model = ChatOpenAI(
        base_url=f"{base_url}/v1",
        api_key="none",
        model=model_name,
        max_tokens=50,
        temperature=0,
        max_retries=0,
    )
    question = HumanMessage("What is the weather in Oslo?")
    for choice in ("any", "required", "weather"):
        answer = model.bind_tools([weather, add], tool_choice=choice).invoke([question])
        assert answer.tool_calls and not answer.invalid_tool_calls, answer
    assert [call["name"] for call in answer.tool_calls] == ["weather"], answer
    chunks = list(model.bind_tools([weather], tool_choice="any").stream([question]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls and len(chunks) > 2, whole
    results = [
        ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls
    ]
    free = model.bind_tools([weather, add])
    assert isinstance(free.invoke([question]), AIMessage)
    last = free.invoke([question, answer, *results])
    assert last.content or last.tool_calls, last
    animal = model.with_structured_output(Animal, method="function_calling").invoke("A dog.")
    assert isinstance(animal, Animal), animal
    checked = ["any", "required", "a named tool", "streamed", "auto", "results", "with_structured_output"]
    print(json.dumps({"client": "langchain", "version": version("langchain-openai"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
