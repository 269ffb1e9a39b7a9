"""Fine-tuning: the supervised tokens, the files it writes, and whether other libraries load them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.data.examples import CHATML, prepare, show_mask
from tercet.engine.backend import Chunk
from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
from tercet.finetune.settings import TuneSettings
from tercet.finetune.sft import learning_rate_for, tune
from tercet.model.config import ModelConfig
from tercet.model.loading import load_model, save_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.pretrain.initialize import initialize
from tercet.settings import options_of

COLOURS = ["red", "green", "blue", "black"]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{n} {colour} is", "completion": f" {colour}"} for n in range(20) for colour in COLOURS
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint with ChatML's tokens and no chat template."""
    directory = tmp_path_factory.mktemp("base") / "model"
    directory.mkdir()
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([row["prompt"] + row["completion"] for row in ROWS], trainer)
    tokenizer = Tokenizer.from_backend(backend, bos=None, eos="<|endoftext|>", pad="<|endoftext|>")
    config = ModelConfig(
        family="qwen3", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=96, num_layers=2,
        num_heads=2, num_kv_heads=1, head_dim=16, max_positions=64, qk_norm="head", tie_embeddings=True,
        eos_token_ids=(0,), pad_token_id=0,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, 0)
    with torch.no_grad():
        # Make embeddings as long as trained ones: an adapter can't lengthen them, and with short embeddings
        # all logits would be nearly equal.
        model.model.embed_tokens.weight.mul_(25)
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of every position, [B, T, V], computed by the engine."""
    backend = load_engine(directory, device="cpu", quantize="none").backend
    places = list(range(tokens.shape[1]))
    rows = [backend.feed([Chunk(0, row.tolist(), 0, [0, 1, 2, 3], places)]) for row in tokens]
    return torch.from_numpy(np.stack(rows))


def test_full_tuning_learns_the_task_and_transformers_loads_the_result(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, ROWS, tmp_path, method="full", epochs=12, batch_size=8, learning_rate=5e-3)
    assert tuned.loss < 0.2
    model = AutoModelForCausalLM.from_pretrained(tuned.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tuned.model)
    for colour in COLOURS:
        ids = torch.tensor([tokenizer(f"7 {colour} is").input_ids])
        with torch.no_grad():
            theirs = model(ids).logits
        assert torch.allclose(logits(Path(tuned.model), ids), theirs, atol=1e-4)
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
        # It generates the colour and then its stop token, which was supervised.
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == f" {colour}"
        assert out[0, -1].item() == 0


def test_an_adapter_loads_in_peft_with_equal_logits_and_merges_to_the_same(
    base: Path, tmp_path: Path
) -> None:
    tuned = tune(
        base, ROWS, tmp_path / "adapter", epochs=6, batch_size=8, learning_rate=1e-2, rank_stabilised=True
    )
    assert tuned.loss < 1.0
    merged = tune(
        base,
        ROWS,
        tmp_path / "merged",
        epochs=6,
        batch_size=8,
        learning_rate=1e-2,
        rank_stabilised=True,
        merge=True,
    )
    ids = torch.tensor([[5, 9, 40, 200, 17]])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned.model).eval()
    with torch.no_grad():
        theirs = peft(ids).logits
    ours = logits(Path(tuned.model), ids)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(logits(Path(merged.model), ids), ours, atol=1e-4)
    assert not torch.allclose(ours, logits(base, ids), atol=1e-2), "the adapter changes the logits"


def test_lora_trains_the_adapter_and_nothing_else(base: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    tuned = tune(base, ROWS, tmp_path, epochs=1)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    # 7 matrices a layer, rank 16: r * (in + out)
    h, kv, mlp = 32, 16, 96
    expected = 2 * 16 * ((h + h) + 2 * (h + kv) + (h + h) + 3 * (h + mlp))
    assert tuned.trainable_parameters == expected


def test_the_same_seed_gives_the_same_adapter(base: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b", "c"):
        tune(base, ROWS, tmp_path / name, epochs=1, seed=0 if name != "c" else 1)
        files.append((tmp_path / name / "model" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_finished_run_is_not_repeated_and_another_one_is_refused(base: Path, tmp_path: Path) -> None:
    first = tune(base, ROWS, tmp_path, epochs=1)
    again = tune(base, ROWS, tmp_path, epochs=1)
    assert first == again
    with pytest.raises(UserError, match="other data or settings"):
        tune(base, ROWS, tmp_path, epochs=2)
    with pytest.raises(UserError, match="other data or settings"):
        tune(base, ROWS[1:], tmp_path, epochs=1)


def test_conversations_on_a_base_without_a_template_use_chatml_and_stop_at_its_end(
    base: Path, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n} {c}?"}, {"role": "assistant", "content": c}]}
        for n in range(12) for c in COLOURS
    ]  # fmt: skip
    tuned = tune(base, rows, tmp_path, method="full", epochs=14, batch_size=8, learning_rate=5e-3)
    generation = json.loads((Path(tuned.model) / "generation_config.json").read_text())
    end = Tokenizer.load(base).id_of("<|im_end|>")
    assert end in generation["eos_token_id"] and 0 in generation["eos_token_id"]
    engine = load_engine(tuned.model)
    assert engine.tokenizer.chat_template == CHATML
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": "3 blue?"}], add_generation_prompt=True)
    [completion] = engine.generate([Request(tuple(ids), Sampling(max_tokens=20, temperature=0))])
    assert (completion.text, completion.finish_reason) == ("blue", "stop")


def test_a_run_writes_metrics_and_a_report_without_external_resources(base: Path, tmp_path: Path) -> None:
    tune(base, ROWS, tmp_path, epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "src=" not in page and "<script" not in page and "<link" not in page


@pytest.fixture
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.load(base)


def test_every_row_is_accounted_for(tokenizer: Tokenizer) -> None:
    long = {"prompt": "red " * 100, "completion": " green"}
    rows = [*ROWS[:5], long, {"prompt": "red is", "completion": "  "}, {"text": ""}, {"messages": []}]
    dropped = prepare(rows, tokenizer, 32, "drop")
    assert len(dropped.examples) == 5
    assert dict(dropped.dropped) == {
        "longer than 32 tokens": 1, "empty completion": 1, "empty text": 1, "empty conversation": 1
    }  # fmt: skip
    cut = prepare([*rows, {"text": "red green " * 40}], tokenizer, 32, "truncate")
    # The long prompt's completion is cut off entirely; of the text the first 32 tokens are left.
    assert cut.dropped["nothing left to train on"] == 1
    assert (cut.truncated_rows, cut.stops_cut) == (2, 2)
    assert any(
        "truncated 2 examples" in line and "2 of them lost their stop token" in line for line in cut.account()
    )
    with pytest.raises(UserError, match=r"row 6 has \d+ tokens, more than the 32 allowed"):
        prepare(rows, tokenizer, 32, "error")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"question": "x"},
            "row 1: needs messages, conversations, prompt and completion, instruction and output, or text; it has question",
        ),
        ({"prompt": "x", "completion": 3}, "row 1: prompt and completion must both be strings"),
        ({"messages": "hello"}, "row 1: messages must be a list of objects"),
        ({"text": 5}, "row 1: text is a int, not a string"),
        ({"text": " "}, r"none of the 1 rows became a training example \(1 empty text\)"),
    ],
)
def test_bad_rows_get_one_line(tokenizer: Tokenizer, row: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        prepare([row], tokenizer, 32)


def test_the_mask_shows_exactly_the_supervised_tokens(tokenizer: Tokenizer) -> None:
    [example] = prepare([{"prompt": "7 red is", "completion": " red"}], tokenizer, 32).examples
    assert show_mask(example, tokenizer) == [("7 red is", False), (" red<|endoftext|>", True)]
    [example] = prepare([{"text": "red is"}], tokenizer, 32).examples
    assert show_mask(example, tokenizer) == [("red is<|endoftext|>", True)]


def test_a_prompt_given_as_messages_trains_on_the_completion_only(tokenizer: Tokenizer) -> None:
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "blue"}],
    }
    [example] = prepare([row], tokenizer.with_template(CHATML), 64).examples
    assert [text for text, on in show_mask(example, tokenizer) if on] == ["blue<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"method": "qlora"}, "`method` is 'qlora'; choose lora, full"),
        ({"epochs": 0}, "`epochs` is 0; it must be a positive number"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
        ({"weight_decay": -0.1}, "`weight_decay` is -0.1; it must be a finite number of at least 0"),
        ({"over_length": "cut"}, "`over_length` is 'cut'; choose drop, truncate, error"),
        ({"method": "full", "merge": True}, "`merge` needs `method=lora`; full tuning has no adapter"),
        ({"method": "full", "rank": 8, "alpha": 8}, "`rank` and `alpha` need `method=lora`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        TuneSettings("model", "rows.jsonl", "out", **settings)


def test_every_setting_changes_the_result_or_is_refused(base: Path, tmp_path: Path) -> None:
    plain = {"epochs": 2, "batch_size": 8, "max_tokens": 32}
    changed: dict[str, dict[str, Any]] = {
        "method": {"method": "full"}, "epochs": {"epochs": 1}, "batch_size": {"batch_size": 4},
        "learning_rate": {"learning_rate": 1e-3}, "weight_decay": {"weight_decay": 5.0}, "rank": {"rank": 4},
        "alpha": {"alpha": 3}, "rank_stabilised": {"rank_stabilised": True}, "max_tokens": {"max_tokens": 6},
        "over_length": {"over_length": "truncate", "max_tokens": 5}, "minutes": {"minutes": 1e-9},
        "merge": {"merge": True}, "control_tokens": {"control_tokens": "control"},
        "device": {"device": "cuda:9"}, "seed": {"seed": 1},
    }  # fmt: skip
    inputs = {"model", "data", "out", "dev", "chat_template", "patience"}  # patience: the test below
    assert set(changed) == set(options_of(TuneSettings)) - inputs, "add a line here for a new setting"

    def product(settings: dict[str, Any], name: str) -> bytes:
        spelling = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "red"}]
        rows = [
            *ROWS[:22],
            {"messages": spelling},
            {"prompt": "12 green is", "completion": " green green green"},
        ]
        try:
            tuned = tune(base, rows, tmp_path / name, **{**plain, **settings})
        except UserError as problem:
            return str(problem).encode()
        return b"".join(path.read_bytes() for path in sorted(Path(tuned.model).glob("*.safetensors")))

    reference = product({}, "plain")
    for name, settings in changed.items():
        assert product(settings, name) != reference, f"{name} changed nothing"


def test_patience_ends_a_run_that_learns_nothing(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-12}
    whole = tune(base, ROWS, tmp_path / "whole", **settings)
    ended = tune(base, ROWS, tmp_path / "ended", **settings, patience=1)
    assert whole.steps == whole.whole_steps == ended.whole_steps
    assert ended.steps < whole.steps and ended.outlook == "" and not ended.shortened
    with pytest.raises(UserError, match="`patience` is 0"):
        TuneSettings("m", "d", "o", patience=0)


def test_learning_rates_by_size_are_the_usual_ones() -> None:
    assert learning_rate_for(1_000_000, "full") == 4e-3
    assert 5e-6 <= learning_rate_for(3_000_000_000, "full") <= 3e-5
    assert 1e-4 <= learning_rate_for(7_000_000_000, "lora") <= 3e-4


def test_adapters_and_hosted_models_are_refused(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, ROWS, tmp_path / "a", epochs=1)
    with pytest.raises(UserError, match="is an adapter; tune its base, or merge it first"):
        tune(tuned.model, ROWS, tmp_path / "b")
    with pytest.raises(UserError, match="hosted model"):
        tune("openai:gpt", ROWS, tmp_path / "c")


def test_training_does_not_change_the_checkpoint_it_was_loaded_from(base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    model = load_model(base, dtype=torch.float32, trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (base / "model.safetensors").read_bytes() == before


def test_plain_rows_begin_like_a_prompt_at_inference(tokenizer: Tokenizer) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_str(tokenizer.backend.to_str())
    bos = tokenizer.id_of("<|im_start|>")
    assert bos is not None
    for pattern in ("<|im_start|> $A", "<|im_start|> $A <|endoftext|>"):
        backend.post_processor = TemplateProcessing(
            single=pattern, special_tokens=[("<|im_start|>", bos), ("<|endoftext|>", 0)]
        )
        with_bos = Tokenizer.from_backend(
            backend, bos="<|im_start|>", eos="<|endoftext|>", pad="<|endoftext|>"
        )
        [example] = prepare([{"prompt": "7 red is", "completion": " red"}], with_bos, 32).examples
        plain = tokenizer.encode("7 red is red", special=False)
        assert example.ids.tolist() == [bos, *plain, 0], "one BOS, one stop token"
        assert not example.supervised[0] and example.supervised[-1]
        assert show_mask(example, with_bos)[-1] == (" red<|endoftext|>", True)


@pytest.fixture
def larger_tokenizer(base: Path, tmp_path: Path) -> Path:
    """The base with a pad token that was added to the tokenizer, but not to the embedding."""
    directory = tmp_path / "padded"
    shutil.copytree(base, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"pad_token": "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.pad_id == Tokenizer.load(base).vocab_size
    return directory


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pad_token_without_a_row_in_the_embedding_changes_nothing(
    base: Path, larger_tokenizer: Path, tmp_path: Path, method: Any
) -> None:
    rows = [{"prompt": "say", "completion": " red" * n} for n in range(1, 25)]
    tuned = [
        tune(directory, rows, tmp_path / name, method=method, epochs=1)
        for name, directory in (("plain", base), ("larger", larger_tokenizer))
    ]
    assert tuned[0].loss == tuned[1].loss
    AutoModelForCausalLM.from_pretrained(base if method == "lora" else tuned[1].model)


def test_rows_with_a_token_beyond_the_embedding_are_refused_in_one_line(
    larger_tokenizer: Path, tmp_path: Path
) -> None:
    rows = [*ROWS, {"text": "red [PAD] green"}]
    with pytest.raises(UserError, match=r"the token \[PAD\] has the id \d+, but .* rows; remove it from the"):
        tune(larger_tokenizer, rows, tmp_path / "out")
    config = json.loads((larger_tokenizer / "tokenizer_config.json").read_text()) | {"eos_token": "[PAD]"}
    (larger_tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"the token \[PAD\] .* name a token of the vocabulary as 'eos_token'"
    ):
        tune(larger_tokenizer, ROWS, tmp_path / "out2")
