"""Tokenizers read from GGUF files: equal to the tokenizer.json they were made of, and to llama.cpp's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from gguf_files import copy, exported
from real_models import gemma_gguf, smollm2_gguf
from tercet.errors import UserError
from tercet.model.checkpoint import read_stop_ids
from tercet.model.gguf_directory import gguf_directory
from tercet.model.gguf_splits import SPLITS
from tercet.model.gguf_tokenizer import SINGLE, TRIPLES
from tercet.model.tokenizer import Tokenizer
from tiny_tokenizers import END, byte_level, isolated, sentencepiece

ARRAY, STRING, BOOL, UINT32 = (
    gguf.GGUFValueType.ARRAY,
    gguf.GGUFValueType.STRING,
    gguf.GGUFValueType.BOOL,
    gguf.GGUFValueType.UINT32,
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "",
    "the king said that",
    "it's I'LL we'Re don’t O'Neil",
    "12345 1,000.50 a1b22c333d4444\n\n1. x",
    "a  b   c\n\n\n  d\t\te \n \r\n x\r\r\n",
    "  before, after   ",
    "Zoë’s naïve café — 東京 🎉 ½ ² ١٢٣ Ⅷ",
    "x\u00a0y\u3000z\u200be\u0301",
    "<|endoftext|>the<|im_start|>user\n<|im_end|>  <s> king</s> ▁the",
    "!!!???\n\n  foo_bar(baz){}\n\t\treturn",
]


def random_text(seed: int) -> str:
    """Return characters of many kinds, in runs so short that every two kinds are adjacent somewhere."""
    generator = random.Random(seed)
    kinds = ["aZé", "ßЖ中あ", "0١½Ⅷ", " ", "\t\u00a0\u3000", "\r\n", ".,'’-_/", "🎉€", "'s'LL"]
    return "".join(
        "".join(generator.choices(generator.choice(kinds), k=generator.randint(1, 4))) for _ in range(1000)
    )


def theirs(path: Path) -> Callable[[str], list[int]]:
    """Return llama.cpp's encoder of a file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: list(model.tokenize(text.encode(), add_bos=True, special=True))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), isolated(GPT2_WORDS)),
    "qwen2": lambda: byte_level(isolated(SINGLE)),
    "dbrx": lambda: byte_level(isolated(TRIPLES)),
    "llama-bpe": lambda: byte_level(isolated(TRIPLES), bos=True, ignore_merges=True),
    "sentencepiece": lambda: sentencepiece(),
    "sentencepiece without prefix": lambda: sentencepiece(prefix=False),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """Return a tokenizer and a GGUF file with it."""
    tokenizer = KINDS[request.param]()
    _, path = exported(
        tmp_path_factory.mktemp("vocabulary"), "llama", tokenizer=tokenizer, num_hidden_layers=1
    )
    return tokenizer, path


def test_tokens_are_those_of_the_original_tokenizer(pair: tuple[Tokenizer, Path]) -> None:
    original, path = pair
    tokenizer = Tokenizer.load(gguf_directory(path))
    for text in (*TEXTS, random_text(0), random_text(1)):
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special=False)
        assert tokenizer.decode(ids) == original.decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        original.bos_id,
        original.eos_id,
        original.pad_id,
    )
    assert tokenizer.special_tokens == original.special_tokens
    assert tokenizer.templates == original.templates


def test_tokens_are_those_of_llama_cpp(pair: tuple[Tokenizer, Path]) -> None:
    _, path = pair
    encode = theirs(path)
    tokenizer = Tokenizer.load(gguf_directory(path))
    for text in (*TEXTS, random_text(2), random_text(3)):
        assert tokenizer.encode(text) == encode(text)


def test_transformers_reads_the_same_tokenizer(pair: tuple[Tokenizer, Path]) -> None:
    import transformers

    original, path = pair
    loaded = transformers.AutoTokenizer.from_pretrained(gguf_directory(path))
    for text in (*TEXTS[1:], random_text(4)):
        assert loaded(text)["input_ids"] == original.encode(text)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("words"), "llama", tokenizer=byte_level(), num_hidden_layers=1)[1]


@pytest.fixture(scope="module")
def anywhere(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file whose merges cross every border of words, so that the tokens show where text is split."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    texts = [random_text(seed) for seed in range(20)]
    backend.train_from_iterator(
        [text[at : at + 8] for text in texts for at in range(0, len(text), 4)], trainer
    )
    model = json.loads(backend.to_str())["model"]
    changes = {
        "tokenizer.ggml.tokens": (list(model["vocab"]), ARRAY),
        "tokenizer.ggml.merges": ([" ".join(merge) for merge in model["merges"]], ARRAY),
        "tokenizer.ggml.token_type": ([1] * 384, ARRAY),
    }
    return copy(words, tmp_path_factory.mktemp("anywhere") / "a.gguf", changes)


@pytest.mark.parametrize("name", SPLITS)
def test_every_splitter_is_llama_cpps(name: str, anywhere: Path, tmp_path: Path) -> None:
    """Where llama.cpp only approximates a tokenizer's own pattern, the text avoids the difference."""
    path = copy(anywhere, tmp_path / "b.gguf", {"tokenizer.ggml.pre": (name, STRING)})
    encode, tokenizer = theirs(path), Tokenizer.load(gguf_directory(path))
    # Ideographic spaces are no spaces for its splitter of DeepSeek, and cased letters beyond ASCII have no case.
    left_out = "\u3000éßЖ" if name in ("tekken", "gpt-4o", "llama4", "kanana2") else "\u3000"
    removed = str.maketrans("", "", left_out)
    for text in (TEXTS[1], TEXTS[3], TEXTS[9], *(random_text(seed) for seed in range(30, 34))):
        text = text.translate(removed)
        assert tokenizer.encode(text) == encode(text)


def test_single_digits_are_split_before_words(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "llama", tokenizer=KINDS["smollm"](), num_hidden_layers=1)
    directory = gguf_directory(path)
    content = json.loads((directory / "tokenizer.json").read_text())
    assert [step["type"] for step in content["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    pieces = Tokenizer.load(directory).backend.pre_tokenizer.pre_tokenize_str("\n\n12. ")
    assert [piece for piece, _ in pieces] == ["ĊĊ", "1", "2", ".", "Ġ"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.pre": ("my-own", STRING)},
            "splits words by 'my-own' .* is not known; known are gpt-2, ",
        ),
        ({"tokenizer.ggml.pre": ("default", STRING)}, "does not say how .* is 'default'"),
        ({"tokenizer.ggml.pre": None}, "does not say how its tokenizer splits words .* is missing"),
        (
            {"tokenizer.ggml.model": ("bert", STRING)},
            "a tokenizer of kind 'bert' .* supported are gpt2 and llama",
        ),
        ({"tokenizer.ggml.model": None}, "the metadata has no 'tokenizer.ggml.model'"),
        ({"tokenizer.ggml.merges": None}, "has no merges"),
        ({"tokenizer.ggml.merges": (["a 中"], ARRAY)}, "merge 0, 'a 中', names a token that does not exist"),
        ({"tokenizer.ggml.token_type": ([1, 1], ARRAY)}, "384 tokens and 2 types"),
        ({"tokenizer.ggml.tokens": (["a"] * 384, ARRAY)}, "token 'a' occurs twice"),
        ({"tokenizer.ggml.tokens": ([1, 2], ARRAY)}, "must be an array of str"),
        ({"tokenizer.ggml.add_bos_token": (1, UINT32)}, "must be a boolean"),
        ({"tokenizer.chat_template.../../x": ("a", STRING)}, "is no name of a chat template"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(
    changes: dict[str, Any], message: str, words: Path, tmp_path: Path
) -> None:
    path = copy(words, tmp_path / "b.gguf", changes)
    with pytest.raises(UserError, match=message) as caught:
        gguf_directory(path)
    assert "\n" not in str(caught.value)


def test_scores_are_required(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "llama", tokenizer=sentencepiece(), num_hidden_layers=1)
    with pytest.raises(UserError, match="has no score for each token"):
        gguf_directory(copy(path, tmp_path / "b.gguf", {"tokenizer.ggml.scores": None}))


@pytest.mark.parametrize(
    ("texts", "keys"),
    [
        ({}, {}),
        ({5: "</s>", 9: "<|end|>", 12: "<reponame>"}, {}),
        ({5: "<|end|>", 6: "<|return|>", 7: "<|call|>"}, {}),
        ({5: "<|fim_pad|>", 6: "<|file_sep|>", 8: "<end_of_turn>"}, {"eot_token_id": 8, "eom_token_id": 11}),
        ({5: "<|fim_pad|>", 6: "<PAD>"}, {"fim_pad_token_id": 20, "eos_token_id": 300}),
    ],
)
def test_what_ends_a_generation_is_what_ends_it_in_llama_cpp(
    texts: dict[int, str], keys: dict[str, int], words: Path, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokens = gguf.GGUFReader(words).fields["tokenizer.ggml.tokens"].contents()
    for index, token in texts.items():
        tokens[index] = token
    changes: dict[str, Any] = {f"tokenizer.ggml.{name}": (index, UINT32) for name, index in keys.items()}
    merges = gguf.GGUFReader(words).fields["tokenizer.ggml.merges"].contents()
    merges = [
        merge
        for merge in merges
        if all(part in tokens for part in (*merge.split(" "), merge.replace(" ", "")))
    ]
    changes |= {"tokenizer.ggml.tokens": (tokens, ARRAY), "tokenizer.ggml.merges": (merges, ARRAY)}
    path = copy(words, tmp_path / "b.gguf", changes)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    expected = {index for index in range(384) if llama_cpp.llama_vocab_is_eog(vocabulary, index)}
    ends = read_stop_ids(gguf_directory(path))
    assert set(ends) == expected
    assert ends[0] == keys.get("eos_token_id", 0)


def test_templates_by_name_are_kept(words: Path, tmp_path: Path) -> None:
    changes = {
        "tokenizer.chat_template": ("{{ 1 }}", STRING),
        "tokenizer.chat_template.tool_use": ("{{ 2 }}", STRING),
    }
    path = copy(words, tmp_path / "b.gguf", changes)
    assert Tokenizer.load(gguf_directory(path)).templates == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


def test_bos_and_eos_are_put_around_a_text_as_the_file_says(words: Path, tmp_path: Path) -> None:
    for bos in (False, True):
        for eos in (False, True):
            flags = {"tokenizer.ggml.add_bos_token": (bos, BOOL), "tokenizer.ggml.add_eos_token": (eos, BOOL)}
            tokenizer = Tokenizer.load(gguf_directory(copy(words, tmp_path / f"{bos}{eos}.gguf", flags)))
            plain = tokenizer.encode("the king", special=False)
            end = tokenizer.id_of(END)
            assert tokenizer.encode("the king") == [*([end] if bos else []), *plain, *([end] if eos else [])]


def test_tokens_of_phi3_take_the_spaces_behind_them(words: Path, tmp_path: Path) -> None:
    path = copy(words, tmp_path / "b.gguf", {"general.name": ("Phi-3 mini", STRING)})
    tokenizer = Tokenizer.load(gguf_directory(path))
    assert tokenizer.encode("<|im_end|>  \n the") == tokenizer.encode("<|im_end|>the")
    assert tokenizer.encode("<|endoftext|> the") != tokenizer.encode("<|endoftext|>the")


def test_a_tokenizer_beside_the_file_that_disagrees_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, path = exported(tmp_path, "llama", tokenizer=KINDS["smollm"](), num_hidden_layers=1)
    tokenizer = Tokenizer.load(checkpoint)
    tokenizer.save(tmp_path)
    directory = gguf_directory(path)
    assert "disagrees" not in capsys.readouterr().err
    byte_level().save(tmp_path)
    path = path.rename(tmp_path / "other.gguf")
    assert Tokenizer.load(gguf_directory(path)).encode("12") == Tokenizer.load(directory).encode("12")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "disagrees" in line]
    assert "tokenizer.json disagrees with other.gguf: it encodes" in line


@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma", marks=pytest.mark.long)])
def test_real_vocabularies(name: str) -> None:
    """Expected ids and ends are llama.cpp's, seen with llama-cpp-python 0.3.36."""
    path = smollm2_gguf() if name == "smollm2" else gemma_gguf()
    directory = gguf_directory(path)
    tokenizer = Tokenizer.load(directory)
    ends, text = (2, 0, 4), {"\n\n1. ": [1116, 33, 30, 216]}
    if name == "gemma":
        ends, text = (1, 106, 212), {"\n\n1. the": [2, 108, 236770, 236761, 506]}
    assert read_stop_ids(directory) == ends
    for value, ids in text.items():
        assert tokenizer.encode(value) == ids
    encode = theirs(path)
    for value in (*TEXTS, random_text(6)):
        assert tokenizer.encode(value) == encode(value)
