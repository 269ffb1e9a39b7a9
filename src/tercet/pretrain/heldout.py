"""The held-out part of a corpus, and what is measured on it: bits per byte, compression, samples, minimal pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tercet.data.minimal_pairs import Pair, sample_pairs
from tercet.errors import UserError
from tercet.files import read_json
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.pretrain.corpus import open_stream
from tercet.pretrain.vocabulary import bytes_per_token
from tercet.train.evaluate import heldout_bits, pair_accuracy

FINAL_TOKENS = 65_536  # of the last measurement: they pin bits per byte to under 1%
PAIRS_IN_RUN, PAIRS_AT_END = 5, 50  # minimal pairs of each group that are compared
COMPRESSION_SAMPLE = 2_000_000  # characters of held-out text
SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 4, 16, 80


class HeldOut:
    """The held-out text in the directory of a corpus, and the minimal pairs of the run."""

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, context: int, pairs: Sequence[Pair] = ()
    ) -> None:
        """Open the held-out text.

        Args:
            directory: As `tercet.pretrain.corpus.prepare_corpus` writes it.
            tokenizer: The tokenizer of that corpus.
            context: Tokens that the model reads at once.
            pairs: Minimal pairs to measure grammar on; none: grammar is not measured.

        Raises:
            UserError: A sentence of the pairs is longer than the context.
        """
        self.tokenizer, self.context = tokenizer, context
        self.pairs = sample_pairs(pairs, PAIRS_AT_END)
        self._check_pairs()
        self.stream = open_stream(directory / "heldout.bin", tokenizer.vocab_size)
        self._starts = np.load(directory / "heldout.starts.npy")
        self._source_of = np.load(directory / "heldout.sources.npy")
        self._source_names = read_json(directory / "sources.json")
        self._byte_counts = [tokenizer.byte_length(token) for token in range(tokenizer.vocab_size)]

    def measure(self, model: Transformer, tokens: int) -> dict[str, Any]:
        """Measure a model during training, on about ``tokens`` tokens and a few minimal pairs of each group.

        Returns:
            As `tercet.train.evaluate.heldout_bits`, and ``pair_accuracy`` where there are pairs.
        """
        measured = self._bits(model, tokens, None)
        if self.pairs:
            pairs = sample_pairs(self.pairs, PAIRS_IN_RUN)
            measured["pair_accuracy"] = pair_accuracy(model, self.tokenizer, pairs)["accuracy"]
        return measured

    def measure_final(self, model: Transformer) -> tuple[dict[str, Any], dict[str, float] | None]:
        """Measure the final weights in float32, on more text and more minimal pairs than during training.

        Returns:
            As `tercet.train.evaluate.heldout_bits`; and the accuracy on minimal pairs with their number,
            None where there are no pairs.
        """
        measured = self._bits(model, FINAL_TOKENS, torch.float32)
        if not self.pairs:
            return measured, None
        right = pair_accuracy(model, self.tokenizer, self.pairs, dtype=torch.float32)
        return measured, {"accuracy": right["accuracy"], "pairs": right["pairs"]}

    def _check_pairs(self) -> None:
        """Refuse a sentence that is longer than the context before training, not at its last measurement."""
        sentences = [sentence for pair in self.pairs for sentence in (pair.good, pair.bad)]
        for sentence, ids in zip(
            sentences, self.tokenizer.encode_batch(sentences, special=False), strict=True
        ):
            if len(ids) > self.context:
                raise UserError(
                    f"the sentence {sentence[:60]!r} in `pairs` has {len(ids)} tokens; the model takes at most "
                    f"{self.context}"
                )

    def _bits(self, model: Transformer, tokens: int, dtype: torch.dtype | None) -> dict[str, Any]:
        sources = max(1, len(np.unique(self._source_of)))
        return heldout_bits(
            model,
            self.stream,
            self._starts,
            self._source_of,
            self._source_names,
            self._byte_counts,
            self.context,
            tokens_per_source=max(self.context, tokens // sources),
            dtype=dtype,
        )

    def samples(self, model_directory: Path) -> list[dict[str, str]]:
        """Continue the first tokens of held-out texts with the model in ``model_directory``, for a person to read.

        Returns:
            At most `SAMPLES` rows with ``prompt`` and ``continuation``.
        """
        from tercet.engine.load import load_engine
        from tercet.engine.request import Request, Sampling

        engine, end = load_engine(model_directory), self.tokenizer.eos_id
        starts = [0, *(np.flatnonzero(np.asarray(self.stream) == end) + 1).tolist()][:SAMPLES]
        prompts = [self.stream[start : start + PROMPT_TOKENS].tolist() for start in starts]
        prompts = [prompt for prompt in prompts if len(prompt) == PROMPT_TOKENS and end not in prompt] or [
            self.stream[:PROMPT_TOKENS].tolist()
        ]
        sampling = Sampling(max_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.95, seed=0)
        completions = engine.generate([Request(tuple(prompt), sampling) for prompt in prompts])
        return [
            {"prompt": self.tokenizer.decode(prompt), "continuation": completion.text}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def compression(directory: Path, tokenizers: Mapping[str, Tokenizer]) -> dict[str, dict[str, float]]:
    """Measure how many bytes of held-out text a token holds, for the corpus's own tokenizer and for others.

    Args:
        directory: The directory of the corpus.
        tokenizers: The others, by name.

    Returns:
        ``vocab_size`` and ``bytes_per_token`` by name; the model's own is called ``this model``.
    """
    own = Tokenizer.load(directory / "tokenizer")
    stream = open_stream(directory / "heldout.bin", own.vocab_size)
    texts: list[str] = []
    characters = 0
    for start, end in itertools.pairwise(np.load(directory / "heldout.starts.npy").tolist()):
        texts.append(own.decode(stream[start : end - 1].tolist()))
        characters += len(texts[-1])
        if characters > COMPRESSION_SAMPLE:
            break
    return {
        name: {"vocab_size": tokenizer.vocab_size, "bytes_per_token": bytes_per_token(tokenizer, texts)}
        for name, tokenizer in {"this model": own, **tokenizers}.items()
    }
