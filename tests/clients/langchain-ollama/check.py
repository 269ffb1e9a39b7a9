"""LangChain's ChatOllama, OllamaLLM and OllamaEmbeddings: answers, streams, tools, structured output, vectors."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"Rain in {city}."


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def main(base_url: str, name: str) -> None:
    settings = {"base_url": base_url, "model": name, "temperature": 0, "num_predict": 40}
    model = ChatOllama(**settings, validate_model_on_init=True)
    answer = model.invoke("What is the capital of Norway?")
    assert answer.content and answer.response_metadata["done_reason"] in ("stop", "length"), answer
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 1, answer
    chunks = [*model.stream("What is the capital of Norway?")]
    assert "".join(str(chunk.content) for chunk in chunks) == answer.content and len(chunks) > 3, chunks

    person = model.with_structured_output(Person).invoke("Ada is 36 years old. Who is it?")
    assert isinstance(person, Person), person
    question = HumanMessage("What is the weather in Oslo?")
    free = model.bind_tools([weather])
    assert isinstance(free.invoke([question]), AIMessage)
    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "c1", "type": "tool_call"}
    result = ToolMessage(weather.invoke({"city": "Oslo"}), tool_call_id="c1")
    last = free.invoke([question, AIMessage("", tool_calls=[call]), result])
    assert last.content or last.tool_calls, last
    thought = ChatOllama(**settings, reasoning=True).invoke("Hi.")
    assert isinstance(thought, AIMessage)

    assert OllamaLLM(**settings).invoke("Say one word.")
    vectors = OllamaEmbeddings(base_url=base_url, model=name).embed_documents(["one", "two"])
    assert len(vectors) == 2 and len(vectors[0]) > 10
    checked = [
        "validate_model_on_init", "invoke", "streamed", "with_structured_output", "bind_tools", "results", "reasoning",
        "OllamaLLM", "OllamaEmbeddings",
    ]  # fmt: skip
    print(
        json.dumps({"client": "langchain-ollama", "version": version("langchain-ollama"), "checked": checked})
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
