"""Classes of pydantic as the form of an answer: random outputs under the mask are instances."""

from __future__ import annotations

import datetime
import enum
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, Field, HttpUrl, PositiveFloat, SecretStr, conint, create_model
from test_prompt_output import mask
from tiny_model import write_model

from tercet.prompt.llm import LLM


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    weight: PositiveFloat


class Node(BaseModel):
    value: Annotated[float, Field(ge=-0.5, lt=0.5)]
    children: Annotated[list[Node], Field(max_length=1)] = []


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    llm = LLM(write_model(tmp_path_factory.mktemp("pydantic") / "model", chat=True), device="cpu")
    mask(llm)
    return llm


@pytest.mark.parametrize(
    "form",
    [
        PositiveFloat,
        conint(gt=0, lt=10, multiple_of=3),
        Annotated[int, Field(ge=-(2**63), le=2**63 - 1)],
        Annotated[float, Field(multiple_of=0.25, ge=0, le=10)],
        Annotated[Decimal, Field(gt=0, le=1)] | None,
        Annotated[Decimal, Field(ge=0, lt=100, decimal_places=2)],
        set[Color],
        set[Literal["a", "b", "c"]],
        dict[Literal["a", "b"], int],
        dict[Annotated[str, Field(pattern="^[a-z]$")], PositiveFloat],
        Annotated[dict[uuid.UUID, bool], Field(max_length=1)],
        Optional[Annotated[int, Field(ge=0)]],  # noqa: UP045  # the older way to write it
        Literal["x", 3],
        Color,
        datetime.date,
        uuid.UUID,
        Annotated[SecretStr, Field(max_length=4)],
        Annotated[Cat | Dog, Field(discriminator="kind")],
        Node,
        tuple[Annotated[int, Field(ge=0, le=5)], Color],
    ],
)
def test_an_answer_is_an_instance(llm: LLM, form: Any) -> None:
    model = create_model("Answer", field=(form, ...))
    for seed in range(3):
        answer = llm.generate("a", schema=model, seed=seed, max_tokens=600)
        assert isinstance(answer.parsed, model)
        assert answer.finish_reason == "stop"


def test_other_classes_are_not_refused(llm: LLM) -> None:
    model = create_model("Other", a=(frozenset[str], ...), b=(HttpUrl, ...), c=(bytes, ...), d=(Path, ...))
    from tercet.prompt.output import requested_output

    output = requested_output(schema=model)
    assert output is not None
    output.grammar.check()
