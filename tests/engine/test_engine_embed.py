"""Vectors of texts, against transformers' decoders, and against the same texts in other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tercet.engine.cpu.load import load_cpu_backend
from tercet.engine.cpu.pool import Crew
from tercet.engine.engine import Engine
from tercet.engine.request import Request, Sampling
from tercet.engine.torch_backend import TorchBackend
from tercet.engine.transformers_backend import load_transformers
from tercet.errors import UserError
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer
from tiny_checkpoints import LONGROPE, Make

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {"sliding_window": 5}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "odd sizes": ("llama", {"hidden_size": 52, "intermediate_size": 71, "head_dim": 26, "num_attention_heads": 2}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE}),
}  # fmt: skip


def random_prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 61, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def engine_of(directory: Path, device: str, tokenizer: Tokenizer, **options: Any) -> Engine:
    backend: Any
    if device == "kernels":
        backend = load_cpu_backend(directory, **({"quantization": "none"} | options))
    elif device == "torch":
        backend = TorchBackend(load_model(directory))
    else:
        return Engine(load_transformers(directory), tokenizer, [], reuse_prefixes=False)
    return Engine(backend, tokenizer, [])


@torch.no_grad()
def expected(directory: Path, prompts: list[list[int]]) -> NDArray[np.float32]:
    """The vectors by transformers' own decoder without a head."""
    decoder = transformers.AutoModel.from_pretrained(directory).eval()
    means = [decoder(torch.tensor([prompt])).last_hidden_state[0].mean(0) for prompt in prompts]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1).numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["kernels", "torch", "transformers"])
def test_vectors_are_the_mean_of_transformers_last_hidden_states(
    make: Make, byte_level: Tokenizer, case: str, device: str
) -> None:
    family, fields = CASES[case]
    _, directory = make(family, **fields)
    prompts = random_prompts(9)
    vectors = engine_of(directory, device, byte_level).embed(prompts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(directory, prompts), atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["bloom", "mamba", "openai-gpt"])
def test_architectures_that_only_transformers_runs(tmp_path: Path, byte_level: Tokenizer, name: str) -> None:
    fields: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    if name != "openai-gpt":
        fields = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, vocab_size=61, **fields)
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(tmp_path)
    prompts = random_prompts(3)
    vectors = engine_of(tmp_path, "transformers", byte_level).embed(prompts)
    np.testing.assert_allclose(vectors, expected(tmp_path, prompts), atol=1e-4, rtol=0)


def test_a_model_that_does_not_expose_its_states_is_refused(
    make: Make, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(make("llama")[1], "transformers", byte_level)
    monkeypatch.setattr(type(engine.backend.model), "base_model_prefix", "")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="LlamaForCausalLM of transformers does not expose"):
        engine.embed([[5, 6]])


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_neighbours_and_threads_change_no_bit(
    make: Make, byte_level: Tokenizer, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Crew, "note", lambda *_: None)  # so that every step uses all threads
    _, directory = make("qwen3", max_position_embeddings=256)
    prompts = random_prompts(30, 200)
    engine = engine_of(directory, "kernels", byte_level, quantization=quantization, threads=1)
    alone = np.concatenate([engine.embed([prompt]) for prompt in prompts])
    engine = engine_of(directory, "kernels", byte_level, quantization=quantization, threads=2)
    monkeypatch.setattr(engine.backend, "max_tokens", 77)  # so that prompts are cut
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(prompts))
        vectors = engine.embed([prompts[number] for number in order])
        np.testing.assert_array_equal(vectors, alone[order])


def test_embedding_changes_no_logits(make: Make, byte_level: Tokenizer) -> None:
    engine = engine_of(make("llama")[1], "kernels", byte_level)
    request = Request((5, 6, 7), Sampling(max_tokens=9, seed=0, logprobs=2))
    before = engine.generate([request])[0].logprobs
    engine.embed(random_prompts(3))
    assert engine.generate([request])[0].logprobs == before


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), max_size=9),
    st.sampled_from([1, 20, 64]),
    st.sampled_from([12, 40]),
    st.integers(0, 9),
)
def test_embedding_between_the_turns_of_requests_changes_nothing(
    byte_level: Tokenizer, prompts: list[list[int]], max_tokens: int, pages: int, turns: int
) -> None:
    vocab = byte_level.vocab_size
    request = Request(tuple(range(10, 30)), Sampling(temperature=0, max_tokens=8, ignore_eos=True))
    [alone] = Engine(FakeBackend(vocab), byte_level, []).generate([request])
    backend = FakeBackend(vocab, num_pages=pages, max_tokens=max_tokens)
    engine = Engine(backend, byte_level, [])
    engine.submit(request)
    deltas = [delta for _ in range(turns) for delta in engine.step()]
    vectors = engine.embed(prompts)
    assert len(vectors) == len(prompts)
    for prompt, vector in zip(prompts, vectors, strict=True):
        rows = [backend.logits(prompt[: place + 1])[:8] for place in range(len(prompt))]
        mean = np.mean(np.array(rows, np.float64), axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    while engine.has_work:
        deltas += engine.step()
    assert [delta.completion.tokens for delta in deltas if delta.completion] == [alone.tokens]


def test_texts_without_tokens_or_too_long_are_refused(make: Make, byte_level: Tokenizer) -> None:
    engine = engine_of(make("llama")[1], "kernels", byte_level)
    assert engine.embed([[5] * 64]).shape == (1, 32)
    with pytest.raises(UserError, match="the prompt has 65 tokens; the model takes at most 64"):
        engine.embed([[5] * 65])
    with pytest.raises(UserError, match=r"prompt 2 is empty \(0 tokens\)"):
        engine.embed([[5], []])
