from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.text import TextStream, TokenBytes
from tercet.model.tokenizer import Tokenizer

# Few letters, so that stop strings occur; characters of one to four bytes.
letters = st.sampled_from("ab é日🦊")
texts = st.text(letters, max_size=20)
stops = st.lists(st.text(letters, min_size=1, max_size=4), max_size=3)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def before_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read until the text ends with a stop string; cut the longest such string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(derandomize=True, max_examples=500)
@given(texts, st.lists(st.integers(0, 100), max_size=12), stops)
def test_any_division_into_tokens_gives_the_text_before_the_first_stop(
    text: str, places: list[int], stops: list[str]
) -> None:
    expected, stopped = before_first_stop(text, stops)
    stream = TextStream(stops)
    pieces = []
    for data in cut(text.encode(), places):
        pieces.append(stream.push(data))
        assert expected.startswith("".join(pieces)), "a part of a stop string or of a character leaked"
    assert stream.stopped == stopped
    pieces.append(stream.finish())
    assert "".join(pieces) == expected


@settings(derandomize=True, max_examples=300)
@given(st.lists(st.binary(max_size=5), max_size=8))
def test_invalid_bytes_become_the_same_as_in_bytes_decode(tokens: list[bytes]) -> None:
    stream = TextStream()
    text = "".join(stream.push(data) for data in tokens) + stream.finish()
    assert text == b"".join(tokens).decode("utf-8", errors="replace")


def test_text_comes_as_soon_as_it_cannot_be_a_stop() -> None:
    stream = TextStream(["\n\nQ:"])
    assert stream.push(b"yes\n") == "yes"
    assert stream.push(b"\n") == ""
    assert stream.push(b"no") == "\n\nno"
    assert stream.push(b"\n\n") == ""
    assert stream.finish() == "\n\n", "text that was held back is released at the end"


def test_a_stop_that_ends_within_a_token_and_a_character_that_spans_two() -> None:
    stream = TextStream(["é!"])
    assert stream.push(b"caf" + "é".encode()[:1]) == "caf"
    assert stream.push("é".encode()[1:]) == ""
    assert stream.push(b"! more") == ""
    assert stream.stopped
    assert stream.push(b"ignored") == "" and stream.finish() == ""


def test_a_character_cut_off_by_the_end_is_one_replacement() -> None:
    stream = TextStream()
    assert stream.push(b"a" + "🦊".encode()[:3]) == "a"
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@settings(derandomize=True, max_examples=200)
@given(data=st.data())
def test_streamed_text_continues_the_prompt_as_the_tokenizer_decodes_it(
    name: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    bytes_of = TokenBytes(tokenizer)
    words = st.text(st.sampled_from("the fox é日🦊 "), max_size=12)
    prompt, output = data.draw(words), data.draw(words)
    ids = tokenizer.encode(prompt + output)
    split = data.draw(st.integers(0, len(ids)))
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:split])
    if before.endswith("\ufffd") or not whole.startswith(before):
        return  # a prompt that ends within a character has no text of its own
    stream, first, text = TextStream(), not bytes_of.visible(ids[:split]), ""
    for token in ids[split:]:
        piece = bytes_of(token, first=first)
        first = first and not bytes_of.visible([token])
        text += stream.push(piece)
    assert text + stream.finish() == whole[len(before) :]


def test_a_leading_space_stays_after_a_prompt_and_goes_at_the_beginning(sentencepiece: Tokenizer) -> None:
    fox = sentencepiece.id_of("▁the")
    assert fox is not None
    bytes_of = TokenBytes(sentencepiece)
    assert bytes_of(fox) == b" the"
    assert bytes_of(fox, first=True) == b"the"


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_every_byte_has_a_token_that_writes_it(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    bytes_of = TokenBytes(tokenizer)
    for text in ("🦊", "日", "é", "\n", "\x00"):
        ids = tokenizer.encode("a" + text, special=False)
        assert b"".join(bytes_of(token) for token in ids).endswith(text.encode())


def test_special_and_unknown_tokens_add_nothing(sentencepiece: Tokenizer) -> None:
    bytes_of = TokenBytes(sentencepiece)
    assert sentencepiece.bos_id is not None
    assert bytes_of(sentencepiece.bos_id) == b"" and bytes_of(sentencepiece.vocab_size + 7) == b""
    assert not bytes_of.visible([sentencepiece.bos_id])
    assert bytes_of.text(sentencepiece.bos_id) == "<s>", "its name is shown where a token is listed"
