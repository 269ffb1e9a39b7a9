"""Train a byte-level BPE tokenizer on a corpus, and measure the compression of tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tercet.model.reference import parse_reference
from tercet.model.source import tokenizer_directory_of
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.settings import END_OF_TEXT, SPECIAL_TOKENS, Digits, Whitespace

# The network never learns a token that hardly occurs. Where the budget decides the vocabulary, merges that
# occur more rarely than this in the sample are not made.
RAREST_MERGE = 16


def word_pattern(digits: Digits = "one", whitespace: Whitespace = "word") -> str:
    r"""Return the regular expression of the words that text is split into before merging: GPT-4's, with choices.

    Args:
        digits: The digits of a number that stay together: ``one`` (Llama 2, Qwen), at most ``three``
            (GPT-4, Llama 3) or ``all``.
        whitespace: ``word`` joins a space to the word after it, as GPT-2 and its successors do; ``apart``
            keeps spaces in tokens of their own, so that a word is the same token everywhere.
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
    """Train byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes: GPT-2).

    Every byte has a token, so no text is out of vocabulary and encoding is lossless.

    Args:
        texts: The training text.
        vocab_size: Tokens in the vocabulary at most, special tokens included.
        digits: As `word_pattern` takes it.
        whitespace: As `word_pattern` takes it.
        rarest: Merges that occur less often in ``texts`` are not made.
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
    """Return the UTF-8 bytes of ``texts`` over their tokens.

    Higher is better. Only figures of the same texts can be compared.
    """
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts, special=False))
    return sum(len(text.encode()) for text in texts) / max(1, tokens)


def load_tokenizer(reference: str) -> Tokenizer:
    """Load the tokenizer of a checkpoint directory or of a model on the Hub, without its weights.

    Raises:
        UserError: There is no tokenizer.
    """
    return Tokenizer.load(tokenizer_directory_of(parse_reference(reference)))
