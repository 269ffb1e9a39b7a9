"""Write documents to disk as streams of tokens: the tokenizer, the training part, the held-out part.

Texts are kept in a file while the parts are chosen and the tokenizer is trained, so memory does not grow
with the corpus.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tercet.data.decontaminate import Decontaminator
from tercet.data.document import Document
from tercet.errors import UserError
from tercet.files import atomic_directory, read_json, write_json
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.settings import Digits, Whitespace
from tercet.pretrain.spool import Spool
from tercet.pretrain.vocabulary import RAREST_MERGE, train_tokenizer
from tercet.progress import Progress, say

TOKENIZER_SAMPLE = 20_000_000  # bytes that a tokenizer is trained on; more text hardly changes the merges
HELDOUT_SHARE = 0.01  # of the characters
MIN_CHARACTERS = 20_000  # of a corpus
MIN_HELDOUT_TEXTS = 10  # with fewer whole texts, the measurement would depend on which were chosen
MIN_PASSAGE = 500  # characters held out of a text, on average
# The tokenizers library uses a hundred bytes for each token that it encodes in one call, so long texts are
# encoded in pieces.
ENCODED_AT_ONCE, PIECE = 1_000_000, 100_000  # characters
# Places that no word of `word_pattern` spans: before a line that begins with no white space, and before a
# space between two letters or digits.
_WORD_BEGINS = re.compile(r"(?<=\n)(?=\S)|(?<=[^\W_])(?= [^\W_])")


@dataclass(frozen=True)
class Corpus:
    """The sizes of the parts of a corpus. Bytes are of UTF-8 text."""

    documents: int
    bytes: int
    tokens: int
    heldout_documents: int
    heldout_bytes: int
    heldout_tokens: int
    vocab_size: int
    complete: bool  # False: reading stopped when there was enough text for the budget
    decontamination: dict[str, Any] | None

    @property
    def bytes_per_token(self) -> float:
        """The compression of the training part by its tokenizer."""
        return self.bytes / max(1, self.tokens)


@dataclass(frozen=True)
class Split:
    """The held-out part of a spool: whole texts, or a passage of each of some texts.

    Attributes:
        texts: The indices of the texts that are held out whole.
        passages: Begin and end of the held-out passage, in characters, by the index of the text.
    """

    texts: frozenset[int]
    passages: Mapping[int, tuple[int, int]]

    def train(self, spool: Spool) -> Iterator[tuple[int, str]]:
        """Yield the training texts with their indices; the parts before and after a passage separately."""
        for index in range(len(spool)):
            if index in self.passages:
                begin, end = self.passages[index]
                text = spool[index]
                yield from ((index, part) for part in (text[:begin], text[end:]) if part.strip())
            elif index not in self.texts:
                yield index, spool[index]

    def heldout(self, spool: Spool) -> Iterator[tuple[int, str]]:
        """Yield the held-out texts with their indices."""
        for index in sorted(self.texts):
            yield index, spool[index]
        for index in sorted(self.passages):
            begin, end = self.passages[index]
            yield index, spool[index][begin:end]


def split(spool: Spool, share: float = HELDOUT_SHARE) -> Split:
    """Choose what is held out of ``spool``.

    The texts with the lowest content hashes are held out, until they make up ``share`` of the characters,
    but at least a few thousand characters and at most twice the share. So a document that is added moves few
    others. Where that gives fewer than `MIN_HELDOUT_TEXTS` texts (of a dozen books, say), a passage of each
    text is held out instead, so that the measurement does not depend on a single text. The hash also
    chooses the passage's place, because texts often end alike, with a licence for example.
    """
    total = sum(spool.lengths)
    target = max(share * total, min(20_000, 0.1 * total))
    texts: set[int] = set()
    characters = 0
    for index in sorted(range(len(spool)), key=spool.digest):
        if characters >= target:
            break
        if characters + spool.lengths[index] <= 2 * target:
            texts.add(index)
            characters += spool.lengths[index]
    if len(texts) >= MIN_HELDOUT_TEXTS:
        return Split(frozenset(texts), {})
    # A passage of a very short text says nothing, so only the longest texts are used.
    count = min(len(spool), max(1, int(target / MIN_PASSAGE)))
    longest = sorted(range(len(spool)), key=spool.lengths.__getitem__, reverse=True)[:count]
    part = target / max(1, sum(spool.lengths[index] for index in longest))
    passages = {index: _passage(spool, index, int(part * spool.lengths[index])) for index in longest}
    return Split(
        frozenset(), {index: (begin, end) for index, (begin, end) in passages.items() if begin < end}
    )


def _passage(spool: Spool, index: int, length: int) -> tuple[int, int]:
    """Return begin and end of about ``length`` characters of a text, moved to the ends of nearby lines."""
    text = spool[index]
    latest = max(0, len(text) - length)
    place = int.from_bytes(spool.digest(index)[8:], "big") % (latest + 1)

    def next_line(near: int) -> int:
        newline = text.find("\n", near, near + length // 4)
        return near if newline < 0 else newline + 1

    begin = next_line(place) if place else 0
    end = min(begin + length, len(text))
    return begin, end if end == len(text) else next_line(end)


def gather(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Yield documents until their text reaches ``limit`` bytes.

    A document that is far longer than the bytes left is cut.
    """
    total = 0
    with Progress("reading the corpus", limit, "bytes") as bar:
        for document in documents:
            left = limit - total
            if len(document.text) > left + PIECE:
                document = replace(document, text=document.text[: _cut(document.text, left)])
            yield document
            size = len(document.text.encode("utf-8"))
            total += size
            bar.advance(size)
            if total >= limit:
                return


_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: its multiples spread evenly (Knuth, section 6.4)


def _tokenizer_sample(spool: Spool, parts: Split) -> Iterator[str]:
    """Yield training texts of about `TOKENIZER_SAMPLE` bytes, from everywhere in the corpus."""
    share = TOKENIZER_SAMPLE / max(1, spool.total_bytes)
    # Chosen by content hash, so no source is favoured. High hashes, since low ones are held out.
    threshold = int(max(0.0, 1 - share) * 2**64)
    for index, text in parts.train(spool):
        draw = int.from_bytes(spool.digest(index)[:8], "big")
        for piece in pieces(text):
            if draw >= threshold:
                yield piece
            draw = (draw + _GOLDEN) % 2**64  # each piece of a long text is drawn on its own


def prepare_corpus(
    documents: Iterable[Document],
    directory: Path,
    *,
    planned_vocabulary: int,
    limit: int,
    vocab_size: int | None = None,
    digits: Digits = "one",
    whitespace: Whitespace = "word",
    decontaminator: Decontaminator | None = None,
    vocabulary: Sequence[str] = (),
    key: str,
) -> Corpus:
    """Write ``directory`` with `train.bin`, `heldout.bin` (16- or 32-bit ids) and `tokenizer/`.

    Returns at once when the directory already holds the corpus of the same ``key``.

    Args:
        documents: The raw text.
        directory: Where the corpus is written.
        planned_vocabulary: Tokens in the vocabulary, if so many occur often enough (`RAREST_MERGE`).
        limit: Bytes of text that are read.
        vocab_size: Tokens in the vocabulary, however rare; None: ``planned_vocabulary``.
        digits: As `tercet.pretrain.vocabulary.word_pattern` takes it.
        whitespace: As `tercet.pretrain.vocabulary.word_pattern` takes it.
        decontaminator: Removes test texts from the documents.
        vocabulary: Texts that only the tokenizer is trained on, not the network.
        key: A fingerprint of everything that decides the corpus.

    Raises:
        UserError: There is too little text, or the directory holds another corpus.
    """
    done = directory / "corpus.json"
    if done.is_file():
        stored = read_json(done)
        if stored.pop("key", None) != key:
            raise UserError(f"{directory} holds another corpus; choose another `out` or delete it")
        return Corpus(**stored)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with Spool(directory.parent / "texts.tmp") as spool:
        complete = _fill(spool, documents, limit, decontaminator)
        parts = split(spool)
        tokenizer = train_tokenizer(
            chain(vocabulary, _tokenizer_sample(spool, parts)),
            vocab_size or planned_vocabulary,
            digits=digits,
            whitespace=whitespace,
            rarest=0 if vocab_size else RAREST_MERGE,
        )
        with atomic_directory(directory) as temporary:
            train = _write_part(temporary, "train", tokenizer, parts.train(spool), spool)
            held_out = _write_part(temporary, "heldout", tokenizer, parts.heldout(spool), spool)
            write_json(temporary / "sources.json", spool.names)
            tokenizer.save(temporary / "tokenizer")
            corpus = Corpus(
                documents=train.documents,
                bytes=train.bytes,
                tokens=train.tokens,
                heldout_documents=held_out.documents,
                heldout_bytes=held_out.bytes,
                heldout_tokens=held_out.tokens,
                vocab_size=tokenizer.vocab_size,
                complete=complete,
                decontamination=decontaminator.summary() if decontaminator is not None else None,
            )
            write_json(temporary / "corpus.json", {**asdict(corpus), "key": key})
    return corpus


def _fill(
    spool: Spool, documents: Iterable[Document], limit: int, decontaminator: Decontaminator | None
) -> bool:
    """Write the decontaminated documents to ``spool`` and return whether all of them were read.

    Raises:
        UserError: There is too little text.
    """
    read = 0
    for document in gather(documents, limit):
        read += len(document.text.encode())
        cleaned: Document | None = document
        if decontaminator is not None:
            cleaned, _ = decontaminator.clean(document)
        if cleaned is not None and cleaned.text.strip():
            spool.append(cleaned.text, document.source)
    if read >= limit:
        say(f"read {read / 1e6:.1f} MB, enough for the budget; the rest of the text was not read")
    characters = sum(spool.lengths)
    if characters < MIN_CHARACTERS:
        raise UserError(
            f"the corpus has {characters:,} characters; a build needs at least {MIN_CHARACTERS:,} "
            f"(readable sentences need about a million)"
        )
    return read < limit


@dataclass(frozen=True)
class _Part:
    """The size of a part of the corpus."""

    documents: int
    bytes: int
    tokens: int


def _write_part(
    directory: Path, name: str, tokenizer: Tokenizer, texts: Iterable[tuple[int, str]], spool: Spool
) -> _Part:
    """Write NAME.bin, NAME.starts.npy and NAME.sources.npy."""
    sources, documents, total_bytes = array("H"), set[int](), 0

    def counted() -> Iterator[str]:
        nonlocal total_bytes
        for index, text in texts:
            sources.append(spool.sources[index])
            documents.add(index)
            total_bytes += len(text.encode())
            yield text

    with (directory / f"{name}.bin").open("wb") as stream:
        starts = write_stream(tokenizer, counted(), stream, spool.total_bytes if name == "train" else 0)
    np.save(directory / f"{name}.starts.npy", starts)
    np.save(directory / f"{name}.sources.npy", np.array(sources, np.uint16))
    return _Part(len(documents), total_bytes, int(starts[-1]))


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest integer type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_stream(
    tokenizer: Tokenizer, texts: Iterable[str], stream: BinaryIO, expected: int = 0
) -> NDArray[np.int64]:
    """Write all texts as one stream of tokens: an end-of-text token, then each text followed by one.

    Args:
        tokenizer: A tokenizer with an end-of-text token.
        texts: The texts, in their order.
        stream: Where the ids are written.
        expected: Bytes of text, for the progress bar.

    Returns:
        The place of each text's first token, and the length of the stream: int64 [n + 1].
    """
    end = tokenizer.eos_id
    assert end is not None, "every tokenizer trained here has an end-of-text token"
    dtype = token_type(tokenizer.vocab_size)
    starts = array("q", [1])
    stream.write(np.array([end], dtype=dtype).tobytes())
    length = 0  # tokens of the current text so far
    with Progress("encoding the corpus", expected, "bytes") as bar:
        for batch in _batches(texts):
            encoded = tokenizer.encode_batch([piece for piece, _ in batch], special=False)
            for ids, (_, last) in zip(encoded, batch, strict=True):
                stream.write(np.array([*ids, end] if last else ids, dtype=dtype).tobytes())
                length += len(ids)
                if last:
                    starts.append(starts[-1] + length + 1)
                    length = 0
            bar.advance(sum(len(piece) for piece, _ in batch))
    return np.array(starts, np.int64)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Yield lists of about `ENCODED_AT_ONCE` characters of pieces, each with whether it is the last of its text."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in texts:
        parts = pieces(text)
        for number, piece in enumerate(parts, start=1):
            batch.append((piece, number == len(parts)))
            characters += len(piece)
            if characters >= ENCODED_AT_ONCE:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def pieces(text: str, length: int = PIECE) -> list[str]:
    """Cut a text into pieces of about ``length`` characters whose tokens together are those of the whole text."""
    parts: list[str] = []
    start = 0
    while len(text) - start > length and (end := _cut(text, start + length)) < len(text):
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _cut(text: str, after: int) -> int:
    """Return the first place from ``after`` on that no word of `word_pattern` spans.

    If there is none within `PIECE` characters (in a base64 image, for example), return the place after
    them. A longer word would need unbounded memory and time, and cutting it changes at most two tokens.
    """
    match = _WORD_BEGINS.search(text, after, after + PIECE)
    return min(after + PIECE, len(text)) if match is None else match.start()


def open_stream(path: Path, vocab_size: int) -> NDArray[np.unsignedinteger]:
    """Map a stream of tokens into memory: only the parts that are read take memory."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=token_type(vocab_size))
    return np.memmap(path, dtype=token_type(vocab_size), mode="r")
