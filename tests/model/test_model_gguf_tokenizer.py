"""The tokenizer of a GGUF file, where the embedding has fewer rows than the tokenizer has tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tercet.errors import UserError
from tercet.model.gguf_tokenizer import SINGLE, gguf_tokenizer
from tercet.model.tokenizer import Tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SINGLE), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["red green"] * 4, trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer.from_backend(backend, eos="<|endoftext|>")


def test_added_tokens_beyond_the_embedding_are_left_out(tokenizer: Tokenizer) -> None:
    rows = tokenizer.vocab_size
    whole = gguf_tokenizer(tokenizer, rows, (), "t")
    larger = Tokenizer.from_backend(tokenizer.backend, eos="<|endoftext|>", pad="[PAD]", bos="[BOS]")
    assert larger.pad_id is not None and larger.pad_id >= rows
    written = gguf_tokenizer(larger, rows, (), "t")
    assert (written.tokens, written.types, written.pad_id) == (whole.tokens, whole.types, None)
    assert written.bos_id == written.ends[0] == tokenizer.eos_id
    [note] = [note for note in written.notes if "[PAD]" in note]
    assert note == "left out [BOS], [PAD]: the model's embedding has no row for it"


def test_a_vocabulary_beyond_the_embedding_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.backend.add_special_tokens([AddedToken("[PAD]")])
    with pytest.raises(UserError, match="the model's embedding has only 200 rows; they are not of the same"):
        gguf_tokenizer(tokenizer, 200, (), "t")
