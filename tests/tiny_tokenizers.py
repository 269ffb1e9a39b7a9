"""Small tokenizers of the kinds that GGUF files hold, made with the tokenizers library."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tercet.model.tokenizer import Tokenizer

VOCABULARY = 320
CORPUS = ["the king said that it's 12 or 1345 of them, and then the thing was there  and\n\nno more"] * 20
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
SPACE = "\u2581"


def isolated(pattern: str) -> Any:
    """Return the step that divides text by a regular expression."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(*split: Any, bos: bool = False, **model: Any) -> Tokenizer:
    """Return a byte-level BPE of `VOCABULARY` tokens, trained on `CORPUS`; ``split`` precedes the byte encoding."""
    backend = Backend(models.BPE(**model))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
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


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """Return a tokenizer.json as Llama 2's was made of its SentencePiece model: every pair that is a token, by rank."""
    texts = ["_t", "he", "_the", "in", "ing", "_k", "_king", "th", "at", "__", "12"]
    texts = [text.replace("_", SPACE) for text in texts]
    letters = sorted(set("".join(CORPUS).replace(" ", SPACE).replace("\n", "")))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *texts, *letters]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in texts
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer.from_backend(backend, bos="<s>", eos="</s>", pad="<unk>")
