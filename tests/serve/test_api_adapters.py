"""Adapters served beside their base: chosen by the model's name, in turn and concurrently."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from lora import make_adapter
from running_server import Running, serve_models
from tiny_model import TEMPLATE

from tercet.errors import UserError
from tercet.prompt.llm import LLM
from tercet.serve.launch import LoadOptions, load_models

EXACT = LoadOptions(quantize="none")
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def adapters(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write two adapters; one has its own chat template."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in (("kind", 3), ("loud", 4)):
        make_adapter(tiny_directory, root / name, seed)
        config = root / name / "adapter_config.json"
        fields = json.loads(config.read_text()) | {"base_model_name_or_path": str(tiny_directory)}
        config.write_text(json.dumps(fields))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_directory / file, root / "loud" / file)
    (root / "loud" / "chat_template.jinja").write_text(
        TEMPLATE.replace("<|user|>", "").replace("{{ bos_token }}", "{{ bos_token }}!")
    )
    return {name: root / name for name in ("kind", "loud")}


@pytest.fixture(scope="module")
def served(tiny_directory: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    models = load_models(
        [f"base={tiny_directory}"], [f"{name}={path}" for name, path in adapters.items()], EXACT
    )
    with serve_models(models) as running:
        yield running


def text(client: openai.OpenAI, model: str) -> str:
    return (
        client.completions.create(model=model, prompt="the cat", temperature=0, max_tokens=12).choices[0].text
    )


def test_every_adapter_is_a_model_and_answers_as_merged_into_its_base(
    served: Running, adapters: dict[str, Path], tiny_directory: Path
) -> None:
    client = served.client()
    assert [model.id for model in client.models.list().data] == ["base", "kind", "loud"]
    texts = {name: text(client, name) for name in ("base", "kind", "loud")}
    assert len(set(texts.values())) == 3
    for name, directory in {"base": tiny_directory, **adapters}.items():
        merged = LLM(str(directory), quantize="none", threads=1)
        assert texts[name] == merged.generate("the cat", temperature=0, max_tokens=12).text


def test_requests_for_different_adapters_run_together_without_touching_each_other(served: Running) -> None:
    client = served.client()
    alone = {name: text(client, name) for name in ("base", "kind", "loud")}
    answers: list[tuple[str, str]] = []
    threads = [
        threading.Thread(target=lambda name=name: answers.append((name, text(client, name))))
        for name in list(alone) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12 and all(alone[name] == answer for name, answer in answers)


def test_log_probabilities_and_embeddings_are_the_adapters_own(
    served: Running, adapters: dict[str, Path]
) -> None:
    client = served.client()
    merged = LLM(str(adapters["kind"]), quantize="none", threads=1)
    there = LLM(f"{served.url}/v1#kind")
    assert there.score("the cat", " sat").logprob == pytest.approx(
        merged.score("the cat", " sat").logprob, abs=1e-3
    )
    vectors = [
        client.embeddings.create(model=name, input="a b").data[0].embedding for name in ("base", "kind")
    ]
    assert vectors[0] != vectors[1]


def test_an_adapters_own_chat_template_is_used(served: Running) -> None:
    with served.http() as http:
        counts = {
            name: http.post("/tokenize", json={"model": name, "messages": HI}).json()["count"]
            for name in ("base", "kind", "loud")
        }
    assert counts["kind"] == counts["base"] != counts["loud"]
    assert served.client().chat.completions.create(model="loud", messages=HI, max_tokens=2).model == "loud"


def test_the_metrics_tell_the_adapters_apart(served: Running) -> None:
    text(served.client(), "kind")
    assert 'tercet_completion_tokens_total{model="kind"}' in served.http().get("/metrics").text


@pytest.mark.parametrize(
    ("references", "more", "message"),
    [
        (["a={base}", "a={base}"], [], "two models are called a"),
        (["a={base}"], ["a={kind}"], "two models are called a"),
        (["{base}"], ["{kind}"], "has no name"),
        (["{base}"], ["x={base}"], "is not an adapter directory"),
        (["http://127.0.0.1:1/v1#m"], ["x={kind}"], "is for local models"),
        ([], [], "no model to serve"),
    ],
)
def test_models_that_cannot_be_served_give_a_one_line_error(
    references: list[str],
    more: list[str],
    message: str,
    adapters: dict[str, Path],
    tiny_directory: Path,
) -> None:
    names = {"base": str(tiny_directory), "kind": str(adapters["kind"])}
    with pytest.raises(UserError, match=message):
        load_models(
            [reference.format(**names) for reference in references],
            [reference.format(**names) for reference in more],
            EXACT,
        )


def test_an_adapter_finds_its_base_among_several(
    adapters: dict[str, Path], tiny_directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_directory, other)
    models = load_models([f"o={other}", f"b={tiny_directory}"], [f"kind={adapters['kind']}"], EXACT)
    assert models.get("kind").local is models.get("b").local is not models.get("o").local
    models.close()
    config = json.loads((adapters["kind"] / "adapter_config.json").read_text())
    strange = tmp_path / "strange"
    shutil.copytree(adapters["kind"], strange)
    config["base_model_name_or_path"] = "org/elsewhere"
    (strange / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="an adapter of org/elsewhere, which is not among"):
        load_models([f"o={other}", f"b={tiny_directory}"], [f"kind={strange}"], EXACT)
