"""The keywords of a call: typed for editors, checked at run time."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from tercet.engine.request import Sampling
from tercet.errors import UserError
from tercet.prompt.llm import LLM
from tercet.prompt.settings import SamplingFields, call_settings


def test_the_typed_keywords_are_the_fields_of_sampling() -> None:
    typed = typing.get_type_hints(SamplingFields)
    fields = typing.get_type_hints(Sampling)
    assert list(typed) == [field.name for field in dataclasses.fields(Sampling)]
    # Sampling stores `stop` as a tuple; a call also takes one string or any sequence of them.
    assert typed.pop("stop") == str | Sequence[str]
    fields.pop("stop")
    assert typed == fields


@pytest.mark.parametrize("call", [LLM.generate, LLM.chat, LLM.stream, LLM.batch, LLM.explain])
def test_every_call_takes_the_typed_keywords(call: Callable[..., Any]) -> None:
    keywords = inspect.signature(call).parameters["fields"]
    assert keywords.kind is inspect.Parameter.VAR_KEYWORD
    assert keywords.annotation == "Unpack[SamplingFields]"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"max_token": 3},
            r"no sampling setting 'max_token'; did you mean max_tokens\? \(settings: max_tokens, ",
        ),
        ({"shema": {}}, r"no sampling setting 'shema'; did you mean schema\?"),
        ({"zzz": 1}, r"no sampling setting 'zzz' \(settings: "),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest(fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call_settings(None, fields)


def test_keywords_win_over_a_sampling_object_and_only_set_fields_are_sent() -> None:
    settings = call_settings(Sampling(top_k=3, temperature=0), {"top_k": 0, "seed": None})
    assert settings.sampling == Sampling(temperature=0)
    assert settings.sent == {"max_tokens": 256, "temperature": 0, "top_k": 0}
    assert call_settings(None, {}).sent == {}
