"""``tercet explain`` against transformers' own probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_openai_server import FakeServer, completion
from tiny_model import write_model

from tercet.cli.main import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, chat=name == "chat") for name in ("base", "chat")}


def explained(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["explain", *map(str, arguments), "--quantize", "none", "--json"]) == 0
    explanation: dict[str, Any] = json.loads(capsys.readouterr().out)
    return explanation


def test_every_token_has_the_probability_that_transformers_gives_it(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    explanation = explained(capsys, models["base"], "It's so", "--max-tokens", 3, "--top", 4)
    ids = [step["id"] for step in explanation["read"] + explanation["written"]]
    assert [step["token"] for step in explanation["read"]] == ["<s>", "I", "t", "'", "s", " ", "s", "o"]
    model = transformers.AutoModelForCausalLM.from_pretrained(models["base"])
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].softmax(-1)
    first, *rest = explanation["read"] + explanation["written"]
    assert (first["probability"], first["surprise"], first["alternatives"]) == (None, None, [])
    for place, step in enumerate(rest):
        assert step["probability"] == pytest.approx(float(right[place, step["id"]]), rel=1e-3)
        assert step["surprise"] == pytest.approx(-math.log2(step["probability"]), rel=1e-6)
        entropy = torch.distributions.Categorical(probs=right[place]).entropy() / math.log(2)
        assert step["entropy"] == pytest.approx(float(entropy), rel=1e-3)
        best = right[place].topk(4)
        assert [alternative["id"] for alternative in step["alternatives"]] == best.indices.tolist()
    # Greedy: each generated token is the likeliest.
    assert all(step["id"] == step["alternatives"][0]["id"] for step in explanation["written"])


def test_a_conversation_is_shown_as_the_model_sees_it(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    explanation = explained(capsys, models["chat"], "hi", "--system", "S", "--max-tokens", 1)
    seen = "".join(step["token"] for step in explanation["read"])
    assert seen == "<s><|system|>S<|end|><|user|>hi<|end|><|assistant|>"
    raw = explained(capsys, models["chat"], "hi", "--raw", "--max-tokens", 1)
    assert "".join(step["token"] for step in raw["read"]) == "<s>hi"


def test_the_terminal_shows_tokens_alternatives_and_the_next(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(models["base"]), "a b", "--max-tokens", "2", "--top", "3"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "Prompt",
        '" "',
        "bits",
        "Candidates for the next token",
        "█",
        "Answer",
        "mean surprise",
    ):
        assert part in shown


def test_a_server_tells_of_what_it_wrote(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"token": "Yes", "logprob": math.log(0.5), "bytes": [89, 101, 115]}
    other = {"token": "No", "logprob": math.log(0.25), "bytes": [78, 111]}
    logprobs = {"content": [{**entry, "top_logprobs": [entry, other]}]}
    server.script.append(completion("Yes", logprobs=logprobs))
    assert main(["explain", server.reference, "Is it?", "--json"]) == 0
    explanation = json.loads(capsys.readouterr().out)
    assert explanation["read"] == []
    [step] = explanation["written"]
    assert (step["token"], step["surprise"]) == ("Yes", pytest.approx(1.0))
    assert [alternative["probability"] for alternative in step["alternatives"]] == pytest.approx([0.5, 0.25])
    assert server.bodies()[0]["top_logprobs"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "--top is 0; it must be from 1 to 20"),
        (["--max-tokens", "0"], "is 0; it must be at least 1"),
        (["--system", "S"], "--system needs a chat template"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    models: dict[str, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(models["base"]), "a", *arguments]) == 2
    assert message in capsys.readouterr().err
