from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.data.template import Template
from tercet.errors import UserError


def test_fields_are_replaced_and_doubled_braces_are_braces() -> None:
    template = Template('{{"city": "{city}"}} {n}{n}')
    assert template.fields == ["city", "n"]
    assert template.render({"city": "Oslo", "n": 3, "other": 1}) == '{"city": "Oslo"} 33'


def test_values_that_are_not_strings_are_written_as_json() -> None:
    rendered = Template("{a} {b} {c} {d}").render({"a": {"x": [1, "é"]}, "b": None, "c": True, "d": 1.5})
    assert rendered == '{"x": [1, "é"]} null true 1.5'


def test_braces_in_values_are_not_fields() -> None:
    assert Template("{a}").render({"a": "{b} {{", "b": "no"}) == "{b} {{"


@given(st.text())
def test_any_text_with_doubled_braces_renders_as_itself(text: str) -> None:
    assert Template(text.replace("{", "{{").replace("}", "}}")).render({}) == text


@given(st.text())
def test_any_value_is_inserted_unchanged(value: str) -> None:
    assert Template("<{x}>").render({"x": value}) == f"<{value}>"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a { b", "line 1, column 3"),
        ("a\nbc } d", "line 2, column 4"),
        ("{}", "line 1, column 1"),
        ("{a b}", "{a b} is not a field"),
        ("{x!r}", "{x!r} is not a field"),
        ("{x[0]}", "{x[0]} is not a field"),
        ("{__class__.}}", "column 13"),
    ],
)
def test_an_unpaired_brace_is_refused_with_its_position(text: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        Template(text)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unused_fields_are_reported_in_one_line() -> None:
    template = Template("{question} {context}", where="ask.txt")
    with pytest.raises(UserError) as caught:
        template.render({"questoin": "?", "context": "-"}, all_used=True)
    message = str(caught.value)
    assert message.startswith("ask.txt: no value for {question} (did you mean {questoin}?)")
    assert "nothing uses {questoin}" in message
    assert "\n" not in message


def test_unused_values_are_accepted_unless_all_must_be_used() -> None:
    assert Template("{a}").render({"a": "1", "b": "2"}) == "1"
    with pytest.raises(UserError, match=r"nothing uses \{b\}"):
        Template("{a}").render({"a": "1", "b": "2"}, all_used=True)


def test_a_template_file_loses_only_its_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "ask.txt"
    path.write_text("Q: {q}\nA:\n\n", encoding="utf-8")
    assert Template.load(path).render({"q": "why?"}) == "Q: why?\nA:\n"
    with pytest.raises(UserError, match=r"gone\.txt"):
        Template.load(tmp_path / "gone.txt")
