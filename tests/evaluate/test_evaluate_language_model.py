"""`LLM` has the calls that an evaluation makes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from tiny_model import write_model

from tercet.evaluate.answer import Answerer
from tercet.evaluate.language_model import LanguageModel
from tercet.evaluate.task import Task
from tercet.prompt.llm import LLM


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(str(write_model(tmp_path_factory.mktemp("model"), chat=True)))


def test_an_llm_is_a_language_model(llm: LLM) -> None:
    model: LanguageModel = llm  # checked by mypy
    assert isinstance(model, LanguageModel)


def test_a_hosted_llm_is_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model: LanguageModel = LLM("openai:gpt")
    assert isinstance(model, LanguageModel) and model.directory is None


@pytest.mark.parametrize(
    ("name", "positional", "keywords"),
    [
        ("count_tokens", ["a prompt"], {}),
        ("batch", [["a prompt"]], {"max_tokens": 3, "temperature": 0.0, "stop": ("\n",)}),
        ("choose", [["a prompt"], [["yes", "no"]]], {"end": True}),
        ("best_choice", [["a prompt"], [["yes", "no"]]], {"offsets": [0.5, 0.0], "end": True}),
    ],
)
def test_every_call_fits_both_signatures(
    name: str, positional: list[object], keywords: dict[str, object]
) -> None:
    for kind in (LanguageModel, LLM):
        inspect.signature(getattr(kind, name)).bind(object(), *positional, **keywords)


def test_the_protocol_is_all_that_answering_needs(llm: LLM) -> None:
    """A class with the protocol's names only, each passed on to an LLM, answers both kinds of task."""

    class Forwarding:
        def __getattr__(self, name: str) -> object:
            assert hasattr(LanguageModel, name), f"{name} is not in the protocol"
            return getattr(llm, name)

    rows = [{"text": f"{word} {n}", "label": word} for n in range(20) for word in ("ham", "spam")]
    closed = Task.from_rows("closed", rows, prompt="{text}:", target="label", labels="auto")
    open_task = Task.from_rows("open", rows, prompt="{text}:", target="label", max_tokens=2)
    for task in (closed, open_task):
        forwarding = Answerer(Forwarding(), task)  # type: ignore[arg-type]
        assert forwarding.answer(task.test) == Answerer(llm, task).answer(task.test)
        assert forwarding.size_bytes() == sum(
            file.stat().st_size for file in Path(llm.directory or "").iterdir()
        )


def test_a_class_without_the_calls_is_no_language_model() -> None:
    class Incomplete:
        name = "incomplete"

    assert not isinstance(Incomplete(), LanguageModel)


def test_a_space_that_ends_a_prompt_belongs_to_the_answer_unless_the_model_was_tuned_on_it(
    tmp_path: Path,
) -> None:
    llm = LLM(str(write_model(tmp_path / "model", chat=False)))
    calls: list[tuple[list[str], list[list[str]]]] = []

    class Recording:
        def __getattr__(self, name: str) -> object:
            return getattr(llm, name)

        def best_choice(
            self, prompts: list[str], choices: list[list[str]], offsets: object = None, end: bool = False
        ) -> list[int]:
            calls.append((list(prompts), choices))
            return llm.best_choice(prompts, choices, end=end)

    rows = [{"text": f"{word} {n}", "label": word} for n in range(20) for word in ("ham", "eggs")]
    for ending, stem in ((": ", ":"), (":", ":"), (":\n", ":\n")):
        task = Task.from_rows("closed", rows, prompt="{text}" + ending, target="label", labels="auto")
        text = str(task.test[0].fields["text"])
        for tuned, prompt in ((False, text + stem), (True, text + ending)):
            Answerer(Recording(), task, tuned=tuned).answer(task.test[:1])  # type: ignore[arg-type]
            prompts, [choices] = calls.pop()
            # An untuned model is told the labels first.
            assert [prompts[0].split("\n\n")[-1]] == [prompt]
            space = "" if ending == ":\n" or prompt.endswith(" ") else " "
            assert [choice.rstrip("\n") for choice in choices] == [
                space + label for label in task.labels or ()
            ]
