"""Training examples begin with the tokens that the model reads for the prompt at inference."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tercet.data.continuation import continued
from tercet.data.examples import CHATML, prepare, show_mask
from tercet.data.prompt_tokens import conversation_tokens
from tercet.model.tokenizer import Tokenizer

WORDS = ["the colour is blue", "the colour is red", "answer: blue", "answer: red\n\n"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """As GPT-2: a space is joined to the next word."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([*WORDS, "\n\n\n\n"] * 3, trainer)
    return Tokenizer.from_backend(backend, eos="<|endoftext|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """As Llama 2: a space is put before each text, and BOS before that."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [word for text in WORDS for word in text.split(" ")]
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    backend.train_from_iterator(
        [*words, "\n"], trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer.from_backend(backend, eos="</s>", bos="<s>", chat_template=CHATML)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("answer:", " blue"), ("answer: ", "blue"), ("answer: bl", "ue"), ("the colour is  ", "red"),
        ("answer:\n\n", "red"), ("answer:\n", "\nred"), ("", "red"), ("answer: ", " red"),
    ],
)  # fmt: skip
def test_an_example_is_the_prompt_as_at_inference_and_then_the_completion(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> None:
    prepared = prepare([{"prompt": prompt, "completion": completion}], tokenizer, 64)
    [example] = prepared.examples
    before = tokenizer.encode(prompt)  # as `generate` encodes it
    if not prompt and tokenizer.bos_id is not None:
        before = [tokenizer.bos_id]
    ids = example.ids.tolist()
    assert ids[: len(before)] == before
    assert example.supervised.tolist() == [False] * len(before) + [True] * (len(ids) - len(before))
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == prompt + completion
    joint = tokenizer.encode(prompt + completion)
    assert prepared.inside == (ids[:-1] != joint)
    if not prepared.inside:
        assert not any("inside a token" in line for line in prepared.account())


def test_the_account_counts_prompts_that_end_inside_a_token(byte_level: Tokenizer) -> None:
    rows = [{"prompt": f"{n} is the answer: ", "completion": "red"} for n in range(3)]
    account = prepare([*rows, {"prompt": "answer:", "completion": " red"}], byte_level, 64).account()
    assert (
        "3 prompts end inside a token (such as 'the answer: ' before 'red<|endofte'): trained on with the "
        "prompt's own tokens, as at inference" in account
    )


def test_answers_of_a_conversation_follow_the_tokens_of_their_prompt(byte_level: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
        "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_level.with_template(template)
    turns = [
        {"role": "user", "content": "colour"}, {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "colour"}, {"role": "assistant", "content": "red"},
    ]  # fmt: skip
    prepared = prepare([{"messages": turns}], tokenizer, 128)
    assert prepared.inside == 2 and len(prepared.examples) == 2
    for end, example in zip((1, 3), prepared.examples, strict=True):
        before = conversation_tokens(tokenizer, turns[:end])
        assert example.ids.tolist()[: len(before)] == before
        assert show_mask(example, tokenizer)[-1] == (turns[end]["content"] + "<|im_end|>", True)
        assert example.supervised.tolist().index(True) == len(before)


def test_a_conversation_with_whole_tokens_stays_a_single_example(tokenizer: Tokenizer) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "colour"}, {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "colour"}, {"role": "assistant", "content": "red", "weight": 1},
    ]  # fmt: skip
    prepared = prepare([{"messages": turns}], tokenizer, 128)
    assert len(prepared.examples) == 1 and prepared.inside == 0
    turns[1]["weight"] = 0
    prepared = prepare([{"messages": turns, "source": "web"}], tokenizer, 128)
    [example] = prepared.examples
    assert [text for text, on in show_mask(example, tokenizer) if on] == ["red<|im_end|>"]
    assert prepared.account()[1:] == [
        "1 answers are context only, because their rows say so (weight 0)",
        "not used: source (1 rows)",
    ]


def test_fields_of_messages_are_used_if_the_template_names_them(byte_level: Tokenizer) -> None:
    turns = [{"role": "user", "content": "colour", "mood": "glad"}, {"role": "assistant", "content": "red"}]
    assert prepare([{"messages": turns}], byte_level, 64).unused == {"messages.mood": 1}
    shown = byte_level.with_template(
        CHATML.replace("{{ message.content }}", "{{ message.content }}{{ message.mood }}")
    )
    prepared = prepare([{"messages": turns}], shown, 64)
    assert not prepared.unused


def test_variables_of_the_template_come_from_the_row(byte_level: Tokenizer) -> None:
    tokenizer = byte_level.with_template("{{ opening }}" + CHATML)
    turns = [{"role": "user", "content": "colour"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": turns, "chat_template_kwargs": {"opening": "Z"}}]
    [example] = prepare(rows, tokenizer, 64).examples
    assert tokenizer.decode(example.ids.tolist(), skip_special=False).startswith("Z<|im_start|>user")


def test_the_boundary_of_a_text_with_bos_and_eos_added() -> None:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = continued(Tokenizer.from_backend(backend, eos="</s>", bos="<s>"), "a b", 1, special=True)
    assert (tokens.prompt, tokens.continuation, tokens.apart) == ([0, 2], [3], False)
