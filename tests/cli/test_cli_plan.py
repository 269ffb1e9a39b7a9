"""``tercet plan build``: its numbers agree with the build that follows."""

import argparse
import ast
import json
import tarfile
import typing
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli.main import main
from tercet.compose import build, build_with
from tercet.pretrain.scaling import Law
from tercet.pretrain.settings import BuildSettings

pytestmark = pytest.mark.long

SHAPE = ["--layers", "1", "--width", "32", "--vocab-size", "300", "--context", "32"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["one", "two", "red", "green", "cat", "dog", "tree", "house", "and", "then"]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = [{"text": " ".join(rng.choice(words, 60)) + ".\n"} for _ in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_plan_is_what_the_build_does(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "build", "--data", str(corpus), "--tokens", "20000", *SHAPE, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    made = build(corpus, tmp_path / "run", tokens=20_000, layers=1, width=32, vocab_size=300, context=32)
    # A corpus this small has too few pairs for the full vocabulary.
    missing = 32 * (300 - made.corpus.vocab_size)
    assert plan["parameters"] == made.parameters + 2 * missing  # embedding and head
    assert plan["matmul_parameters"] == made.matmul_parameters + missing
    assert 0.98 * plan["tokens"] <= made.tokens <= plan["tokens"]
    assert plan["corpus_bytes"] == sum(
        len(json.loads(line)["text"]) for line in corpus.read_text().splitlines()
    )
    assert plan["flops"] == 6 * plan["matmul_parameters"] * plan["tokens"]
    assert plan["bits_per_byte"] is None and plan["seconds"] > 0
    assert made.predicted["seconds"] == plan["seconds"]
    assert "predicted" in (tmp_path / "run" / "report.html").read_text()


def test_tiny_runs_predict_the_loss_of_a_larger_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real text: a tiny run learns a toy language completely, and then no loss falls with the budget.
    corpus = tmp_path / "text.jsonl"
    sources = [
        Path(module.__file__).read_text() for module in (argparse, ast, tarfile, typing, unittest.mock)
    ]
    corpus.write_text("".join(json.dumps({"text": source}) + "\n" for source in sources))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tercet.pretrain.plan.LADDER", ((1, 32), (2, 32)))
    arguments = ["plan", "build", "--data", str(corpus), "--flops", "1e11", "--context", "32"]
    assert main([*arguments, "--fit", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["bits_per_byte"] < 8 and plan["law"]["exponent"] > 0
    made = build(corpus, tmp_path / "run", flops=1e11, context=32)
    assert made.predicted["bits_per_byte"] == pytest.approx(plan["bits_per_byte"])
    assert made.bits_per_byte == pytest.approx(plan["bits_per_byte"], rel=0.25)


def test_tiny_runs_are_measured_on_the_same_text(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Earlier, each run held out a part of the text it had read, so a larger budget seemed to reach a worse loss."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tercet.pretrain.plan.LADDER", ((1, 32), (2, 32)))
    for module in (
        "estimate",
        "pretrain",
    ):  # as for a corpus so large that a short run reads only a part of it
        monkeypatch.setattr(
            f"tercet.pretrain.{module}.reading_limit",
            lambda plan, settings: settings.read_bytes or 30_000 + plan.tokens // 10,
        )
    texts: list[tuple[int, int]] = []

    def watched(settings: BuildSettings) -> Any:
        made = build_with(settings)
        texts.append((made.corpus.bytes, made.corpus.heldout_bytes))
        return made

    monkeypatch.setattr("tercet.pretrain.estimate.pretrain", watched)
    monkeypatch.setattr("tercet.pretrain.estimate.fit", lambda points: Law(0.0, 1.0, 0.1, tuple(points)))
    assert main(["plan", "build", "--data", str(corpus), "--flops", "1e11", "--context", "32", "--fit"]) == 0
    assert len(texts) == 4 and len(set(texts)) == 1


def test_prices_give_a_cost_and_unknown_names_are_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "build", "--data", str(corpus), "--flops", "1e18", "--context", "32", *SHAPE[:6]]
    assert main([*arguments, "--price", "h100=2.50", "--json"]) == 0
    hardware = {row["name"]: row for row in json.loads(capsys.readouterr().out)["hardware"]}
    seconds = hardware["H100"]["seconds"]
    assert seconds == pytest.approx(1e18 / (989e12 * 0.4), rel=0.01)
    assert hardware["H100"]["cost"] == pytest.approx(seconds / 3600 * 2.5)
    assert hardware["L4"]["cost"] is None
    assert main([*arguments, "--price", "abacus=1"]) == 2
    assert "known names are h100" in capsys.readouterr().err
    assert main(["plan", "house", "--data", "x"]) == 2
