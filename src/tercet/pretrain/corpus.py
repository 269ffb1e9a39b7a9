"""Documents into one long stream of tokens on disk: the tokenizer, the training part, the held-out part.

Texts wait in a file while the parts are chosen and the tokenizer is trained, so memory does not grow with
them.
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

TOKENIZER_SAMPLE = 20_000_000  # bytes a tokenizer is trained on; merges change little beyond
LEAST_TEXT = 20_000  # characters
FEWEST_HELD = 10  # held-out texts; fewer would be an accident of which
LEAST_STRETCH = 500  # characters held out of a text, on average
# The tokenizers library keeps a hundred bytes for each token of what it encodes at once: long texts go in pieces.
ENCODED_AT_ONCE, PIECE = 1_000_000, 100_000  # characters
# Where no word of `word_pattern` goes on: before a line that begins with no white space, and before a space
# between two letters or digits.
_WORD_BEGINS = re.compile(r"(?<=\n)(?=\S)|(?<=[^\W_])(?= [^\W_])")


@dataclass(frozen=True)
class Corpus:
    """What the stream was made of. Sizes in bytes are of UTF-8 text."""

    documents: int
    bytes: int
    tokens: int
    heldout_documents: int
    heldout_bytes: int
    heldout_tokens: int
    vocab_size: int
    complete: bool  # False: reading stopped when there was enough for the budget
    decontamination: dict[str, Any] | None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


@dataclass(frozen=True)
class Split:
    """Which texts are held out whole, and of which a stretch is: characters (begin, end)."""

    held: frozenset[int]
    stretches: Mapping[int, tuple[int, int]]

    def train(self, spool: Spool) -> Iterator[tuple[int, str]]:
        """The training texts with their numbers; what lies before a stretch and after it, apart."""
        for index in range(len(spool)):
            if index in self.stretches:
                begin, end = self.stretches[index]
                text = spool[index]
                yield from ((index, part) for part in (text[:begin], text[end:]) if part.strip())
            elif index not in self.held:
                yield index, spool[index]

    def heldout(self, spool: Spool) -> Iterator[tuple[int, str]]:
        """The held-out texts with their numbers."""
        for index in sorted(self.held):
            yield index, spool[index]
        for index in sorted(self.stretches):
            begin, end = self.stretches[index]
            yield index, spool[index][begin:end]


def split(spool: Spool, share: float = 0.01) -> Split:
    """Which texts of ``spool`` are held out.

    Those whose content hashes lowest, until they make up ``share`` of the text and a few thousand
    characters at least, and not twice that; so adding documents moves few others. Where that is fewer than
    `FEWEST_HELD` texts (a dozen books), one of them would speak for all, and what is held out is a stretch of
    each text instead. Its place is chosen by the hash as well: texts often end alike, with a licence say.
    """
    total = sum(spool.lengths)
    wanted = max(share * total, min(20_000, 0.1 * total))
    chosen: set[int] = set()
    size = 0
    for index in sorted(range(len(spool)), key=spool.digest):
        if size >= wanted:
            break
        if size + spool.lengths[index] <= 2 * wanted:
            chosen.add(index)
            size += spool.lengths[index]
    if len(chosen) >= FEWEST_HELD:
        return Split(frozenset(chosen), {})
    # Of very short texts no stretch can be judged: then of the longest only.
    count = min(len(spool), max(1, int(wanted / LEAST_STRETCH)))
    longest = sorted(range(len(spool)), key=spool.lengths.__getitem__, reverse=True)[:count]
    part = wanted / max(1, sum(spool.lengths[index] for index in longest))
    found = {index: _stretch(spool, index, int(part * spool.lengths[index])) for index in longest}
    return Split(frozenset(), {index: place for index, place in found.items() if place[0] < place[1]})


def _stretch(spool: Spool, index: int, size: int) -> tuple[int, int]:
    """Where about ``size`` characters of a text begin and end, at lines' ends where there are some near."""
    text = spool[index]
    latest = max(0, len(text) - size)
    place = int.from_bytes(spool.digest(index)[8:], "big") % (latest + 1)

    def line(near: int) -> int:
        found = text.find("\n", near, near + size // 4)
        return near if found < 0 else found + 1

    begin = line(place) if place else 0
    end = min(begin + size, len(text))
    return begin, end if end == len(text) else line(end)


def gather(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Documents until their text reaches ``limit`` bytes; of one that is far longer than what is left, its beginning."""
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


_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: its multiples spread evenly (Knuth, 6.4)


def _sample(spool: Spool, division: Split) -> Iterator[str]:
    """Training texts of about `TOKENIZER_SAMPLE` bytes, from everywhere in the corpus."""
    share = TOKENIZER_SAMPLE / max(1, spool.total_bytes)
    # Texts whose hash falls into the share: chosen by content, so no source is favoured. The hash's other
    # end: those that hash low are held out.
    limit = int(max(0.0, 1 - share) * 2**64)
    for index, text in division.train(spool):
        place = int.from_bytes(spool.digest(index)[:8], "big")
        for piece in pieces(text):
            if place >= limit:
                yield piece
            place = (place + _GOLDEN) % 2**64  # the next piece of a long text is chosen for itself


def prepare(
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

    planned_vocabulary: tokens, where the corpus holds so many that occur often enough (`RAREST_MERGE`);
        vocab_size: exactly so many, as far as there are merges at all. digits, whitespace: as
        `tercet.pretrain.vocabulary.word_pattern` takes them.
    vocabulary: texts that the tokenizer is trained on too, and the network is not.

    Does nothing when the directory already holds the corpus of the same ``key``.

    Raises:
        UserError: there is too little text.
    """
    done = directory / "corpus.json"
    if done.is_file():
        stored = read_json(done)
        if stored.pop("key", None) != key:
            raise UserError(f"{directory} holds another corpus; choose another --out or delete it")
        return Corpus(**stored)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with Spool(directory.parent / "texts.tmp") as spool:
        read = 0
        for document in gather(documents, limit):
            read += len(document.text.encode())
            cleaned: Document | None = document
            if decontaminator is not None:
                cleaned, _ = decontaminator.clean(document)
            if cleaned is not None and cleaned.text.strip():
                spool.append(cleaned.text, document.source)
        if read >= limit:
            say(f"read {read / 1e6:.1f} MB, enough for the budget; what comes after it was not read")
        if sum(spool.lengths) < LEAST_TEXT:
            raise UserError(
                f"the corpus has {sum(spool.lengths):,} characters; building a model needs at least {LEAST_TEXT:,} "
                f"(a million gives the first readable sentences)"
            )
        division = split(spool)
        tokenizer = train_tokenizer(
            chain(vocabulary, _sample(spool, division)),
            vocab_size or planned_vocabulary,
            digits=digits,
            whitespace=whitespace,
            rarest=0 if vocab_size else RAREST_MERGE,
        )
        with atomic_directory(directory) as temporary:
            parts = {
                name: _write_part(temporary, name, tokenizer, texts, spool)
                for name, texts in (("train", division.train(spool)), ("heldout", division.heldout(spool)))
            }
            write_json(temporary / "sources.json", spool.names)
            tokenizer.save(temporary / "tokenizer")
            train, held = parts["train"], parts["heldout"]
            corpus = Corpus(
                documents=train.documents,
                bytes=train.bytes,
                tokens=train.tokens,
                heldout_documents=held.documents,
                heldout_bytes=held.bytes,
                heldout_tokens=held.tokens,
                vocab_size=tokenizer.vocab_size,
                complete=read < limit,
                decontamination=decontaminator.summary() if decontaminator is not None else None,
            )
            write_json(temporary / "corpus.json", {**asdict(corpus), "key": key})
    return corpus


@dataclass(frozen=True)
class _Part:
    documents: int
    bytes: int
    tokens: int


def _write_part(
    directory: Path, name: str, tokenizer: Tokenizer, texts: Iterable[tuple[int, str]], spool: Spool
) -> _Part:
    """Write NAME.bin, NAME.starts.npy and NAME.sources.npy."""
    sources, documents, size = array("H"), set[int](), 0

    def counted() -> Iterator[str]:
        nonlocal size
        for index, text in texts:
            sources.append(spool.sources[index])
            documents.add(index)
            size += len(text.encode())
            yield text

    with (directory / f"{name}.bin").open("wb") as stream:
        starts = write_stream(tokenizer, counted(), stream, spool.total_bytes if name == "train" else 0)
    np.save(directory / f"{name}.starts.npy", starts)
    np.save(directory / f"{name}.sources.npy", np.array(sources, np.uint16))
    return _Part(len(documents), size, int(starts[-1]))


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_stream(
    tokenizer: Tokenizer, texts: Iterable[str], stream: BinaryIO, expected: int = 0
) -> NDArray[np.int64]:
    """Write all texts as one stream of tokens: an end-of-text token, then each text closed by one.

    expected: bytes of text, for the bar.

    Returns:
        Where each text begins in it, and the stream's length at the end: int64 [n + 1].
    """
    end = tokenizer.eos_id
    assert end is not None, "a tokenizer that was trained here has an end of text"
    kind = token_type(tokenizer.vocab_size)
    starts = array("q", [1])
    stream.write(np.array([end], dtype=kind).tobytes())
    length = 0  # of the text so far
    with Progress("encoding the corpus", expected, "bytes") as bar:
        for batch in _batches(texts):
            encoded = tokenizer.encode_batch([piece for piece, _ in batch], special=False)
            for ids, (_, last) in zip(encoded, batch, strict=True):
                stream.write(np.array([*ids, end] if last else ids, dtype=kind).tobytes())
                length += len(ids)
                if last:
                    starts.append(starts[-1] + length + 1)
                    length = 0
            bar.advance(sum(len(piece) for piece, _ in batch))
    return np.array(starts, np.int64)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of texts, and whether each is the last of its text, about `ENCODED_AT_ONCE` characters at a time."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        found = pieces(text)
        for number, piece in enumerate(found, start=1):
            batch.append((piece, number == len(found)))
            size += len(piece)
            if size >= ENCODED_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def pieces(text: str, size: int = PIECE) -> list[str]:
    """``text`` cut into pieces of about ``size`` characters whose tokens are the text's."""
    found: list[str] = []
    start = 0
    while len(text) - start > size and (end := _cut(text, start + size)) < len(text):
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def _cut(text: str, after: int) -> int:
    """The first place from ``after`` on where no word of `word_pattern` goes on.

    Where there is none for `PIECE` characters (a picture in base64, say), the place after them: a word of
    that length would take memory and time without end, and of its tokens two at most become others.
    """
    found = _WORD_BEGINS.search(text, after, after + PIECE)
    return min(after + PIECE, len(text)) if found is None else found.start()


def open_stream(path: Path, vocab_size: int) -> NDArray[np.unsignedinteger]:
    """The stream memory-mapped: what is not read takes no memory."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=token_type(vocab_size))
    return np.memmap(path, dtype=token_type(vocab_size), mode="r")
