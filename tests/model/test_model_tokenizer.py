"""Tokenizer directories are read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import tiny_checkpoints  # noqa: F401 - keeps transformers off the network
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat, and the dog sat on the cat",
    "Größe, naïve café: 東京 🙂",
    "def f(x): return x + 1234",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["the cat", "  the   cat \n\n ", "", " ", "Größe 東京🙂", "a<|im_end|>b </s>", "12345", "\r\n\tx"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def train(bos: bool = True, trim: bool = False, dropped: str = "") -> tokenizers.Tokenizer:
    """Train a byte-level BPE; with ``bos``, its post-processor begins every text with <s>."""
    backend = tokenizers.Tokenizer(models.BPE())
    if dropped:
        backend.normalizer = normalizers.Replace(dropped, "")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    elif trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def write(
    directory: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, **files: Any
) -> Path:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("bos", [True, False])
def test_ids_equal_those_of_transformers(bos: bool, tmp_path: Path) -> None:
    backend = train(bos)
    backend.enable_truncation(3)  # some checkpoints are saved so; neither library truncates by default
    backend.enable_padding(length=9, pad_id=3, pad_token="<|im_end|>")
    write(
        tmp_path,
        backend,
        {**CLASS, "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}},
    )
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert ours.encode(text) == expected
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(expected, skip) == theirs.decode(expected, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, theirs.pad_token_id) == (0, 1, 3)
    assert ours.vocab_size == len(theirs)


def test_a_saved_tokenizer_keeps_its_split_in_transformers(tmp_path: Path) -> None:
    """Class GPT2Tokenizer of transformers drops the split into single digits, as SmolLM2's has it."""
    backend = train()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    gpt2 = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    ours = Tokenizer.load(write(tmp_path / "theirs", backend, gpt2))
    ours.save(tmp_path / "ours")
    text = "\n\n1. 22 the"
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(text).input_ids == ours.encode(text)
    config = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert config == {**gpt2, **CLASS}


def test_special_tokens_of_every_layout_are_found(tmp_path: Path) -> None:
    new = {**CLASS, "eos_token": "</s>", "extra_special_tokens": ["<tool>"]}
    old = {"eos_token": {"content": "</s>", "lstrip": False}, "additional_special_tokens": ["<tool>"]}
    by_id = {"340": {"content": "<think>", "special": False}, "341": {"content": "<tool>", "special": True}}
    layouts = [
        write(tmp_path / "new", train(), new),
        write(tmp_path / "old", train(), CLASS, special_tokens_map=old),
        write(tmp_path / "ids", train(), {**CLASS, "eos_token": "</s>", "added_tokens_decoder": by_id}),
    ]
    for directory in layouts:
        theirs, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
        text = "the<tool>cat<think></s>"
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )
        assert ours.eos_id == theirs.eos_token_id == 1
        assert {"<s>", "</s>", "<tool>"} <= set(ours.special_tokens)


def test_config_json_names_the_ids_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path, train(), config={"bos_token_id": 0, "eos_token_id": [3, 1]}))
    assert (ours.bos_id, ours.eos_id) == (None, None)  # that was tokenizer_config.json
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": [3, 1], "pad_token_id": 99999}'
    )
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 3, None)
    (tmp_path / "config.json").write_text(
        '{"bos_token_id": false, "eos_token_id": [false], "pad_token_id": 0}'
    )
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, None, 0), "false is no token id"


def test_transformers_reads_a_saved_tokenizer_alike(tmp_path: Path) -> None:
    ours = Tokenizer.from_backend(train(), bos="<s>", eos="</s>", pad="<pad>", chat_template=TEMPLATE)
    ours.templates["tool_use"] = "tools: {{ tools | tojson }}"
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')  # must not make it another tokenizer
    theirs, back = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert [theirs(text).input_ids for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert [back.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
    )
    messages = [{"role": "user", "content": "hi"}]
    assert (
        theirs.apply_chat_template(messages, tokenize=False) == ours.render(messages) == back.render(messages)
    )
    assert theirs.apply_chat_template(messages, tools=[{"a": 1}], tokenize=False) == back.render(
        messages, tools=[{"a": 1}]
    )
    assert back.fingerprint == ours.fingerprint != ours.with_template("x").fingerprint


def test_a_conversation_has_one_bos(tmp_path: Path) -> None:
    ours = Tokenizer.from_backend(train(bos=True), bos="<s>", eos="</s>", chat_template=TEMPLATE)
    ours.save(tmp_path)
    messages = [{"role": "user", "content": "the cat"}]
    ids = ours.encode_chat(messages)
    assert ids.count(ours.bos_id) == 1
    assert ids == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages)["input_ids"]


LEGACY = [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}]


def test_template_files_come_before_the_older_field(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    write(tmp_path, train(), {**CLASS, "chat_template": LEGACY})
    ours = Tokenizer.load(tmp_path)
    assert ours.chat_template == "old" and ours.render(messages, template="rag") == "rag"
    (tmp_path / "chat_template.jinja").write_text("new")
    ours = Tokenizer.load(tmp_path)
    assert ours.templates == {"default": "new"}
    assert ours.render(messages) == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False
    )
    write(tmp_path, train(), {**CLASS, "chat_template": "one"})
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).chat_template == "one"


# Characters and bytes

OFFSETS = {"plain": train(bos=False), "trimmed": train(bos=False, trim=True), "with BOS": train(),
           "dropping": train(bos=False, dropped="a")}  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    text=st.text(st.sampled_from("the cat  \n東京🙂é<|im_end|>"), max_size=20),
    kind=st.sampled_from(sorted(OFFSETS)),
)
def test_offsets_cover_every_character_in_order(text: str, kind: str) -> None:
    tokenizer = Tokenizer.from_backend(OFFSETS[kind], eos="</s>")
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text) and len(offsets) == len(ids)
    if kind == "with BOS":
        assert offsets.pop(0) == (0, 0)
    reached = 0
    for start, end in offsets:
        assert start <= reached <= end <= len(text)
        reached = end
    assert reached == len(text) or not offsets


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=30))
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = Tokenizer.from_backend(OFFSETS["plain"], eos="</s>")
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(index) for index in ids) == text.encode()
    assert sum(tokenizer.byte_length(index) for index in ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_texts_of_single_tokens() -> None:
    tokenizer = Tokenizer.from_backend(train(), eos="</s>")
    eos, space_the = tokenizer.id_of("</s>"), tokenizer.id_of("Ġthe")
    assert eos is not None and space_the is not None
    assert tokenizer.token_text(space_the) == " the" and tokenizer.byte_length(space_the) == 4
    assert tokenizer.token_text(eos) == "</s>" and tokenizer.byte_length(eos) == 0
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.id_of("never") is None


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    vocab = {"<unk>": 0, "▁cat": 1, "<0xF0>": 2, "s": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = Tokenizer.from_backend(backend, eos="</s>")
    assert [tokenizer.token_bytes(index) for index in (1, 2, 3)] == [b" cat", b"\xf0", b"s"]


# Broken directories


def _broken(directory: Path, fault: str) -> None:
    write(directory, train(), CLASS)
    match fault:
        case "none":
            (directory / "tokenizer.json").unlink()
        case "sentencepiece only":
            (directory / "tokenizer.json").rename(directory / "tokenizer.model")
        case "vocab and merges only":
            (directory / "tokenizer.json").rename(directory / "vocab.json")
        case "truncated":
            (directory / "tokenizer.json").write_text((directory / "tokenizer.json").read_text()[:1000])
        case "not a tokenizer":
            (directory / "tokenizer.json").write_text('{"version": "1.0"}')
        case "config a list":
            (directory / "tokenizer_config.json").write_text("[]")
        case "added tokens a list":
            (directory / "tokenizer_config.json").write_text('{"added_tokens_decoder": [1]}')
        case "template a number":
            (directory / "tokenizer_config.json").write_text('{"chat_template": 3}')


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("none", "has no tokenizer.json"),
        ("sentencepiece only", "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"),
        ("vocab and merges only", "vocab.json but no tokenizer.json"),
        ("truncated", "tokenizer.json is not a tokenizer"),
        ("not a tokenizer", "tokenizer.json is not a tokenizer"),
        ("config a list", "tokenizer_config.json holds a list"),
        ("added tokens a list", "'added_tokens_decoder'"),
        ("template a number", "'chat_template'"),
    ],
)
def test_a_broken_tokenizer_gets_one_clear_line(fault: str, named: str, tmp_path: Path) -> None:
    _broken(tmp_path, fault)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_rendering_without_a_template_says_so() -> None:
    tokenizer = Tokenizer.from_backend(train(), eos="</s>")
    with pytest.raises(UserError, match="has no chat template"):
        tokenizer.render([{"role": "user", "content": "hi"}])
    tokenizer.templates["rag"] = "x"
    with pytest.raises(UserError, match="no default chat template; choose one of rag"):
        tokenizer.render([{"role": "user", "content": "hi"}])
