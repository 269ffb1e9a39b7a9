"""Small random networks and freshly trained tokenizers: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tercet.engine.engine import Engine
from tercet.engine.torch_backend import TorchBackend
from tercet.model.config import ModelConfig
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then over the other one.",
    "Once upon a time there was a small model that read short texts.",
    "Grüße aus Köln, où l'été est très court. 日本語のテキスト 🦊🐈 naïve café",
] * 3
EOS = "</s>"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Byte-level BPE, as in GPT-2: 300 tokens, most characters beyond ASCII take several."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer.from_backend(backend, eos=EOS)


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """Sentencepiece as in Llama 2: "▁" for spaces, bytes for unknown characters, BOS first, first space dropped."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors, trainers

    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    special = ["<unk>", "<s>", EOS]
    trained.train_from_iterator(
        [text for line in TEXTS[:2] for text in line.split()],
        trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return Tokenizer.from_backend(backend, eos=EOS, bos="<s>")


def network(vocab_size: int, seed: int = 0, **changes: object) -> Transformer:
    """Return a random Qwen3-shaped network, with weights large enough to make its choices clear."""
    fields: dict[str, object] = {
        "family": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 128,
        "qk_norm": "head",
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(fields | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def make_engine(byte_level: Tokenizer) -> Callable[..., Engine]:
    """An engine on a random network; ``room`` limits the cache to that many tokens, in pages of 4."""

    def make(
        tokenizer: Tokenizer = byte_level,
        room: int = 100_000,
        max_batch: int = 64,
        options: dict[str, Any] | None = None,
        **changes: object,
    ) -> Engine:
        model = network(tokenizer.vocab_size, **changes)  # type: ignore[arg-type]
        config = model.config
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
        assert tokenizer.eos_id is not None
        backend = TorchBackend(model, room * per_token, page_size=4)
        return Engine(backend, tokenizer, [tokenizer.eos_id], max_batch, **(options or {}))

    return make
