"""Task files: reading them, turning rows into examples, and one line for each mistake."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tercet.errors import UserError
from tercet.evaluate.split import normalise, position
from tercet.evaluate.task import Task

WORDS = [
    "able",
    "baker",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
]


def rows(n: int = 200) -> list[dict[str, Any]]:
    draw = random.Random(n)
    return [
        {"text": " ".join(draw.choices(WORDS, k=6)) + f" {i}", "label": "ham" if i % 3 else "spam"}
        for i in range(n)
    ]


YAML = """\
name: mail
data: {data}
prompt: "Message: {{text}}\\nLabel:"
target: label
labels: [ham, spam]
metric: accuracy
"""


def write(tmp_path: Path, yaml: str | None = None, data: list[dict[str, Any]] | None = None) -> Path:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (data if data is not None else rows()))
    )
    path = tmp_path / "task.yaml"
    path.write_text(YAML.format(data="train.jsonl") if yaml is None else yaml)
    return path


def make(data: list[dict[str, Any]] | None = None, **options: Any) -> Task:
    settings: dict[str, Any] = {"prompt": "{text}", "target": "label", "labels": ["ham", "spam"]}
    return Task.from_rows("mail", rows() if data is None else data, **(settings | options))


def test_a_task_file_is_a_task(tmp_path: Path) -> None:
    task = Task.load(write(tmp_path))
    assert (task.name, task.labels, task.metric.name, task.few_shot) == (
        "mail",
        ["ham", "spam"],
        "accuracy",
        8,
    )
    assert task.corpus == ["builtin:python-docs"]
    assert len(task.train) + len(task.dev) + len(task.test) == 200
    example = task.test[0]
    assert task.render(example.fields) == f"Message: {example.fields['text']}\nLabel:"
    assert task.input_text(example.fields) == example.fields["text"]
    assert example.target == example.fields["label"] and example.split == "test"


def test_the_file_and_the_rows_make_the_same_task(tmp_path: Path) -> None:
    loaded = Task.load(write(tmp_path))
    assert loaded.examples == make(prompt="Message: {text}\nLabel:").examples
    assert loaded.fingerprint == make(prompt="Message: {text}\nLabel:").fingerprint


def test_the_split_survives_reordering_more_rows_and_another_prompt() -> None:
    before = {example.id: example.split for example in make().examples}
    shuffled = rows()
    random.Random(1).shuffle(shuffled)
    assert make(shuffled).examples == make().examples
    after = make(
        shuffled + [{"text": f"new {i}", "label": "ham"} for i in range(50)], prompt="Is it spam? {text}"
    )
    assert before.items() <= {example.id: example.split for example in after.examples}.items()


def test_no_input_is_in_two_splits() -> None:
    doubled = [*rows(), *({**row, "text": row["text"].upper() + "!!"} for row in rows())]
    task = make(doubled)
    texts = {
        split: {normalise(e.fields["text"]) for e in getattr(task, split)}
        for split in ("train", "dev", "test")
    }
    assert not (
        texts["train"] & texts["test"] or texts["dev"] & texts["test"] or texts["train"] & texts["dev"]
    )
    assert len(task.examples) == 200 and task.counts["merged"] == 200
    assert task.notes == [
        "200 of 400 rows repeat another row (case, spaces and punctuation aside) and were merged with it."
    ]


def test_the_most_frequent_of_conflicting_targets_is_used_and_ties_are_dropped() -> None:
    extra = [
        {"text": "Two to one", "label": "ham"}, {"text": "two to one!", "label": "spam"},
        {"text": "TWO TO ONE", "label": "ham"},
        {"text": "one each", "label": "ham"}, {"text": "One each.", "label": "spam"},
    ]  # fmt: skip
    task = make(rows() + extra)
    targets = {normalise(example.fields["text"]): example.target for example in task.examples}
    assert targets["two to one"] == "ham" and "one each" not in targets
    assert (task.counts["conflicts"], task.counts["ties"]) == (1, 1)
    assert len(task.notes) == 3


def test_rows_of_a_test_file_are_dropped_from_train() -> None:
    data = rows()
    task = make(data, test_rows=[{**row, "text": row["text"].title()} for row in data[:40]])
    assert len(task.test) == 40
    assert len(task.train) + len(task.dev) == 160 and task.counts["in test"] == 40
    assert "40 train or dev rows are also in the test file" in task.notes[0]


def test_a_dev_file_is_the_dev_split() -> None:
    data = rows()
    task = make(data[:150], dev_rows=data[140:170], test_rows=data[165:])
    assert (len(task.dev), len(task.test), len(task.train)) == (25, 35, 140)
    assert (task.counts["in test"], task.counts["in dev"]) == (5, 10)


def test_an_object_as_target_is_json_with_sorted_keys() -> None:
    data = [{"text": row["text"], "slots": {"to": "Rome", "from": ["Bern", 1]}} for row in rows()]
    expected = '{"from": ["Bern", 1], "to": "Rome"}'
    assert make(data, target="slots", labels=None).test[0].target == expected
    assert make(data, target='{{"slots": {slots}}}', labels=None).test[0].target == f'{{"slots": {expected}}}'
    assert make(data, target="slots", labels=None).metric.name == "exact_match"


def test_auto_labels_are_those_of_train_sorted() -> None:
    assert make(labels="auto").labels == ["ham", "spam"]
    only_in_test = make().test[0].fields["text"]
    data = [{**row, "label": "eggs"} if row["text"] == only_in_test else row for row in rows()]
    with pytest.raises(
        UserError, match=r"the target 'eggs' is not a target of a training example \(ham, spam\)"
    ):
        make(data, labels="auto")


def test_enough_tokens_for_every_target() -> None:
    assert make().max_tokens == 16
    data = [{"text": row["text"], "label": "é" * 100} for row in rows()]
    assert make(data, labels=None).max_tokens == 251  # 200 bytes and a quarter, and the stop token
    assert make(max_tokens=5).max_tokens == 5


def test_the_fingerprint_changes_with_the_definition_and_the_examples() -> None:
    data = rows()
    prints = {
        make().fingerprint, make(prompt="? {text}").fingerprint, make(metric="f1").fingerprint, make(few_shot=4).fingerprint,
        make(test_size=10).fingerprint, make(data[1:]).fingerprint, make(system="Be brief.").fingerprint,
        make(metric={"name": "regex", "pattern": "a|h"}).fingerprint,
        make(metric={"name": "regex", "pattern": "s|h"}).fingerprint,
    }  # fmt: skip
    assert len(prints) == 9 and make().fingerprint in prints


def test_paths_are_relative_to_the_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path,
        YAML.format(data="{train: [train.jsonl], test: more/test.csv}")
        + "corpus: [builtin:python-docs, more]\n",
    )
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "test.csv").write_text("label,text\nham,never seen\nspam,win\n")
    monkeypatch.chdir("/")
    task = Task.load(path)
    assert len(task.test) == 2
    assert task.corpus == ["builtin:python-docs", str(tmp_path / "more")]
    assert task.reference == str(path)


def test_a_file_without_header_or_suffix(tmp_path: Path) -> None:
    lines = "".join(f"{row['label']}\t{row['text']}\r\n" for row in rows())
    (tmp_path / "Collection").write_bytes(lines.encode())
    path = write(tmp_path, YAML.format(data="{path: Collection, format: tsv, columns: [label, text]}"))
    assert Task.load(path).examples == make().examples


def broken(old: str, new: str) -> str:
    yaml = YAML.format(data="train.jsonl")
    assert old in yaml
    return yaml.replace(old, new)


MISTAKES = [
    (broken("prompt:", "promt:"), r"task\.yaml:3: unknown field 'promt'; did you mean 'prompt'\?"),
    (broken("metric: accuracy", "zzz: 1"), r"task\.yaml:6: unknown field 'zzz'; the fields are name, "),
    (broken("metric: accuracy", "7: 1"), "unknown field 7"),
    (broken("train.jsonl", "trian.jsonl"), r"task\.yaml:2: there is no file .*trian\.jsonl; did you mean train\.jsonl\?"),
    (broken("train.jsonl", "org/mails"), "If org/mails is a data set on the Hub, download it"),
    (broken("train.jsonl", "."), "is a directory; list the files in it"),
    (broken("train.jsonl", "{test: train.jsonl}"), "data has no train"),
    (broken("train.jsonl", "{train: train.jsonl, tset: x}"), "data has no field 'tset'; did you mean 'test'"),
    (broken("train.jsonl", "{train: train.jsonl, path: x}"), "both path and train"),
    (broken("train.jsonl", "{train: [], test: x}"), "data.train is an empty list"),
    (broken("train.jsonl", "{train: 5}"), "data.train must be a path or a list of paths"),
    (broken("train.jsonl", "{train: train.jsonl, columns: text}"), "data.columns must be a list of names"),
    (broken("train.jsonl", "{train: train.jsonl, quoting: maybe}"), "data.quoting must be true or false"),
    (broken("train.jsonl", "{train: train.jsonl, test: empty.jsonl}"),
     "task.yaml:2: test is empty: .*empty.jsonl holds no rows"),
    (broken("{text}", "{txt}"), r"task\.yaml:3: prompt uses the field 'txt', which .*train\.jsonl does not have; "
     "the fields there are text, label"),
    (broken("{text}", "{text"), "line 1, column 10"),
    (broken("{text}", "text"), "every example would have the same input"),
    (broken("target: label", "target: lable"), r"task\.yaml:4: target uses the field 'lable'"),
    (broken("[ham, spam]", "[ham, spam, eggs]"), r"task\.yaml:5: no row has the label 'eggs'; the targets are ham, spam"),
    (broken("[ham, spam]", "[ham, eggs]"), r"train\.jsonl, row 1: the target 'spam' is not among the labels \(ham, eggs\)"),
    (broken("[ham, spam]", "[ham]"), r"task\.yaml:5: a closed task needs at least 2 labels, and there is only 'ham'"),
    (broken("[ham, spam]", "[]"), "at least 2 labels, and there is none"),
    (broken("[ham, spam]", "[ham, ham]"), "the label 'ham' is repeated"),
    (broken("[ham, spam]", "[yes, no]"), "YAML reads a label as true; put it in quotes"),
    (broken("[ham, spam]", "ham"), "labels must be a list, or auto"),
    (broken("[ham, spam]", "[[ham], spam]"), "each label must be text, not a list"),
    (broken("accuracy", "acuracy"), r"task\.yaml:6: metric 'acuracy' is unknown; did you mean accuracy"),
    (broken("accuracy", "judge"), r"task\.yaml:6: metric: judge is not implemented yet"),
    (broken("accuracy", "3"),
     r"task\.yaml:6: metric must be a name, or a mapping with a name and its options, not a whole number"),
    (broken("name: mail", "name: [mail]"), r"task\.yaml:1: name must be text, not a list"),
    (broken("name: mail", "name:"), r"task\.yaml:1: name must be text, not empty"),
    (broken("metric: accuracy", "name: other"), r"task\.yaml:6: 'name' is repeated; it first occurs in line 1"),
    (broken("train.jsonl", "{path: train.jsonl, path: b}"), r"task\.yaml:2: 'path' is repeated"),
    (broken("target: label\n", ""), "the field 'target' is missing; a task needs data, prompt, target"),
    (broken("metric: accuracy", "few_shot: 0"), r"task\.yaml:6: few_shot is 0"),
    (broken("metric: accuracy", "few_shot: many"), "few_shot must be a whole number, not text"),
    (broken("metric: accuracy", "few_shot: true"), "few_shot must be a whole number, not true"),
    (broken("metric: accuracy", "max_tokens: -1"), "max_tokens is -1"),
    (broken("metric: accuracy", "test_size: 1.5"), r"task\.yaml:6: test_size is 1\.5; it must be a share"),
    (broken("metric: accuracy", "test_size: 500"), "the train split is empty"),
    (broken("metric: accuracy", "corpus: []"), r"task\.yaml:6: corpus must be"),
    (broken("train.jsonl", "{train: train.jsonl, dev: train.jsonl}\ndev_size: 5"), "dev_size has no effect on a dev file"),
    (broken('"Message: {text}\\nLabel:"', "{text} is it spam?"), r"task\.yaml:3:\d+ is not valid YAML: .*in quotes"),
    ("- a\n- b\n", r"task\.yaml:1: a task file is a mapping"),
    ("", "task.yaml is empty"),
    ("a: [1\n", r"task\.yaml:\d:\d is not valid YAML"),
    ("a: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("yaml", "message"), MISTAKES)
def test_a_mistake_in_the_task_file_is_reported_in_one_line(tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=message) as caught:
        Task.load(write(tmp_path, yaml))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, r"train\.jsonl, row 3: the field 'label' is empty"),
        ({"text": " "}, r"train\.jsonl, row 3: the input is empty"),
        ({"label": ""}, r"row 3: the target is empty"),
        ({"label": "eggs"}, r"train\.jsonl, row 3: the target 'eggs' is not among the labels"),
    ],
)
def test_a_mistake_in_a_row_names_the_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = rows()
    data[2] = data[2] | change
    with pytest.raises(UserError, match=message):
        Task.load(write(tmp_path, data=data))


def test_the_message_about_a_missing_field_names_the_fields_of_the_row(tmp_path: Path) -> None:
    data = rows()
    data[4] = {"body": "x", "label": "ham"}
    with pytest.raises(UserError, match=r"row 5: the field 'text' is missing; the row has body, label"):
        Task.load(write(tmp_path, data=data))


def test_a_row_of_the_second_file_is_named_by_that_file(tmp_path: Path) -> None:
    path = write(tmp_path, YAML.format(data="[train.jsonl, second.jsonl]"))
    (tmp_path / "second.jsonl").write_text('{"text": "a", "label": "ham"}\n{"text": "b", "label": "x"}\n')
    with pytest.raises(UserError, match=r"second\.jsonl, row 2: the target 'x'"):
        Task.load(path)


def test_the_message_about_too_few_rows_says_what_to_do(tmp_path: Path) -> None:
    few = [row for row in rows() if position(row["text"]) > 0.3][:3]
    with pytest.raises(
        UserError, match=r"the test split is empty, because none of 3 examples .* 15%; .*set test_size"
    ):
        make(few)
    small = make(rows(12), test_size=4, dev_size=3)
    assert (len(small.test), len(small.dev), len(small.train)) == (4, 3, 5)


def test_a_missing_task_file(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"there is no task file .*tsak\.yaml; did you mean task\.yaml"):
        Task.load(tmp_path / "tsak.yaml")
    with pytest.raises(UserError, match="builtin:docs-routing"):
        Task.load("builtin:nothing")
    with pytest.raises(UserError, match="is a directory"):
        Task.load(tmp_path)
