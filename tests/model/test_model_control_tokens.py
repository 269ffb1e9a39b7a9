"""Control tokens that messages spell are ordinary text, token by token as in transformers."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from tercet.model.control_text import ControlText
from tercet.model.control_tokens import token_pattern
from tercet.model.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from chat_templates import CHATML, LLAMA, MISTRAL, QWEN, byte_tokenizer

WORDS = [
    "the quick brown fox",
    "<|im_start|> <|im_end|> im end start <tool_call>",
    "née café 北京",
    "<s> </s>",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"]
BITS = [
    *SPECIAL,
    "<tool_call>",
    "<think>",
    " hi",
    " ",
    "\n",
    "\n\n",
    "the fox",
    "<|im_",
    "end|>",
    "x",
    "北京",
    "é",
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS * 5, trainer)
    return backend


def metaspace(scheme: str | None, model: str = "bpe") -> Backend:
    """Return SentencePiece's kind of tokenizer, which puts a space before a text."""
    backend = Backend(models.BPE(unk_token="<unk>") if model == "bpe" else models.Unigram())
    if scheme is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace()
    options: dict[str, Any] = {"special_tokens": ["<unk>", *SPECIAL], "show_progress": False}
    if model == "bpe":
        backend.train_from_iterator(WORDS * 5, trainers.BpeTrainer(vocab_size=120, **options))
    else:
        trainer = trainers.UnigramTrainer(vocab_size=100, unk_token="<unk>", **options)
        backend.train_from_iterator(WORDS * 20, trainer)
    return backend


BACKENDS: dict[str, Any] = {
    "byte level": byte_level,
    "first": lambda: metaspace("first"),
    "always": lambda: metaspace("always"),
    "prepend": lambda: metaspace(None),
    "unigram": lambda: metaspace("always", "unigram"),
}
TOOL_CALLS = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}<tool_call>{% endif %}")


@pytest.mark.parametrize("template", [CHATML, TOOL_CALLS], ids=["chatml", "calls"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_the_tokens_are_those_of_transformers(kind: str, template: str, tmp_path: Path) -> None:
    backend = BACKENDS[kind]()
    backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<think>", special=False)])
    ours = Tokenizer.from_backend(backend, eos="</s>", bos="<s>", chat_template=template)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    marks: list[Any] = [ours.id_of(token) for token in SPECIAL]
    draw, compared = random.Random(0), 0

    def talk(*texts: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True)]

    def expected(messages: list[dict[str, str]], **options: Any) -> list[int]:
        ids: list[int] = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **options
        )["input_ids"]
        return ids

    for _ in range(40):
        messages = talk(*("".join(draw.choices(BITS, k=draw.randint(0, 6))) for _ in range(2)))
        ids = ours.encode_chat(messages, add_generation_prompt=True)
        assert [ids.count(mark) for mark in marks] == [expected(talk("", "")).count(mark) for mark in marks]
        try:
            assert ids == expected(messages, sanitize_control_tokens=True), messages
            compared += 1
        except ValueError as problem:  # transformers can't write it as text with this vocabulary
            assert "the tokenizer produces it from plain text" in str(problem)
        control = ours.encode_chat(messages, add_generation_prompt=True, control_tokens="control")
        assert control == expected(messages)
    assert compared > (3 if kind == "unigram" else 20)


def rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> ControlText:
    control = tokenizer.control_tokens()
    return control.unmark(tokenizer.render(control.mark(messages)))


def literal(text: ControlText) -> list[str]:
    return [text[start:end] for start, end in text.literal]


@pytest.mark.parametrize(
    ("template", "turn", "own"),
    [
        (
            QWEN,
            ["<|im_start|>", "<|im_end|>", "</s>", "<tool_response>"],
            ["<think>", "</think>", "<tool_call>"],
        ),
        (LLAMA, ["<|head|>", "<|eot|>", "<s>"], ["<think>", "<tool_call>"]),
        (MISTRAL, ["[INST]", "</s>", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]"], ["[TOOL_CALLS]", "<think>"]),
    ],
)
def test_an_answer_keeps_the_tokens_that_models_write_and_no_mark_of_turns(
    template: str, turn: list[str], own: list[str]
) -> None:
    tokenizer = byte_tokenizer(template)
    content = "a".join([*turn, *own])
    answer = rendered(
        tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    )
    assert literal(answer) == turn
    ids = tokenizer.encode(answer, special=False)
    assert all(tokenizer.id_of(token) in ids for token in own)
    question = rendered(tokenizer, [{"role": "user", "content": "".join(turn)}])
    assert literal(question) == turn


def test_a_user_cannot_write_the_marks_of_calls_and_thoughts() -> None:
    template = QWEN + "{% if thinks %}<think>{% endif %}"
    text = rendered(byte_tokenizer(template), [{"role": "user", "content": "<think><tool_call>"}])
    assert literal(text) == ["<think>", "<tool_call>"]


def test_added_tokens_that_the_template_does_not_write_are_words() -> None:
    tokenizer = byte_tokenizer(CHATML, ("<table>", "\n\n"))
    assert literal(rendered(tokenizer, [{"role": "user", "content": "<table>\n\n"}])) == []
    # A template may put a token together from pieces.
    built = CHATML.replace("<|im_start|>{{ m.role }}", "{{ '<|' + m.role + '|>' }}")
    tokenizer = byte_tokenizer(built, ("<|user|>", "<|critic|>"))
    assert literal(rendered(tokenizer, [{"role": "user", "content": "<|user|><|critic|>"}])) == ["<|user|>"]


def test_parts_that_spell_a_token_together_are_text() -> None:
    parts = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    content = [{"type": "text", "text": text} for text in ("a<|im_", "end|>b")]
    tokenizer = byte_tokenizer(parts)
    text = rendered(tokenizer, [{"role": "user", "content": content}])
    assert literal(text) == ["<|im_end|>"] and "a<|im_end|>b" in text


def test_a_token_that_the_vocabulary_holds_as_a_word_is_written_in_pieces() -> None:
    pieces = ["<unk>", "<s>", "<", "s", ">", "u", "\n", "a"]
    backend = Backend(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    backend.add_special_tokens(["<s>"])
    template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.from_backend(backend, eos="<s>", chat_template=template)
    assert tokenizer.encode_chat([{"role": "user", "content": "a<s>"}]) == [1, 7, 2, 3, 4]


def test_every_character_has_a_token_and_spelled_tokens_have_all_of_theirs() -> None:
    tokenizer = Tokenizer.from_backend(byte_level(), eos="</s>", bos="<s>", chat_template=CHATML)
    text = rendered(tokenizer, [{"role": "user", "content": "née<|im_end|> the\n</s>x"}])
    ids, offsets = tokenizer.encode_with_offsets(text, special=False)
    assert ids == tokenizer.encode(text, special=False) == tokenizer.encode_batch([text], special=False)[0]
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(text)))
    for start, end in text.literal:
        inside = [pair for pair in offsets if pair[0] < end and pair[1] > start]
        assert len(inside) > 1 and set(inside) == {(start, end)}
    assert tokenizer.decode(ids, skip_special=False) == text


def test_the_text_keeps_its_places_when_it_is_copied_and_joined() -> None:
    text = ControlText("a</s>", ((1, 5),))
    for other in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text), text + "</s>"):
        assert isinstance(other, ControlText) and other.literal == ((1, 5),)


def test_a_conversation_without_spelled_tokens_is_encoded_as_before() -> None:
    tokenizer = Tokenizer.from_backend(byte_level(), eos="</s>", bos="<s>", chat_template=CHATML)
    talk = [{"role": "user", "content": "the quick <fox>"}, {"role": "assistant", "content": "née"}]
    assert rendered(tokenizer, talk).literal == ()
    assert tokenizer.encode_chat(talk) == tokenizer.encode(tokenizer.render(talk), special=False)


def test_the_longest_token_is_found_at_each_place() -> None:
    import re

    draw = random.Random(0)
    known = ["ab", "abc", "b", "a", "<|x|>", "<|x|>y", "|>", "(.*)"]
    for _ in range(2000):
        text, tokens = "".join(draw.choices("abc<|x>y(.*)", k=12)), draw.sample(known, draw.randint(1, 8))
        longest = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        assert token_pattern(tokens).findall(text) == longest.findall(text)
    assert token_pattern([]).search("a") is None
