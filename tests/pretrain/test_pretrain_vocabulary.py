"""The tokenizer that a build trains: lossless, split as configured, compared by bytes per token."""

from typing import Any

import pytest
from toy_text import text_of

from tercet.pretrain.vocabulary import bytes_per_token, train_tokenizer


def test_the_tokenizer_is_lossless_and_splits_digits() -> None:
    tokenizer = train_tokenizer([text_of(seed) for seed in range(50)] + ["1234567890 " * 50], 320)
    for text in ("hello world", "  spaces\n\n\ttabs", "naïve 北京 🙂 \x00", "a1234b", "don't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234")] == list("1234")


@pytest.mark.parametrize("digits", ["one", "three", "all"])
@pytest.mark.parametrize("whitespace", ["word", "apart"])
def test_words_are_split_as_configured(digits: Any, whitespace: Any) -> None:
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


def test_compression_is_bytes_over_tokens() -> None:
    tokenizer = train_tokenizer(["ab " * 500], 262)
    texts = ["ab ab", "é"]
    # ab and Ġab, or merges of them; é has two bytes.
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert bytes_per_token(tokenizer, texts) == 7 / tokens
