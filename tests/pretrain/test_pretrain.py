"""A whole build: its products, resuming, and what other libraries compute from its checkpoint."""

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_text import SMALL, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import forked
from tercet.compose import build
from tercet.errors import UserError
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.corpus import open_stream
from tercet.train.loop import STATE
from tercet.train.state import load_progress


def begun_in(out: Path) -> bool:
    return (out / "run.json").is_file() and (out / STATE).is_file()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(seed)}) + "\n" for seed in range(300)))
    return path


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "run"
    build(corpus, out, tokens=40_000, **SMALL)
    return out


def test_the_model_loads_in_transformers_with_equal_logits_and_the_same_tokens(built: Path) -> None:
    theirs, tokens = (
        AutoModelForCausalLM.from_pretrained(built / "model"),
        AutoTokenizer.from_pretrained(built / "model"),
    )
    ids = tokens("the small cat runs", return_tensors="pt").input_ids
    assert ids[0].tolist() == Tokenizer.load(built / "model").encode("the small cat runs")
    with torch.no_grad():
        assert torch.allclose(load_model(built / "model")(ids), theirs(ids).logits, atol=1e-4)
    assert theirs.generation_config.eos_token_id == 0


def test_the_result_is_complete_and_better_than_chance(built: Path) -> None:
    result = json.loads((built / "result.json").read_text())
    assert 0 < result["bits_per_byte"] < 3.0
    whole = 40_000 // (8 * 32) * 8 * 32
    assert 0.98 * whole <= result["tokens"] <= whole, "little is padding"
    assert result["corpus"]["documents"] + result["corpus"]["heldout_documents"] == 300
    assert len(result["samples"]) >= 1
    page = (built / "report.html").read_text()
    assert "<svg" in page and "bits per byte" in page


def test_a_killed_build_ends_bit_for_bit_as_one_that_was_not(
    built: Path, corpus: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from tercet import build\n"
        "import tercet.train.calibrate as calibrate\n"
        "calibrate._measure = lambda *a: calibrate.Speed(3_000.0, 'float32', 1)\n"
        "import tercet.train.loop as loop, dataclasses\n"
        "old = loop.train\n"
        "import tercet.pretrain.base as base\n"
        "base.train = lambda model, recipe, *a, **k: old(\n"
        "    model, dataclasses.replace(recipe, save_seconds=0), *a, **k)\n"
        "build(sys.argv[1], sys.argv[2], tokens=40_000, layers=1, width=32, vocab_size=300, context=32,\n"
        "      batch_tokens=256)\n"
    )
    out = tmp_path / "run"
    process = forked.Program(script, str(corpus), str(out))
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        progressed = (
            load_progress(out / STATE, json.loads((out / "run.json").read_text())["key"])
            if begun_in(out)
            else None
        )
        if progressed is not None and 20 < progressed.step < 140:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    build(corpus, out, tokens=40_000, **SMALL)
    a, b = ((run / "model" / "model.safetensors").read_bytes() for run in (built, out))
    assert a == b


def test_the_test_split_of_a_task_is_taken_out_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    secret = json.loads(corpus.read_text().splitlines()[7])["text"]
    made = build(corpus, tmp_path / "run", tokens=512, exclude=[secret], **SMALL)
    assert made.corpus.decontamination is not None
    assert made.corpus.decontamination["test_examples_found"] == 1
    tokenizer_directory = tmp_path / "run" / "corpus" / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_directory)
    for part in ("train", "heldout"):
        stream = open_stream(tmp_path / "run" / "corpus" / f"{part}.bin", tokenizer.vocab_size)
        assert secret.strip() not in tokenizer.decode([int(token) for token in stream])


def test_the_report_compares_tokenizers(built: Path, corpus: Path, tmp_path: Path) -> None:
    other = built / "model"
    made = build(
        corpus, tmp_path / "run", tokens=512, digits="three", compare_tokenizers=[str(other)], **SMALL
    )
    assert set(made.compression) == {"this model", str(other)}
    assert made.compression["this model"]["bytes_per_token"] > 1
    assert (
        f"{other}: {made.compression[str(other)]['bytes_per_token']:.2f} bytes per token"
        in (tmp_path / "run" / "report.html").read_text()
    )
    with pytest.raises(UserError, match="`digits` is 'two'; choose one, three, all"):
        build(corpus, tmp_path / "other", tokens=512, digits="two", **SMALL)


def test_bits_per_byte_are_those_of_transformers_on_the_held_out_text(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built / "model")
    tokenizer = Tokenizer.load(built / "model")
    stream = np.fromfile(built / "corpus" / "heldout.bin", np.uint16).astype(np.int64)
    starts = np.load(built / "corpus" / "heldout.starts.npy")
    nats, size = 0.0, 0
    for begin, end in itertools.pairwise(starts.tolist()):
        for place in range(begin - 1, end - 1, SMALL["context"]):
            window = torch.from_numpy(stream[place : min(place + SMALL["context"] + 1, end)])[None]
            with torch.no_grad():
                logits = model(window[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="none")
            nats += float(losses[window[0, 1:] != 0].sum())
            size += sum(tokenizer.byte_length(int(token)) for token in window[0, 1:])
    expected = nats / math.log(2) / size
    assert json.loads((built / "result.json").read_text())["bits_per_byte"] == pytest.approx(
        expected, rel=1e-4
    )


def test_overfitting_is_reported_and_the_best_weights_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(seed)}) + "\n" for seed in range(80)))
    shape = {**SMALL, "layers": 2, "width": 64}
    built = build(path, tmp_path / "run", tokens=150_000, **shape)
    output = capsys.readouterr().err
    best = min(built.history, key=lambda row: row["loss"])
    assert best["step"] < built.steps
    assert f"kept the weights of step {best['step']} of {built.steps}: after" in output
    assert "epochs the network overfits this small text" in output
    assert built.kept_step == best["step"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"of step {best['step']:,}; the held-out loss rose after it" in page
    # The last measurement is of more text, in float32.
    assert built.bits_per_byte == pytest.approx(best["bits_per_byte"], rel=0.03)
    assert built.history[-1]["bits_per_byte"] > 1.1 * built.bits_per_byte
    build(path, tmp_path / "short", tokens=4_000, **shape)
    assert "overfits" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"minutes": 1, "tokens": 5}, "only one of `minutes`, `tokens` and `flops`"),
        ({"minutes": -1}, "`minutes` is -1; it must be a positive number"),
        ({"layers": 2}, "give `layers` and `width` together"),
        ({"tokens": 1000, "vocab_size": 100}, "`vocab_size` is 100"),
        ({"tokens": 1000, "flops": 1e9}, "only one of `minutes`, `tokens` and `flops`"),
        ({"tokens": 1000, "batch_tokens": 100}, "`batch_tokens` is 100"),
        (
            {"tokens": 1000, "optimizer": "adamw", "embedding_rate": 0.1},
            "`embedding_rate` needs `optimizer=muon`",
        ),
        ({"tokens": 1000, "z_loss": -1.0}, "`z_loss` is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    corpus: Path, tmp_path: Path, settings: dict[str, int], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        build(corpus, tmp_path / "run", **settings)


def test_too_little_text_and_a_foreign_directory_are_refused(
    tmp_path: Path, built: Path, corpus: Path
) -> None:
    (tmp_path / "tiny.txt").write_text("too few.")
    with pytest.raises(UserError, match="the corpus has 8 characters"):
        build(tmp_path / "tiny.txt", tmp_path / "run", tokens=1000, **SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and contains no Tercet run"):
        build(corpus, tmp_path / "other", tokens=1000)
    with pytest.raises(UserError, match="other data or settings"):
        build(corpus, built, tokens=1000)


def test_minimal_pairs_are_measured_in_the_run_and_at_its_end(corpus: Path, tmp_path: Path) -> None:
    rows = [
        {
            "sentence_good": f"the small {noun} runs.",
            "sentence_bad": f"small {noun} the runs zxq.",
            "UID": "order",
        }
        for noun in ("cat", "dog", "tree", "house")
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = build(corpus, tmp_path / "run", tokens=20_000, pairs=[pairs], **SMALL)
    # Letters that never occur together in the corpus are unlikely after any training.
    assert made.pair_accuracy == {"accuracy": 1.0, "pairs": 4}
    assert all(0 <= row["pair_accuracy"] <= 1 for row in made.history)
    assert "100.0% of 4 correct" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(UserError, match="there is no file or directory"):
        build(corpus, tmp_path / "other", tokens=20_000, pairs=["nowhere.jsonl"], **SMALL)


def test_minimal_pairs_longer_than_the_context_are_refused_before_training(
    corpus: Path, tmp_path: Path
) -> None:
    """Such a pair once ended a run at its last measurement, after all of the training."""
    pairs = tmp_path / "pairs.jsonl"
    row = {"sentence_good": "the cat " * 50, "sentence_bad": "the cats " * 50, "UID": "length"}
    pairs.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"the sentence 'the cat.*takes at most 32"):
        build(corpus, tmp_path / "run", tokens=20_000, pairs=[pairs], **SMALL)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
