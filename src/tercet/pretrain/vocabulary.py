"""The tokenizer of a model: byte-level BPE, trained on its corpus, and how well it compresses beside others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tercet.model.reference import parse_reference
from tercet.model.source import tokenizer_directory_of
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.settings import END_OF_TEXT, SPECIAL_TOKENS, Digits, Whitespace

# A token that the corpus hardly holds is never learned: with a vocabulary that follows from the budget, merges
# that occur more rarely than this in the sample are not made.
RAREST_MERGE = 16


def word_pattern(digits: Digits = "one", whitespace: Whitespace = "word") -> str:
    r"""The regular expression of what merges never reach across: GPT-4's, with choices.

    digits: ``one`` (Llama 2, Qwen), at most ``three`` together (GPT-4, Llama 3) or ``all`` of a number.
    whitespace: ``word`` joins one space to the word behind it, as GPT-2 and all after it; ``apart`` keeps
        spaces in tokens of their own, so that a word is one token wherever it stands.
    """
    number = {"one": r"\p{N}", "three": r"\p{N}{1,3}", "all": r"\p{N}+"}[digits]
    endings = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    if whitespace == "apart":
        return rf"{endings}|\p{{L}}+|{number}|[^\s\p{{L}}\p{{N}}]+|[\r\n]+|[^\S\r\n]+"
    return (
        rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    digits: Digits = "one",
    whitespace: Whitespace = "word",
    rarest: int = 0,
) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes: GPT-2) of at most ``vocab_size`` tokens.

    Every byte has a token, so no text is out of vocabulary and encoding is lossless.

    rarest: merges that occur less often in ``texts`` are not made.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word_pattern(digits, whitespace)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=rarest,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer.from_backend(backend, bos=END_OF_TEXT, eos=END_OF_TEXT, pad=END_OF_TEXT)


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """UTF-8 bytes of ``texts`` over their tokens: higher is better, and only of the same text comparable."""
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts, special=False))
    return sum(len(text.encode()) for text in texts) / max(1, tokens)


def load_tokenizer(reference: str) -> Tokenizer:
    """The tokenizer of a directory or of a model on the Hub, of which nothing else is fetched.

    Raises:
        UserError: there is none.
    """
    return Tokenizer.load(tokenizer_directory_of(parse_reference(reference)))
