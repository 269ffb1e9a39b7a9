"""The publisher's sampling settings in generation_config.json, checked against transformers on the same files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_model import write_model

from tercet.engine.request import Sampling
from tercet.engine.sampling_defaults import chosen_defaults, read_sampling_defaults, with_defaults
from tercet.errors import UserError
from tercet.prompt.llm import LLM

# Each makes sampling deterministic in transformers: greedy, or only the likeliest token remains.
DETERMINISTIC: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "temperature": 0.9, "top_k": 40},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 1, "repetition_penalty": 1.7},
    {"do_sample": True, "temperature": 3.0, "top_p": 1e-6},
    {"do_sample": True, "min_p": 1.0, "repetition_penalty": 0.5},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("published") / "model", chat=True)


def published(plain: Path, directory: Path, content: dict[str, Any]) -> Path:
    """Return a copy of the model with this generation_config.json."""
    directory.mkdir()
    for file in plain.iterdir():
        if file.name != "generation_config.json":
            os.link(file, directory / file.name)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **content}))
    return directory


@pytest.mark.parametrize("content", DETERMINISTIC)
def test_a_call_that_sets_nothing_samples_as_transformers_does(
    content: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    directory = published(plain, tmp_path / "model", content)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("Once upon").input_ids
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=12, pad_token_id=1)
    answer = LLM(directory, device="cpu", quantize="none").generate("Once upon", max_tokens=12)
    assert answer.tokens == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({}, {}),
        ({"temperature": None, "top_k": None}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        # Gemma 3's file: it samples and names no temperature, which is 1 in transformers.
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"top_p": 0.8}, {"temperature": 1.0, "top_p": 0.8}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"top_k": -1, "temperature": 0.5}, {"temperature": 0.5, "top_k": 0}),
        ({"do_sample": False, "temperature": 0.5, "repetition_penalty": 1.3}, {"temperature": 0.0}),
    ],
)
def test_the_values_of_a_file(content: dict[str, Any], values: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_sampling_defaults(tmp_path) == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "0.6"}, r"generation_config.json: field 'temperature' is wrong: .*'0.6'"),
        ({"top_p": 1.5}, "field 'top_p' is wrong"),
        ({"top_k": 2.5}, "field 'top_k' is wrong"),
        ({"do_sample": "yes"}, "field 'do_sample' is 'yes'; it must be true or false"),
    ],
)
def test_a_wrong_value_is_named(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_sampling_defaults(tmp_path)


def test_a_request_takes_precedence_field_by_field() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    assert with_defaults({"top_k": 5}, defaults) == {**defaults, "top_k": 5}
    assert with_defaults({"repetition_penalty": 1.0}, defaults)["repetition_penalty"] == 1.0
    # Temperature 0 means the likeliest token, which a penalty would change.
    assert with_defaults({"temperature": 0}, defaults) == {"temperature": 0}
    assert chosen_defaults("greedy", defaults) == {"temperature": 0.0}
    neutral = Sampling(**chosen_defaults("neutral", defaults))  # type: ignore[arg-type]
    assert neutral == Sampling(temperature=1.0)


def test_the_ways_to_override_them_in_python(plain: Path, tmp_path: Path) -> None:
    content = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.7}
    llm = LLM(published(plain, tmp_path / "model", content), device="cpu", quantize="none")
    assert llm.sampling_defaults == {"temperature": 1.0, "top_k": 1, "repetition_penalty": 1.7}
    other = LLM(plain, device="cpu", quantize="none")
    assert other.sampling_defaults == {}

    def tokens(model: LLM, **options: Any) -> list[int]:
        return model.generate("Once", max_tokens=10, seed=3, **options).tokens

    greedy = tokens(other, temperature=0)
    assert tokens(llm) != greedy
    assert tokens(llm, temperature=0) == tokens(llm, sampling="greedy") == greedy
    assert tokens(llm, sampling="neutral") == tokens(other, temperature=1.0)
    assert tokens(llm, sampling="default") == tokens(llm)
    # A Sampling object sets every field.
    assert tokens(llm, sampling=Sampling()) == tokens(other, temperature=0.7)
    with pytest.raises(UserError, match="`sampling` is 'hot'; it must be default, greedy, neutral"):
        tokens(llm, sampling="hot")


def test_the_command_line(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tercet.cli.main import main

    content = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.7}
    directory = published(plain, tmp_path / "model", content)

    def answer(*options: str) -> str:
        arguments = ["prompt", str(directory), "hi", "--max-tokens", "10", "--quantize", "none", "--json"]
        assert main([*arguments, *options]) == 0
        return str(json.loads(capsys.readouterr().out)["text"])

    assert answer() != answer("--temperature", "0")
    assert answer("--sampling", "greedy") == answer("--temperature", "0")
    assert main(["prompt", str(directory), "hi", "--sampling", "cold"]) == 2
    assert "--sampling is 'cold'" in capsys.readouterr().err
