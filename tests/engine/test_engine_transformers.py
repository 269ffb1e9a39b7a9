"""Models run by transformers, fed in every order the engine may choose, against transformers itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from safetensors.torch import load_file, save_file

from tercet.engine import transformers_backend
from tercet.engine.transformers_backend import TransformersBackend, load_transformers
from tercet.errors import UserError

VOCAB, POSITIONS = 97, 64
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}
STATE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
# Texts of more than 16 tokens are rotated with other factors.
LONGROPE: dict[str, Any] = LLAMA_LIKE | {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    },
}  # fmt: skip
# Architecture: its fields, and its fastest correct mode.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "opt": (
        {"hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48, "num_attention_heads": 4,
         "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32},
        "chunks",
    ),
    "bloom": ({"hidden_size": 32, "n_layer": 3, "n_head": 4}, "chunks"),
    "falcon": ({"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}, "chunks"),
    "starcoder2": (LLAMA_LIKE | {"sliding_window": 5}, "chunks"),
    "cohere": (LLAMA_LIKE, "chunks"),
    "gptj": (GPT2_LIKE | {"rotary_dim": 4}, "chunks"),
    "phi3": (LONGROPE, "chunks"),
    "mamba": (STATE, "steps"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 3, "context_length": POSITIONS}, "chunks"),
    "recurrent_gemma": (
        LLAMA_LIKE | {"lru_width": 32, "attention_window_size": 6, "head_dim": 8,
                      "block_types": ["recurrent", "recurrent", "attention"]},
        "recompute",
    ),
    "openai-gpt": (GPT2_LIKE, "recompute"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chunk:
    """The fields of the engine's chunk that this backend reads."""

    sequence: int
    tokens: Sequence[int]
    start: int
    outputs: Sequence[int]
    pages: Sequence[int] = ()


def tiny(name: str, **changes: Any) -> Any:
    """A random model; weights large enough that its choices are clear."""
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    fields = {"vocab_size": VOCAB} | special | MODELS.get(name, ({}, ""))[0] | changes
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name, our backend, loaded from disk, and transformers' model."""
    directory = tmp_path_factory.mktemp("model")
    model = tiny(request.param)
    model.save_pretrained(directory)
    return request.param, load_transformers(directory, torch.float32), model


def whole_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits


def test_a_model_runs_in_the_fastest_correct_mode(both: Any) -> None:
    name, backend, _ = both
    assert backend.mode == MODELS[name][1]
    assert backend.vocab_size == VOCAB
    assert backend.shares_pages is False


def test_greedy_tokens_are_those_of_generate(both: Any) -> None:
    """Two sequences in turns, one prompt in two parts, beyond sliding windows and the switch of factors."""
    _, backend, model = both
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 3, 60, 41]]
    tokens = [list(prompt) for prompt in prompts]
    backend.feed([Chunk(0, prompts[0][:3], 0, []), Chunk(1, prompts[1][:-1], 0, [])])
    fed = [3, 3]
    for _ in range(20):
        chunks = [Chunk(n, row[fed[n] :], fed[n], [len(row) - fed[n] - 1]) for n, row in enumerate(tokens)]
        logits = backend.feed(chunks)
        for n, row in enumerate(logits):
            fed[n] = len(tokens[n])
            tokens[n].append(int(row.argmax()))
    for n, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            reference = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
            )
        assert tokens[n] == reference[0].tolist()
        backend.release(n)


@pytest.mark.parametrize("values", [1 << 25, 3 * VOCAB])
def test_any_order_of_feeding_and_rewinding_gives_the_same_logits(
    both: Any, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backend, model = both
    monkeypatch.setattr(transformers_backend, "LOGIT_VALUES", values)
    rng = np.random.default_rng(1)
    held: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(25):
        number = int(rng.integers(2))
        if rng.random() < 0.1:
            backend.release(number)
            held[number] = []
        start = len(held[number]) if rng.random() < 0.6 else int(rng.integers(len(held[number]) + 1))
        new = rng.integers(0, VOCAB, int(rng.choice([1, 2, 5, 11]))).tolist()
        start = start if start + len(new) <= POSITIONS else 0
        tokens = held[number] = held[number][:start] + new
        outputs = np.flatnonzero(rng.random(len(new)) < 0.5).tolist()
        right = whole_logits(model, tokens)[start:][outputs]
        chunk = Chunk(number, new, start, outputs)
        if rng.random() < 0.5:
            np.testing.assert_allclose(backend.feed([chunk]), right, atol=1e-4)
            continue
        targets = [rng.integers(0, VOCAB, int(rng.integers(4))).tolist() for _ in outputs]
        logprobs, likeliest = backend.logprobs([chunk], targets)
        right_logprobs = torch.from_numpy(right).log_softmax(-1).numpy()
        places = [(row, token) for row, tokens in enumerate(targets) for token in tokens]
        np.testing.assert_allclose(logprobs, [right_logprobs[place] for place in places], atol=1e-4)
        assert likeliest.tolist() == [right[row].argmax() == token for row, token in places]
    for number in held:
        backend.release(number)


def test_pages_are_counted_so_that_a_whole_sequence_fits(both: Any) -> None:
    _, backend, model = both
    assert backend.page_size * backend.num_pages >= backend.max_positions
    assert 1 <= backend.max_tokens <= backend.max_positions
    small = TransformersBackend(model, cache_bytes=1)
    assert small.page_size * small.num_pages >= small.max_positions >= 1
    with pytest.raises(NotImplementedError):
        backend.copy_pages([(0, 1)])


def test_the_memory_of_keys_and_values_is_counted_by_hand() -> None:
    backend = TransformersBackend(tiny("opt"), cache_bytes=1 << 20)
    per_token = 2 * 3 * 32 * 4  # keys and values, layers, width, float32
    assert backend.page_size == 64
    assert backend.num_pages == (1 << 20) // (64 * per_token)


def test_a_state_that_does_not_grow_is_one_page_for_each_sequence() -> None:
    backend = TransformersBackend(tiny("mamba"), cache_bytes=1 << 20)
    state = 3 * 64 * (8 + 4) * 4  # layers, inner width, state and convolution, float32
    assert backend.page_size == backend.max_positions
    assert backend.num_pages == (1 << 20) // state


def test_a_sequence_survives_an_interrupted_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("opt")
    backend = TransformersBackend(model)
    backend.feed([Chunk(0, [5, 6, 7], 0, [])])
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(model, "forward", raising(KeyboardInterrupt()))
        backend.feed([Chunk(0, [8], 3, [0])])
    right = whole_logits(model, [5, 6, 7, 9])[-1:]
    np.testing.assert_allclose(backend.feed([Chunk(0, [9], 3, [0])]), right, atol=1e-4)


def raising(problem: BaseException) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        raise problem

    return run


def test_a_gap_before_the_fed_tokens_raises_value_error() -> None:
    with pytest.raises(ValueError, match="holds 0 tokens; it is fed from 3"):
        TransformersBackend(tiny("opt")).feed([Chunk(0, [8], 3, [0])])


def test_half_precision_runs_in_the_same_mode(tmp_path: Path) -> None:
    tiny("opt").to(torch.bfloat16).save_pretrained(tmp_path)
    backend = load_transformers(tmp_path)
    assert (backend.model.dtype, backend.mode) == (torch.bfloat16, "chunks")
    assert load_transformers(tmp_path, torch.float32).model.dtype == torch.float32


def test_a_model_that_attends_to_later_tokens_is_refused() -> None:
    model = tiny("xlnet", d_model=32, n_layer=3, n_head=4, d_inner=48, eos_token_id=2)
    with pytest.raises(UserError, match="XLNetLMHeadModel is no causal language model"):
        TransformersBackend(model)


def test_broken_weights_are_reported() -> None:
    model = tiny("opt")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite in float32"):
        TransformersBackend(model)


def test_the_error_of_a_missing_library_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'tercet\[transformers\]'"):
        load_transformers(tmp_path)


def unknown_type(directory: Path) -> None:
    rewrite_config(directory, model_type="nobody-knows-it")


def own_code(directory: Path) -> None:
    """A directory whose config requests that its own Python file is run."""
    (directory / "mine.py").write_text("raise SystemExit('ran')\n")
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    rewrite_config(directory, model_type="mine", auto_map=auto_map)


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def incomplete(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.bias"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def rewrite_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (unknown_type, "nobody-knows-it"),
        (own_code, "needs Python code of its own"),
        (pickled, "holds no .safetensors"),
        (incomplete, "tensor model.decoder.layers.1.fc1.bias is missing"),
        (no_config, "has no config.json"),
    ],
)
def test_a_directory_that_cannot_be_loaded_gets_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], part: str
) -> None:
    tiny("opt").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        load_transformers(tmp_path)
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
