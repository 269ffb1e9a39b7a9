"""Documents into one long stream of tokens on disk: the tokenizer, the training part, the held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.data.decontaminate import Decontaminator
from tercet.data.documents import Document
from tercet.errors import UserError
from tercet.files import atomic_directory, read_json, write_json
from tercet.model.tokenizer import Tokenizer
from tercet.progress import Progress, say

END_OF_TEXT = "<|endoftext|>"
# ChatML's markers are reserved from the start, so that a chat model can be tuned from any base.
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
TOKENIZER_SAMPLE = 20_000_000  # bytes a tokenizer is trained on; merges change little beyond


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


def split_heldout(texts: list[str], share: float = 0.01) -> tuple[list[str], list[str]]:
    """Training and held-out texts, in their order.

    Held out are the documents whose content hashes lowest, until they make up ``share`` of the text
    and a few thousand characters at least; so adding documents moves few others. With less than 20
    documents it is the end of the longest one instead.
    """
    total = sum(map(len, texts))
    wanted = max(share * total, min(20_000, 0.1 * total))
    if len(texts) < 20:
        return _without_tail(texts, int(wanted))
    order = sorted(range(len(texts)), key=lambda index: _position(texts[index]))
    chosen: set[int] = set()
    size = 0
    for index in order:
        if size >= wanted:
            break
        # One huge document must not swallow the corpus.
        if size + len(texts[index]) <= max(2 * wanted, 0.1 * total):
            chosen.add(index)
            size += len(texts[index])
    held = [texts[index] for index in sorted(chosen)]
    return [text for index, text in enumerate(texts) if index not in chosen], held


def _position(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _without_tail(texts: list[str], size: int) -> tuple[list[str], list[str]]:
    """The last ``size`` characters of the longest text, from a line's start where there is one."""
    longest = max(range(len(texts)), key=lambda index: len(texts[index]), default=0)
    if not texts:
        return [], []
    text = texts[longest]
    line = text.find("\n", len(text) - size)
    cut = line + 1 if 0 < line < len(text) - size // 2 else len(text) - size
    return [*texts[:longest], text[:cut], *texts[longest + 1 :]], [text[cut:]]


def gather(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Documents until their text reaches ``limit`` bytes."""
    total = 0
    with Progress("reading the corpus", limit, "bytes") as bar:
        for document in documents:
            yield document
            size = len(document.text.encode("utf-8"))
            total += size
            bar.advance(size)
            if total >= limit:
                return


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes: GPT-2).

    Digits are split one by one (Llama), words keep their leading space, every byte has a token, so
    no text is out of vocabulary and encoding is lossless.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder

    backend = Backend(models.BPE())
    # GPT-4's word pattern with single digits: contractions, words, digits, punctuation, spaces.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_until(texts, TOKENIZER_SAMPLE), trainer)
    return Tokenizer.from_backend(backend, bos=END_OF_TEXT, eos=END_OF_TEXT, pad=END_OF_TEXT)


def _until(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        if total >= limit:
            return
        total += len(text)
        yield text


def prepare(
    documents: Iterable[Document],
    directory: Path,
    *,
    vocab_size: int,
    limit: int,
    decontaminator: Decontaminator | None = None,
    vocabulary: Sequence[str] = (),
    key: str,
) -> Corpus:
    """Write ``directory`` with `train.bin`, `heldout.bin` (16- or 32-bit ids) and `tokenizer/`.

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
    texts: list[str] = []
    source_of: dict[str, str] = {}  # by text
    read = 0
    for document in gather(documents, limit):
        read += len(document.text.encode("utf-8"))
        cleaned: Document | None = document
        if decontaminator is not None:
            cleaned, _ = decontaminator.clean(document)
        if cleaned is not None and cleaned.text.strip():
            texts.append(cleaned.text)
            source_of[cleaned.text] = document.source
    if read >= limit:
        say(f"read {read / 1e6:.1f} MB, enough for the budget; what comes after it was not read")
    train, held = split_heldout(texts)
    if sum(map(len, texts)) < 20_000:
        raise UserError(
            f"the corpus has {sum(map(len, texts)):,} characters; building a model needs at least 20,000 "
            f"(a million gives the first readable sentences)"
        )
    tokenizer = train_tokenizer([*vocabulary, *train], vocab_size)
    with atomic_directory(directory) as temporary:
        counts = {}
        # What was held out of a single text is no document that was read.
        names = sorted(set(source_of.values()))
        numbers = {name: number for number, name in enumerate(names)}
        first = next(iter(source_of.values()))
        for name, texts in (("train", train), ("heldout", held)):
            stream, starts = encode_stream(tokenizer, texts)
            stream.tofile(temporary / f"{name}.bin")
            np.save(temporary / f"{name}.starts.npy", starts)
            sources = [numbers[source_of.get(text, first)] for text in texts]
            np.save(temporary / f"{name}.sources.npy", np.array(sources, np.uint16))
            counts[name] = len(stream)
        write_json(temporary / "sources.json", names)
        tokenizer.save(temporary / "tokenizer")
        corpus = Corpus(
            documents=len(train),
            bytes=sum(len(text.encode()) for text in train),
            tokens=counts["train"],
            heldout_documents=len(held),
            heldout_bytes=sum(len(text.encode()) for text in held),
            heldout_tokens=counts["heldout"],
            vocab_size=tokenizer.vocab_size,
            complete=read < limit,
            decontamination=decontaminator.summary() if decontaminator is not None else None,
        )
        write_json(temporary / "corpus.json", {**asdict(corpus), "key": key})
    return corpus


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_stream(
    tokenizer: Tokenizer, texts: list[str]
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """All texts as one stream: an end-of-text token, then each text closed by one.

    Also where each text begins in it, and the stream's length at the end: int64 [n + 1].
    """
    end = tokenizer.eos_id
    assert end is not None, "a tokenizer that was trained here has an end of text"
    kind = token_type(tokenizer.vocab_size)
    pieces = [np.array([end], dtype=kind)]
    with Progress("encoding the corpus", len(texts), "documents") as bar:
        for start in range(0, len(texts), 256):
            for ids in tokenizer.encode_batch(texts[start : start + 256], special=False):
                pieces.append(np.array([*ids, end], dtype=kind))
            bar.advance(min(256, len(texts) - start))
    return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def open_stream(path: Path, vocab_size: int) -> NDArray[np.unsignedinteger]:
    """The stream memory-mapped: what is not read takes no memory."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=token_type(vocab_size))
    return np.memmap(path, dtype=token_type(vocab_size), mode="r")
