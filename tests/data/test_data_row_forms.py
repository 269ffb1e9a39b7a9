"""Rows of every common form are read alike; what changes learning is honoured or refused, and the rest is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tercet.data.row_forms import is_conversation, read_row
from tercet.errors import UserError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


TURNS = [user("2 + 2?"), assistant("4"), user("And 3 + 3?"), assistant("6")]

# One conversation as data sets and other trainers write it.
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages as JSON text": {"messages": json.dumps(TURNS)},
    "messages beside null columns": {"messages": TURNS, "text": None, "prompt": None, "tools": None, "images": []},
    "prompt and completion": {"prompt": [], "completion": TURNS},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"},
            {"from": "human", "value": "And 3 + 3?"}, {"from": "gpt", "value": "6"},
        ]
    },
    "ShareGPT with OpenAI's fields": {"conversations": TURNS},
    "Alpaca with a history": {
        "instruction": "And 3 + 3?", "input": "", "output": "6", "history": [["2 + 2?", "4"]]
    },
    "NeMo": {
        "mask": "User", "system": "", "conversations": [
            {"from": "User", "value": "2 + 2?"}, {"from": "Assistant", "value": "4"},
            {"from": "User", "value": "And 3 + 3?"}, {"from": "Assistant", "value": "6"},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_is_read_as_the_same_messages(form: str) -> None:
    row = read_row(FORMS[form])
    assert row.messages == TURNS
    assert row.supervised == {1, 3}
    assert (row.dropped, row.unused, row.tools, row.variables) == (None, (), None, {})
    assert is_conversation(FORMS[form])


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_an_answer_may_say_that_it_is_context_only(name: str, off: Any, on: Any, form: str) -> None:
    turns = [user("a"), assistant("b", **{name: off}), {**user("c"), name: off}, assistant("d", **{name: on})]
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        turns = [
            {"from": names[turn.pop("role")], "value": turn.pop("content"), **turn}
            for turn in map(dict, turns)
        ]
    row = read_row({form: turns})
    assert row.supervised == {3} and row.context == 1
    assert row.messages == [user("a"), assistant("b"), user("c"), assistant("d")], (
        "no template sees the field"
    )


def test_a_conversation_without_an_answer_to_train_on_is_dropped_with_the_reason() -> None:
    row = read_row({"messages": [user("a"), assistant("b", weight=0)]})
    assert (row.dropped, row.supervised, row.context) == ("no answer to train on (weight 0)", frozenset(), 1)
    assert read_row({"messages": [user("a")]}).dropped == "no assistant message"
    assert read_row({"messages": []}).dropped == "empty conversation"
    assert read_row({"instruction": "a", "output": " "}).dropped == "empty completion"
    assert read_row({"prompt": "a", "completion": "b", "weight": 0}).dropped == "weight 0"
    assert read_row({"prompt": "a", "completion": "b", "weight": 1.0}).dropped is None


def test_only_the_completion_is_trained_on_and_flags_hold_there_too() -> None:
    row = read_row(
        {"prompt": TURNS[:3], "completion": [assistant("6"), user("so?"), assistant("7", weight=0)]}
    )
    assert row.supervised == {3} and row.context == 1


def test_a_system_column_becomes_the_first_message() -> None:
    row = read_row({"system": "Be brief.", "conversations": FORMS["ShareGPT"]["conversations"]})
    assert row.messages == [{"role": "system", "content": "Be brief."}, *TURNS]
    assert row.supervised == {2, 4} and row.unused == ()
    both = {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    assert read_row(both).messages == both["messages"]
    with pytest.raises(UserError, match="two system texts"):
        read_row({**both, "system": "Be long."})


def test_alpaca_joins_instruction_and_input() -> None:
    row = read_row({"instruction": "Translate.", "input": "chat", "output": "cat", "system": "French"})
    assert row.messages == [
        {"role": "system", "content": "French"},
        user("Translate.\nchat"),
        assistant("cat"),
    ]


def test_calls_of_llama_factory_become_tool_calls() -> None:
    call = {"name": "boil", "arguments": {"minutes": 4}}
    row = read_row(
        {
            "conversations": [
                {"from": "human", "value": "An egg, please"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "done"},
                {"from": "gpt", "value": "Here it is."},
            ],
            "tools": '[{"name": "boil"}]',
        }
    )
    assert row.messages is not None and row.supervised == {1, 3}
    assert row.messages[1] == assistant("", tool_calls=[{"type": "function", "function": call}])
    assert row.messages[2] == {"role": "tool", "content": "done"}
    assert row.tools == '[{"name": "boil"}]'
    assert read_row({"messages": TURNS, "functions": [{"name": "f"}]}).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]


def test_plain_rows() -> None:
    row = read_row({"prompt": "a ", "completion": "b", "id": 3})
    assert (row.messages, row.prompt, row.completion, row.unused) == (None, "a ", "b", ("id",))
    row = read_row({"text": "a", "label": 0, "instruction": "x", "output": "y"})
    assert (row.prompt, row.completion, row.unused) == ("", "a", ("label", "instruction", "output"))
    assert not is_conversation({"prompt": "a", "completion": "b"}) and not is_conversation({"text": "a"})


def test_columns_and_fields_that_nothing_reads_are_listed() -> None:
    row = read_row(
        {"messages": [user("a"), assistant("b", reasoning_content="r", mood="glad")], "source": "x", "id": 1}
    )
    assert row.unused == ("source", "id", "messages.reasoning_content", "messages.mood")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, r"messages\[1\]\.weight is 0\.5; it must be 0 or 1"),
        ({"messages": [user("a"), assistant("b", weight="0")]}, r"weight is '0'; it must be 0 or 1"),
        ({"messages": [user("a"), assistant("b", weight=0, train=True)]}, "weight and train, which contradict"),
        ({"messages": [{**user("a"), "train": True}, assistant("b")]}, r"only answers \(role assistant\)"),
        ({"messages": [user("a"), assistant("b", train_detail=[{}])]}, "train_detail chooses parts of a message"),
        ({"messages": [user("a"), assistant("b", loss_scale=0.5)]}, "loss_scale is not read; use weight"),
        ({"messages": [user("a"), assistant("b", masked=True)]}, "masked is not read; use weight"),
        ({"messages": [{**user("a"), "images": ["x.png"]}, assistant("b")]}, "images holds no text"),
        ({"messages": TURNS, "images": ["x.png"]}, "images holds no text; only text is trained on"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen belongs to preference data"),
        ({"messages": TURNS, "rejected_response": "c"}, "rejected_response belongs to preference data"),
        ({"input": {"messages": []}, "preferred_output": TURNS}, "preferred_output belongs to preference data"),
        ({"prompt": "a", "completion": "b", "label": False}, "label is False, which marks a bad answer"),
        ({"messages": TURNS, "kto_tag": False}, "kto_tag is False"),
        ({"input_ids": [1], "labels": [1]}, "input_ids is for tokenized rows"),
        ({"text": "a", "completion_mask": [1]}, "completion_mask is for tokenized rows"),
        ({"messages": TURNS, "assistant_masks": [0, 1]}, "assistant_masks is for tokenized rows"),
        ({"segments": [{"label": True, "text": "a"}]}, "segments is a form without a template"),
        ({"messages": TURNS, "weight": 0.5}, r"weight is 0\.5; a row is trained on or not"),
        ({"messages": TURNS, "sample_weight": 2}, "sample_weight weighs a row"),
        ({"messages": TURNS, "mask": "Assistant"}, "mask is 'Assistant'; only answers are trained on"),
        ({"messages": TURNS, "type": "VALUE_TO_TEXT"}, "asks for attribute labels"),
        ({"messages": TURNS, "chat_template": "{{ 1 }}"}, "chat_template is a template for each row"),
        ({"messages": TURNS, "chat_template_kwargs": "x"}, "chat_template_kwargs is a str"),
        ({"messages": TURNS, "tools": [{}], "functions": [{}]}, "tools and functions are two forms"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools is for conversations"),
        ({"prompt": "a", "completion": "b", "system": "x"}, "system is for conversations"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from is 'narrator'; it must be one of human"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "value is not JSON"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history must be a list of pairs"),
        ({"instruction": "a", "output": 3}, "output is a int"),
        ({"input": "a", "output": "b"}, "it has input, output; rename its columns"),
        ({"prompt": "a", "response": "b"}, "it has prompt, response; rename its columns"),
    ],
)  # fmt: skip
def test_what_changes_learning_and_is_not_honoured_is_refused_in_one_line(
    row: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        read_row(row)
    assert "\n" not in str(caught.value)


def test_a_row_is_not_changed() -> None:
    row = {"system": "s", "messages": [user("a"), assistant("b", weight=0)]}
    before = json.dumps(row)
    read_row(row)
    assert json.dumps(row) == before
