"""instructor's TOOLS mode: the answer is the call of a named function."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def main(base_url: str, model_name: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    checked = []
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
        people = instructor.from_openai(client, mode=mode)
        person = people.chat.completions.create(
            model=model_name,
            response_model=Person,
            messages=[{"role": "user", "content": "Ann is 31 years old."}],
            max_tokens=60,
            temperature=0,
            max_retries=0,
        )
        assert isinstance(person, Person), person
        checked.append(mode.name)
    people = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    *_, last = people.chat.completions.create_partial(
        model=model_name,
        response_model=Person,
        messages=[{"role": "user", "content": "Bob is 7 years old."}],
        max_tokens=60,
        temperature=0,
    )
    assert isinstance(last.age, int), last
    print(
        json.dumps(
            {
                "client": "instructor",
                "version": version("instructor"),
                "checked": [*checked, "TOOLS streamed"],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
