"""A GGUF file holds what llama.cpp needs to compute what transformers computes and encode as we do."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tercet.conversion.export import export
from tercet.errors import UserError
from tercet.model.gguf_tokenizer import SINGLE, TRIPLES, pre_tokenizer_name
from tercet.model.tokenizer import Tokenizer
from tiny_checkpoints import CASES, LONGROPE, YARN, save_random

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

VOCABULARY = 320
ROWS = 384  # of the embedding: 64 more than there are tokens
CORPUS = ["the king said that it's 12 or 1345 of them, and then the thing was there  and\n\nno more"] * 20
TEXTS = [
    "the king said that",
    "it's I'LL we'Re don’t O'Neil",
    "12345 1,000.50 a1b22c333d4444",
    "a  b   c\n\n\n  d\t\te \n \r\n x\r\r\n",
    "  before, after   ",
    "Zoë’s naïve café — 東京 🎉 ½ ² ١٢٣ Ⅷ",
    "x\u00a0y\u3000z\u200be\u0301",
    "<|endoftext|>the<|im_start|>user\n<|im_end|>",
    "!!!???\n\n  foo_bar(baz){}\n\t\treturn",
]
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]


def byte_level(split: Any, bos: bool = False, **model: Any) -> Tokenizer:
    """Return a byte-level BPE of `VOCABULARY` tokens, trained on `CORPUS`; ``split`` precedes the byte encoding."""
    backend = Backend(models.BPE(**model))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, spell])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return Tokenizer.from_backend(backend, bos=END, eos=END, pad=END, chat_template="{{ messages }}")


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.fixture(scope="session")
def ours() -> Tokenizer:
    """Return a tokenizer like that of ``tercet build``, of another size."""
    return byte_level([isolated(SINGLE)])


Write = Callable[..., tuple[Any, Path]]


@pytest.fixture
def checkpoint(tmp_path: Path, ours: Tokenizer) -> Write:
    """``checkpoint("llama", head_dim=16)``: a model of transformers, and its directory with a tokenizer."""

    def write(family: str, tokenizer: Tokenizer = ours, **fields: Any) -> tuple[Any, Path]:
        directory = tmp_path / "model"
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        model = save_random(directory, family, **{"vocab_size": ROWS, **ids, **fields})
        tokenizer.save(directory)
        return model, directory

    return write


def load(path: Path, **options: Any) -> Any:
    """Load the file in llama.cpp, with float32 keys and values, so that only the weights' type matters."""
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False,
        type_k=float32, type_v=float32, flash_attn=False, **options,
    )  # fmt: skip


def logits(model: Any, tokens: list[int]) -> Any:
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


@torch.no_grad()
def theirs(model: Any, tokens: list[int]) -> Any:
    return model(torch.tensor([tokens])).logits[0].float().numpy()


def prompt(length: int = 30) -> list[int]:
    tokens: list[int] = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return tokens


# Features that no graph of llama.cpp has, with a part of the error message.
REFUSED = {
    "llama: gelu": "activation gelu",
    "qwen3: biases": "biases on queries",
    "gemma2: no caps, untied, biases": "biases on queries",
    "gemma2: no windows": "without sliding windows",
    "gpt_neox: no attention bias, linear": "without biases",
    "olmo2: biases, every head its own keys": "biases on queries",
    "smollm3: layer 1 without positions": r"without rotary positions in layers \[1\]",
    "smollm3: windows, biases, interval": "biases on queries",
    "qwen3_moe": "don't sum to 1",
    "qwen3_moe: plain layers, weights sum to one": "biases on queries",
    "qwen3_moe: every second layer, windows": "plain layers",
}
# This case needs a longer context, because contexts of llama.cpp have at least 256 tokens.
WIDER = {
    "phi3: longrope, not longer": {"max_position_embeddings": 512, "original_max_position_embeddings": 300},
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3: yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2: yarn, own attention factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "qwen3: linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "qwen3: more keys than width": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
    "smollm3: every fourth layer without positions": ("smollm3", {"num_hidden_layers": 5}),
    "qwen3_moe: weights sum to one": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma3: six layers, the sixth global": ("gemma3_text", {"sliding_window": 5, "num_hidden_layers": 7}),
    "gemma2: 46 layers, scaled as the 27B is": ("gemma2", {"num_hidden_layers": 46, "sliding_window": 64}),
}
ACCEPTED = {**{name: case for name, case in CASES.items() if name not in REFUSED}, **MORE}


@pytest.mark.parametrize("case", ACCEPTED)
def test_llama_cpp_computes_the_logits_of_transformers(case: str, checkpoint: Write, tmp_path: Path) -> None:
    family, fields = ACCEPTED[case]
    model, directory = checkpoint(family, **{**fields, **WIDER.get(case, {})})
    done = export(str(directory), "gguf", tmp_path / "m.gguf", "f32")
    tokens = prompt()[: done.context_length]
    expected = theirs(model, tokens)
    assert expected.std() > 0.1
    # llama.cpp looks GELU up in a table of float16 values, in every layer.
    exact = model.config.to_dict().get("hidden_act") == "silu"
    precision = 1e-5 if exact else 2e-3 * max(4, model.config.num_hidden_layers)
    actual = logits(load(tmp_path / "m.gguf"), tokens)
    np.testing.assert_allclose(actual, expected, atol=precision * expected.std(), rtol=0)


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_llama_cpp_computes_differently_is_refused(
    case: str, checkpoint: Write, tmp_path: Path
) -> None:
    family, fields = CASES[case]
    _, directory = checkpoint(family, **fields)
    with pytest.raises(UserError, match=REFUSED[case]):
        export(str(directory), "gguf", tmp_path / "m.gguf", check=False)
    assert list(tmp_path.iterdir()) == [directory]


def test_long_factors_of_longrope_beyond_the_first_context(checkpoint: Write, tmp_path: Path) -> None:
    model, directory = checkpoint("phi3", rope_parameters=LONGROPE, max_position_embeddings=512)
    export(str(directory), "gguf", tmp_path / "m.gguf", "f32", check=False)
    actual = logits(load(tmp_path / "m.gguf"), prompt(64))
    np.testing.assert_allclose(actual, theirs(model, prompt(64)), atol=1e-5)


# Types


@pytest.mark.parametrize("type_name", ["f16", "bf16", "q8_0"])
def test_each_type_is_a_rounding_of_the_same_model(type_name: str, checkpoint: Write, tmp_path: Path) -> None:
    """llama.cpp's logits against transformers' with the file's own weights, read back by the gguf package."""
    model, directory = checkpoint("qwen3", head_dim=8, intermediate_size=64, tie_word_embeddings=True)
    export(str(directory), "gguf", tmp_path / "m.gguf", type_name, check=False)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kinds = {tensor.tensor_type.name for name, tensor in stored.items() if "norm" not in name}
    assert kinds == {type_name.upper()}
    assert {tensor.tensor_type.name for name, tensor in stored.items() if "norm" in name} == {"F32"}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored[names.get_name(name.removesuffix(".weight")) + ".weight"]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            error = abs(values.reshape(parameter.shape) - parameter.numpy()).max()
            assert (
                error
                <= float(parameter.abs().max()) * {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 226}[type_name]
            )
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape).copy()))
    expected, actual = theirs(model, prompt()), logits(load(tmp_path / "m.gguf"), prompt())
    # llama.cpp also rounds the matrix's input to the matrix's type.
    precision = {"f16": 5e-3, "bf16": 5e-2, "q8_0": 0.1}[type_name]
    np.testing.assert_allclose(actual, expected, atol=precision * expected.std())


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
@torch.no_grad()
def test_greedy_text_is_that_of_transformers(type_name: str, checkpoint: Write, tmp_path: Path) -> None:
    """The model is trained on one sequence, so that its text does not depend on rounding."""
    model, directory = checkpoint("qwen3", head_dim=16, hidden_size=64, intermediate_size=64)
    sequence = torch.tensor([prompt(40)])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    with torch.enable_grad():
        for _ in range(30):
            optimizer.zero_grad()
            model(sequence, labels=sequence).loss.backward()
            optimizer.step()
    model.save_pretrained(directory)
    export(str(directory), "gguf", tmp_path / "m.gguf", type_name, check=False)
    start = prompt(40)[:3]
    expected = model.generate(torch.tensor([start]), max_new_tokens=30, min_new_tokens=30, do_sample=False)
    theirs = load(tmp_path / "m.gguf").generate(start, temp=0.0, repeat_penalty=1.0)
    assert [next(theirs) for _ in range(30)] == expected[0, 3:].tolist()
    assert len(set(expected[0].tolist())) > 15


def test_columns_that_blocks_of_32_do_not_divide_stay_float16(checkpoint: Write, tmp_path: Path) -> None:
    model, directory = checkpoint("qwen3", head_dim=8)  # the MLP has 48 columns
    done = export(str(directory), "gguf", tmp_path / "m.gguf", "q8_0", check=False)
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name for name, kind in stored.items() if kind == "F16"} == {
        f"blk.{i}.ffn_down.weight" for i in range(3)
    }
    assert stored["blk.0.attn_q.weight"] == stored["token_embd.weight"] == "Q8_0"
    assert done.notes[0].startswith(
        "3 tensors are stored as F16, because blocks of 32 (Q8_0) do not divide their 48"
    )
    expected = theirs(model, prompt())
    actual = logits(load(tmp_path / "m.gguf"), prompt())
    np.testing.assert_allclose(actual, expected, atol=0.15 * expected.std())


def test_values_that_do_not_fit_leave_no_file(checkpoint: Write, tmp_path: Path) -> None:
    model, directory = checkpoint("llama")
    for value, message in ((70_000.0, "beyond float16's range; use `type=bf16`"), (float("nan"), "NaN")):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = value
        model.save_pretrained(directory)
        with pytest.raises(UserError, match=f"blk.1.ffn_up.weight holds .*{message}"):
            export(str(directory), "gguf", tmp_path / "m.gguf", "f16", check=False)
        assert list(tmp_path.iterdir()) == [directory]


def test_memory_is_bounded_by_the_largest_tensor(checkpoint: Write, tmp_path: Path) -> None:
    _, directory = checkpoint("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    largest = 256 * 512 * 4
    for format, name, type_name in (
        ("gguf", "m.gguf", "q8_0"),
        ("gguf", "n.gguf", "f32"),
        ("hf", "hf", "f16"),
    ):
        export(
            str(directory), format, tmp_path / f"warm-{name}", type_name, check=False
        )  # imports are not counted
        tracemalloc.start()
        done = export(str(directory), format, tmp_path / name, type_name, check=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert done.parameters * 4 > 30 * largest
        assert peak < 10 * largest


# Tokenizers

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS_OF_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL: dict[str, tuple[str, Callable[[], Tokenizer]]] = {
    "single digits": ("qwen2", lambda: byte_level([isolated(SINGLE)])),
    "up to three digits": ("dbrx", lambda: byte_level([isolated(TRIPLES)])),
    "Llama 3's": ("llama-bpe", lambda: byte_level([isolated(TRIPLES)], bos=True, ignore_merges=True)),
    "GPT-2's, as a pattern": ("gpt-2", lambda: byte_level([isolated(GPT2_WORDS)])),
    "SmolLM's": ("smollm", lambda: byte_level([pre_tokenizers.Digits(individual_digits=True), isolated(GPT2_WORDS)])),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_llama_cpp_encodes_and_decodes_as_tercet_does(name: str, checkpoint: Write, tmp_path: Path) -> None:
    pre, build = BYTE_LEVEL[name]
    tokenizer = build()
    _, directory = checkpoint("llama", tokenizer)
    assert export(str(directory), "gguf", tmp_path / "m.gguf", check=False).tokenizer == pre
    model = load(tmp_path / "m.gguf", vocab_only=True)
    for text in TEXTS:
        expected = tokenizer.encode(text)
        assert model.tokenize(text.encode(), add_bos=True, special=True) == expected
        assert model.detokenize(expected, special=True).decode() == tokenizer.decode(
            expected, skip_special=False
        )
    assert any(index >= 256 + len(SPECIAL) for index in tokenizer.encode(TEXTS[0]))  # there are merges


def random_text(seed: int) -> str:
    """Return characters of many kinds, in runs so short that every two kinds are adjacent somewhere."""
    generator = random.Random(seed)
    kinds = ["aZé", "ßЖ中あ", "0١½Ⅷ", " ", "\t\u00a0\u3000", "\r\n", ".,'’-_/", "🎉€\u0301\u200d", "'s'LL"]
    return "".join(
        "".join(generator.choices(generator.choice(kinds), k=generator.randint(1, 4))) for _ in range(2000)
    )


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_random_text_gets_the_same_tokens(name: str, checkpoint: Write, tmp_path: Path) -> None:
    tokenizer = BYTE_LEVEL[name][1]()
    _, directory = checkpoint("llama", tokenizer)
    export(str(directory), "gguf", tmp_path / "m.gguf", check=False)
    model = load(tmp_path / "m.gguf", vocab_only=True)
    for seed in range(5):
        text = random_text(seed)
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)


def test_gpt2s_own_pre_tokenizer_is_its_pattern() -> None:
    assert pre_tokenizer_name(json.loads(WORDS_OF_GPT2.__getstate__()), False) == "gpt-2"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (SINGLE.replace(r"|\p{N}|", r"|\p{N}{1,2}|"), "splits numbers into pairs"),
        (SINGLE.replace(r"|\p{N}|", r"|\p{N}+|"), "does not split numbers"),
        (r"\w+|\W", r"no pre-tokenizer that splits words as this tokenizer does: \\w"),
    ],
)
def test_a_split_that_llama_cpp_does_not_know_is_refused(
    pattern: str, message: str, checkpoint: Write, tmp_path: Path
) -> None:
    _, directory = checkpoint("llama", byte_level([isolated(pattern)]))
    with pytest.raises(UserError, match=message):
        export(str(directory), "gguf", tmp_path / "m.gguf", check=False)


def sentencepiece() -> Tokenizer:
    """A tokenizer.json as Llama 2's was made of its SentencePiece model: every pair that is a token, by rank."""
    texts = [
        "\u2581t",
        "he",
        "\u2581the",
        "in",
        "ing",
        "\u2581k",
        "\u2581king",
        "th",
        "at",
        "\u2581\u2581",
        "12",
    ]
    letters = sorted(set("".join(CORPUS).replace(" ", "\u2581").replace("\n", "")))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *texts, *letters]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in texts
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer.from_backend(backend, bos="<s>", eos="</s>", pad="<unk>")


def test_sentencepiece_tokens_are_those_of_llama_cpp(checkpoint: Write, tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    _, directory = checkpoint("llama", tokenizer)
    export(str(directory), "gguf", tmp_path / "m.gguf", check=False)
    model = load(tmp_path / "m.gguf", vocab_only=True)
    for text in (*(text for text in TEXTS if "<|" not in text), random_text(0)):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)


def test_a_bpe_whose_merges_scores_cannot_express_is_refused(checkpoint: Write, tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    content = json.loads(tokenizer.backend.to_str())
    content["model"]["merges"].remove(["h", "e"])
    broken = Tokenizer.from_backend(Backend.from_str(json.dumps(content)), bos="<s>", eos="</s>")
    _, directory = checkpoint("llama", broken)
    with pytest.raises(UserError, match="'h' and 'e' have no merge"):
        export(str(directory), "gguf", tmp_path / "m.gguf", check=False)


def test_end_tokens_and_the_chat_template_are_exported(
    checkpoint: Write, tmp_path: Path, ours: Tokenizer
) -> None:
    _, directory = checkpoint("qwen3", head_dim=8)
    stop = ours.id_of("<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop]}))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ours.with_template(template).save(directory)
    export(str(directory), "gguf", tmp_path / "m.gguf", check=False)
    model = load(tmp_path / "m.gguf", vocab_only=True)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    ends = [index for index in range(ROWS) if llama_cpp.llama_vocab_is_eog(vocabulary, index)]
    assert ends == [0, stop]
    assert (model.token_bos(), model.token_eos()) == (0, 0)
    assert not llama_cpp.llama_vocab_get_add_bos(vocabulary)
    assert model.metadata["tokenizer.chat_template"] == template
    assert model.metadata["general.name"] == directory.parent.name  # "model" itself says nothing
    assert model.metadata["qwen3.context_length"] == "64"


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    checkpoint: Write, tmp_path: Path, ours: Tokenizer
) -> None:
    _, directory = checkpoint("llama", vocab_size=ours.vocab_size - 1)
    with pytest.raises(
        UserError,
        match=f"{ours.vocab_size} tokens, but the model's embedding has only {ours.vocab_size - 1} rows",
    ):
        export(str(directory), "gguf", tmp_path / "m.gguf", check=False)
