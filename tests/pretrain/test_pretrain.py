"""Building: corpus, tokenizer, network, resume, and what other libraries make of the result."""

import functools
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.compose import build
from tercet.errors import UserError
from tercet.model.loading import save_model
from tercet.model.transformer import Transformer
from tercet.pretrain.corpus import PIECE, open_stream, pieces, split, write_stream
from tercet.pretrain.initialize import CONSTANT, initialize, look_nearby
from tercet.pretrain.plan import LADDER, network, shape_for
from tercet.pretrain.planning import for_text, make_plan
from tercet.pretrain.settings import PretrainSettings
from tercet.pretrain.spool import Spool
from tercet.pretrain.vocabulary import bytes_per_token, train_tokenizer
from tercet.train.loop import STATE
from tercet.train.state import load_progress

WORDS = [
    "the",
    "a",
    "small",
    "red",
    "green",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "under",
    "tree",
    "house",
    "and",
    "then",
]
SMALL = {"layers": 1, "width": 32, "vocab_size": 300, "context": 32, "batch_tokens": 256}


def begun_in(out: Path) -> bool:
    return (out / "run.json").is_file() and (out / STATE).is_file()


def text_of(seed: int, count: int = 60) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, count)) + ".\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(seed)}) + "\n" for seed in range(300)))
    return path


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "run"
    build(corpus, out, tokens=40_000, **SMALL)  # type: ignore[arg-type]
    return out


def test_the_model_loads_in_transformers_with_equal_logits_and_the_same_tokens(built: Path) -> None:
    from tercet.model.loading import load_model
    from tercet.model.tokenizer import Tokenizer

    theirs, tokens = (
        AutoModelForCausalLM.from_pretrained(built / "model"),
        AutoTokenizer.from_pretrained(built / "model"),
    )
    ids = tokens("the small cat runs", return_tensors="pt").input_ids
    assert ids[0].tolist() == Tokenizer.load(built / "model").encode("the small cat runs")
    with torch.no_grad():
        assert torch.allclose(load_model(built / "model")(ids), theirs(ids).logits, atol=1e-4)
    assert theirs.generation_config.eos_token_id == 0


def test_what_is_reported_is_there_and_better_than_knowing_nothing(built: Path) -> None:
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
        "import tercet.pretrain.pretrain as p\n"
        "p.train = lambda model, recipe, *a, **k: old(model, dataclasses.replace(recipe, save_seconds=0), *a, **k)\n"
        "build(sys.argv[1], sys.argv[2], tokens=40_000, layers=1, width=32, vocab_size=300, context=32,\n"
        "      batch_tokens=256)\n"
    )
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", script, str(corpus), str(out)], stderr=subprocess.PIPE)
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
    build(corpus, out, tokens=40_000, **SMALL)  # type: ignore[arg-type]
    a, b = ((run / "model" / "model.safetensors").read_bytes() for run in (built, out))
    assert a == b


def test_the_test_split_of_a_task_is_taken_out_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    secret = json.loads(corpus.read_text().splitlines()[7])["text"]
    made = build(corpus, tmp_path / "run", tokens=512, exclude=[secret], **SMALL)  # type: ignore[arg-type]
    assert made.corpus.decontamination is not None
    assert made.corpus.decontamination["test_examples_found"] == 1
    tokenizer_directory = tmp_path / "run" / "corpus" / "tokenizer"
    from tercet.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_directory)
    for part in ("train", "heldout"):
        stream = open_stream(tmp_path / "run" / "corpus" / f"{part}.bin", tokenizer.vocab_size)
        assert secret.strip() not in tokenizer.decode([int(token) for token in stream])


def test_the_tokenizer_is_lossless_and_splits_digits() -> None:
    tokenizer = train_tokenizer([text_of(seed) for seed in range(50)] + ["1234567890 " * 50], 320)
    for text in ("hello world", "  spaces\n\n\ttabs", "naïve 北京 🙂 \x00", "a1234b", "don't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234")] == list("1234")


@pytest.mark.parametrize("digits", ["one", "three", "all"])
@pytest.mark.parametrize("whitespace", ["word", "apart"])
def test_words_are_split_as_asked(digits: Any, whitespace: Any) -> None:
    texts = ["call 1234567 now,  please\n\n call it 5.\n"] * 200
    tokenizer = train_tokenizer(texts, 400, digits=digits, whitespace=whitespace)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(texts[0])]
    assert "".join(pieces) == texts[0]
    numbers = {"one": list("1234567"), "three": ["123", "456", "7"], "all": ["1234567"]}[digits]
    assert [piece for piece in pieces if piece.isdigit()] == [*numbers, "5"]
    assert (" now" in pieces) == (whitespace == "word")
    assert ("now" in pieces) == (whitespace == "apart")
    odd = "  x\t\ty1 \r\n\u00a0'S 北京12 !! "
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_rare_merges_are_not_made() -> None:
    texts = ["common words " * 50, "rare"]
    tokens = train_tokenizer(texts, 1000, rarest=16).backend.get_vocab()
    assert "Ġwords" in tokens and "rare" not in tokens
    assert "rare" in train_tokenizer(texts, 1000).backend.get_vocab()


def test_compression_is_bytes_over_tokens(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["ab " * 500], 262)
    texts = ["ab ab", "é"]
    # ab | Ġab, or what was merged of them; two bytes of é.
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert bytes_per_token(tokenizer, texts) == 7 / tokens


def spool_of(path: Path, texts: list[str]) -> Spool:
    spool = Spool(path)
    for text in texts:
        spool.append(text, "source")
    return spool


def test_a_spool_gives_its_texts_back_and_leaves_nothing(tmp_path: Path) -> None:
    texts = ["one", "", "zwei é 北京 🙂", "\n"]
    with spool_of(tmp_path / "texts", texts) as spool:
        assert list(spool) == texts and spool[2] == texts[2]
        assert list(spool.lengths) == list(map(len, texts))
        assert spool.total_bytes == len("".join(texts).encode())
    assert not list(tmp_path.iterdir())


def test_held_out_documents_are_chosen_by_content(tmp_path: Path) -> None:
    texts = [text_of(seed) for seed in range(400)]

    def held_of(texts: list[str]) -> tuple[list[str], list[str]]:
        with spool_of(tmp_path / "texts", texts) as spool:
            division = split(spool)
            return [text for _, text in division.train(spool)], [text for _, text in division.heldout(spool)]

    train, held = held_of(texts)
    assert sorted(train + held) == sorted(texts)
    assert 0.09 < sum(map(len, held)) / sum(map(len, texts)) < 0.12, "a tenth of a small corpus"
    assert set(held_of(texts[::-1])[1]) == set(held), "whatever their order"
    more = held_of([*texts, "another document"])[1]
    assert len(set(held) ^ set(more)) <= 2, "one document more moves no other, but at the edge"


def test_no_more_than_twice_the_share_is_held_out_of_long_texts(tmp_path: Path) -> None:
    """A book of four hundredths of a corpus once was held out whole, for one hundredth."""
    books = ["".join(f"line {number} of {book}\n" for number in range(4000)) for book in range(30)]
    chapters = [text_of(seed, 600) for seed in range(60)]
    for texts in (books, books + chapters):
        with spool_of(tmp_path / "texts", texts) as spool:
            division = split(spool)
            held = sum(len(text) for _, text in division.heldout(spool))
            train = sum(len(text) for _, text in division.train(spool))
        total = sum(map(len, texts))
        assert train + held == total
        assert 0.005 < held / total < 0.025


def test_of_one_long_text_a_stretch_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(10_000))
    with spool_of(tmp_path / "texts", [text]) as spool:
        division = split(spool)
        train, [(_, held)] = [part for _, part in division.train(spool)], list(division.heldout(spool))
    assert held.join(train) == text and len(train) == 2
    assert held.startswith("line ") and held.endswith("\n")
    assert 0.05 < len(held) / len(text) < 0.2


def test_of_few_books_a_stretch_of_each_is_held_out(tmp_path: Path) -> None:
    """One book of 48 once was held out, and what the model made of that one was told for all."""
    books = [
        "".join(f"line {number} of {book}\n" for number in range(4000 + 50 * book)) for book in range(48)
    ]
    with spool_of(tmp_path / "texts", books) as spool:
        division = split(spool)
        train, held = list(division.train(spool)), list(division.heldout(spool))
        assert split(spool) == division
    assert [index for index, _ in held] == list(range(48))
    for index, part in held:
        assert part.join(text for which, text in train if which == index) == books[index]
        assert 0.005 < len(part) / len(books[index]) < 0.02
    places = [books[index].index(part) / len(books[index]) for index, part in held]
    assert min(places) < 0.2 and max(places) > 0.8, "from anywhere in a book"


def test_of_very_short_texts_the_longest_are_judged(tmp_path: Path) -> None:
    texts = ["x" * 30] * 5 + ["".join(f"line {number}\n" for number in range(1000))] + ["yy"] * 3
    with spool_of(tmp_path / "texts", texts) as spool:
        held = list(split(spool).heldout(spool))
    assert [index for index, _ in held] == [5] and len(held[0][1]) > 500


def test_documents_stand_between_end_of_text_tokens() -> None:
    tokenizer = train_tokenizer([text_of(seed) for seed in range(50)], 300)
    file = io.BytesIO()
    starts = write_stream(tokenizer, ["the cat", "a dog"], file)
    first, second = tokenizer.encode("the cat"), tokenizer.encode("a dog")
    assert np.frombuffer(file.getvalue(), np.uint16).tolist() == [0, *first, 0, *second, 0]
    assert starts.tolist() == [1, 2 + len(first), len(file.getvalue()) // 2]


WHITE = ["\n", "\n\n", " ", "\t", "\r\n", "\u00a0", "\u2028"]


@given(
    st.lists(st.sampled_from([*WHITE, "a", "it's", ".", "'", "12", "\u00e9\u0301"]), max_size=60),
    st.integers(1, 12),
    st.sampled_from(["word", "apart"]),
)
@settings(max_examples=200, deadline=None)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(words: list[str], size: int, whitespace: Any) -> None:
    tokenizer = splitting(whitespace)
    text = "".join(words)
    parts = pieces(text, size)
    assert "".join(parts) == text
    whole = tokenizer.encode(text, special=False)
    assert [token for part in parts for token in tokenizer.encode(part, special=False)] == whole


def test_a_text_without_any_place_to_cut_is_cut_all_the_same() -> None:
    text = "A" * (4 * PIECE + 10)
    assert [len(piece) for piece in pieces(text)] == [2 * PIECE, 2 * PIECE, 10]


def test_one_endless_line_is_read_as_far_as_the_budget_goes(tmp_path: Path) -> None:
    """Memory and time once grew with the line: 200 MB took all memory of a machine."""
    line = " ".join(text_of(seed, 1000).replace("\n", " ") for seed in range(20)) * 40
    assert len(line) > 3_000_000
    (tmp_path / "line.txt").write_text(line)
    made = build(tmp_path / "line.txt", tmp_path / "run", tokens=512, **SMALL)
    read = made.corpus.bytes + made.corpus.heldout_bytes
    assert not made.corpus.complete
    assert 400_000 < read < 700_000


@functools.cache
def splitting(whitespace: Any) -> Any:
    """Trained on what it will read, so that merges reach as far as words let them."""
    texts = ["a.\n\nit's 12\n a\t\n\n\na  .\r\n\u00a0a\n" * 100]
    return train_tokenizer(texts, 400, whitespace=whitespace)


def test_the_report_compares_tokenizers(built: Path, corpus: Path, tmp_path: Path) -> None:
    other = built / "model"
    made = build(
        corpus, tmp_path / "run", tokens=512, digits="three", compare_tokenizers=[str(other)], **SMALL
    )
    assert set(made.compression) == {"this model", str(other)}
    assert made.compression["this model"]["bytes_per_token"] > 1
    assert (
        f"{other}: {made.compression[str(other)]['bytes_per_token']:.2f} bytes a token"
        in (tmp_path / "run" / "report.html").read_text()
    )
    with pytest.raises(UserError, match="--digits is 'two'; choose one, three, all"):
        build(corpus, tmp_path / "other", tokens=512, digits="two", **SMALL)


def test_bits_per_byte_are_those_of_transformers_on_the_held_out_text(built: Path) -> None:
    from tercet.model.tokenizer import Tokenizer

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


def test_initial_weights_have_the_variance_they_should_and_depend_on_the_seed() -> None:
    model, other = (Transformer(network(4, 128, 512, 64)) for _ in range(2))
    initialize(model, 0)
    initialize(other, 1)
    assert abs(float(model.model.embed_tokens.weight.detach().std()) - 0.02) < 0.001
    last = model.model.layers[0].mlp.down_proj.weight.detach()
    assert abs(float(last.std()) - 128**-0.5 / math.sqrt(8)) < 0.001
    first = model.model.layers[0].mlp.up_proj.weight.detach()
    assert abs(float(first.std()) - 128**-0.5) < 0.002
    assert not torch.equal(last, other.model.layers[0].mlp.down_proj.weight)


def test_text_that_is_learned_by_heart_is_told_and_the_best_weights_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(seed)}) + "\n" for seed in range(80)))
    shape = {**SMALL, "layers": 2, "width": 64}
    built = build(path, tmp_path / "run", tokens=150_000, **shape)
    told = capsys.readouterr().err
    best = min(built.history, key=lambda row: row["loss"])
    assert best["step"] < built.steps
    assert f"foreseen best at step {best['step']} of {built.steps}, and those weights are kept" in told
    assert built.kept_step == best["step"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"those of step {best['step']:,}: after it held-out text was foreseen worse" in page
    # The last measurement is of more text, in float32.
    assert built.bits_per_byte == pytest.approx(best["bits_per_byte"], rel=0.03)
    assert built.history[-1]["bits_per_byte"] > 1.1 * built.bits_per_byte
    build(path, tmp_path / "short", tokens=4_000, **shape)
    assert "by heart" not in capsys.readouterr().err


def test_more_budget_gives_a_larger_network() -> None:
    sizes = [shape_for(seconds=60 * minutes).config.matmul_parameters for minutes in (1, 5, 30, 240)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert [network(layers, width, 2048, 512).hidden_size for layers, width in LADDER] == [
        w for _, w in LADDER
    ]


def test_a_budget_in_minutes_passes_over_a_small_text_four_times_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 60_000)
    large = make_plan(PretrainSettings(text, minutes=30, device="cpu"))  # 3,000 tokens a second, so 5 million
    assert 0.9 < large.tokens / (4 * 60_000 / 3.3) <= 1
    assert "the text is about 18,182 tokens: after 4 passes" in capsys.readouterr().err
    # A network that so many tokens feed, and not so much time.
    assert large.width == shape_for(tokens=4 * 18_182, context=large.context).config.hidden_size
    assert make_plan(PretrainSettings(text, minutes=0.4, device="cpu")).tokens < large.tokens
    assert capsys.readouterr().err == ""
    # Against learning it by heart, unless another decay is asked for.
    steps_a_pass = large.steps / (large.tokens / 18_182)
    assert large.rates["weight_decay"] == pytest.approx(min(0.2, 1 / (0.02 * 2 * steps_a_pass)), rel=0.05)
    assert make_plan(PretrainSettings(text, tokens=10_000, device="cpu")).rates["weight_decay"] == 0
    undecayed = make_plan(PretrainSettings(text, minutes=30, weight_decay=0.0, device="cpu"))
    assert undecayed.rates["weight_decay"] == 0
    # Who asks for tokens gets them.
    assert make_plan(PretrainSettings(text, tokens=1_000_000, device="cpu")).tokens > 990_000
    # Who asks for operations gets them, and a network for so many rather than hundreds of passes.
    by_flops = make_plan(PretrainSettings(text, flops=1e14, device="cpu"))
    assert by_flops.width == shape_for(flops=1e14, context=by_flops.context).config.hidden_size > large.width
    # An hour is not a reason for a long context where the text is read in a minute.
    assert make_plan(PretrainSettings(text, minutes=60, device="cpu")).context == 256
    # Modules take long to read, and what they take is not planned for training.
    files, builtin = (
        make_plan(PretrainSettings(data, minutes=0.5, read_bytes=30_000_000, device="cpu"))
        for data in (text, "builtin:python-docs")
    )
    assert builtin.seconds is not None and files.seconds is not None
    assert files.seconds - builtin.seconds > 5
    capsys.readouterr()
    limited = make_plan(PretrainSettings(text, minutes=30, read_bytes=30_000, device="cpu"))
    assert "--read-bytes leaves about 9,091 tokens" in capsys.readouterr().err
    assert limited.tokens < large.tokens


def test_a_plan_is_held_to_the_text_once_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    asked = PretrainSettings(
        "builtin:python-docs", minutes=5, device="cpu"
    )  # how much that is nobody knows before
    plan = make_plan(asked)
    assert plan.rates["weight_decay"] == 0
    assert for_text(plan, asked, plan.tokens) == plan
    capsys.readouterr()
    short = for_text(plan, asked, plan.tokens // 10)
    assert short.tokens == pytest.approx(0.4 * plan.tokens, rel=0.01)
    assert short.rates["weight_decay"] > 0
    assert "after 4 passes over them the run ends" in capsys.readouterr().err
    by_tokens = PretrainSettings("builtin:python-docs", tokens=plan.tokens, device="cpu")
    assert for_text(make_plan(by_tokens), by_tokens, plan.tokens // 10).tokens == make_plan(by_tokens).tokens


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"minutes": 1, "tokens": 5}, "one of --minutes, --tokens and --flops"),
        ({"minutes": -1}, "--minutes is -1; it must be a positive number"),
        ({"layers": 2}, "give layers and width together"),
        ({"tokens": 1000, "vocab_size": 100}, "--vocab-size is 100"),
        ({"tokens": 1000, "flops": 1e9}, "one of --minutes, --tokens and --flops"),
        ({"tokens": 1000, "batch_tokens": 100}, "--batch-tokens is 100"),
        ({"tokens": 1000, "optimizer": "adamw", "embedding_rate": 0.1}, "--embedding-rate belongs to"),
        ({"tokens": 1000, "z_loss": -1.0}, "--z-loss is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    corpus: Path, tmp_path: Path, settings: dict[str, int], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        build(corpus, tmp_path / "run", **settings)  # type: ignore[arg-type]


def test_too_little_text_and_a_foreign_directory_are_refused(
    tmp_path: Path, built: Path, corpus: Path
) -> None:
    (tmp_path / "tiny.txt").write_text("too few.")
    with pytest.raises(UserError, match="the corpus has 8 characters"):
        build(tmp_path / "tiny.txt", tmp_path / "run", tokens=1000, **SMALL)  # type: ignore[arg-type]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
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
    # Letters that never stand together in the corpus are unlikely after any training at all.
    assert made.pair_accuracy == {"accuracy": 1.0, "pairs": 4}
    assert all(0 <= one["pair_accuracy"] <= 1 for one in made.history)
    assert "100.0% of 4 right" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(UserError, match="there is no file or directory"):
        build(corpus, tmp_path / "other", tokens=20_000, pairs=["nowhere.jsonl"], **SMALL)


@pytest.mark.parametrize(("width", "layers"), [(96, 2), (128, 2), (384, 1)])
def test_two_heads_of_a_layer_begin_by_looking_back(tmp_path: Path, width: int, layers: int) -> None:
    """Seen through transformers: which tokens they attend to, and that no logit knows of the constant."""
    config = network(layers, width, 300, 64)
    model = Transformer(config)
    initialize(model, 0)
    look_nearby(model)
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(tokens, output_attentions=True)
        for attention in found.attentions:
            for head, back in ((0, 1), (1, 2)):
                far = [attention[:, head].diagonal(-distance, 1, 2).mean() for distance in range(8)]
                assert max(range(8), key=lambda distance: far[distance]) == back
                assert far[back] > 3 / 64, "chance"
        theirs.model.embed_tokens.weight[:, 0] += 1
        shifted = theirs.lm_head(theirs.model(inputs_embeds=model.model.embed_tokens.weight[tokens])[0])
    assert (
        CONSTANT == model.model.embed_tokens.weight[:, 0].max() == model.model.embed_tokens.weight[:, 0].min()
    )
    assert torch.allclose(found.logits, shifted, atol=1e-5)
