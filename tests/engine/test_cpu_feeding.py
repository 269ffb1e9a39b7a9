"""Logits of the CPU backend are those of transformers, and the same bits however a sequence is fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from cpu_backends import Logits, at_once, chunk, in_pieces, load
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.cpu.backend import LOGIT_ROWS, MAX_CHUNKS, CPUBackend
from tercet.engine.cpu.formats import FORMATS
from tercet.engine.cpu.pack import encode, pack
from tercet.engine.cpu.pool import Crew
from tercet.engine.cpu.table import PAGE
from tercet.model.gguf_values import Blocks
from tercet.model.weights import Weights
from tiny_checkpoints import GEMMA3_ROPE, LONGROPE, TWO_WINDOWS, YARN, Make, reload, save_random

LENGTH = 210  # three pages and a part

# Cases that errors at a page's end, a window's edge or a head's width would affect.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "window over a page's end": ("mistral", {"sliding_window": 70}),
    "window of a page": ("mistral", {"sliding_window": PAGE}),
    "window of one more": ("mistral", {"sliding_window": PAGE + 1}),
    "small window": ("mistral", {"sliding_window": 5}),
    "window of one": ("mistral", {"sliding_window": 1}),
    "windows in every other layer, caps": ("gemma2", {"sliding_window": 90}),
    "local and global layers": (
        "gemma3_text", {"sliding_window": 65, "layer_types": TWO_WINDOWS, "rope_parameters": GEMMA3_ROPE},
    ),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "longrope, stretched": ("phi3", {"rope_parameters": LONGROPE}),
    "learned positions": ("gpt2", {"n_positions": 256}),
    "parallel layers": ("gpt_neox", {}),
    "heads of 24": ("llama", {"head_dim": 24}),
    "heads of 80": ("qwen3", {"head_dim": 80}),
    "one wide head": ("olmo2", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "odd sizes": (
        "llama",
        {"vocab_size": 67, "hidden_size": 52, "intermediate_size": 71, "head_dim": 26, "num_attention_heads": 2,
         "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "experts": ("mixtral", {}),
    "experts in some layers": ("qwen3_moe", {"mlp_only_layers": [1]}),
}  # fmt: skip


def ids(count: int, seed: int = 0) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(0, 61, count).tolist()
    return result


@torch.no_grad()
def expected_logits(theirs: Any, tokens: list[int]) -> Logits:
    result: Logits = theirs(torch.tensor([tokens])).logits[0].numpy()
    return result


def long_model(make: Make, family: str, **fields: Any) -> tuple[Any, Path]:
    longer = {} if family == "gpt2" else {"max_position_embeddings": 256}
    return make(family, **{**longer, **fields})


@pytest.fixture(autouse=True)
def all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes all threads, however busy the machine is."""
    monkeypatch.setattr(Crew, "note", lambda *_: None)


@pytest.mark.parametrize("case", CASES)
def test_long_sequences_are_as_in_transformers(case: str, make: Make) -> None:
    family, fields = CASES[case]
    theirs, directory = long_model(make, family, **fields)
    tokens, expected = ids(LENGTH), expected_logits(theirs, ids(LENGTH))
    for threads in (1, 2):
        backend = load(directory, threads=threads)
        pages = np.random.default_rng(threads).permutation(backend.num_pages)[:4]
        result = at_once(backend, tokens, pages)
        np.testing.assert_allclose(result, expected, atol=1e-4, rtol=0)
        if "longrope" not in case:
            sizes = (1, 2, 3, 17, PAGE, PAGE + 1)
            for seed in range(3):
                [pieces] = in_pieces(backend, [tokens], np.random.default_rng(seed), sizes)
                np.testing.assert_array_equal(pieces, result)


def test_positions_beyond_the_first_rotary_table(make: Make) -> None:
    theirs, directory = long_model(make, "llama", max_position_embeddings=2500)
    tokens = ids(2200)
    result = at_once(load(directory, threads=2), tokens)
    np.testing.assert_allclose(result, expected_logits(theirs, tokens), atol=1e-4, rtol=0)


# Positions stretched by the length at hand

STRETCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 100}),
    "dynamic": ("llama", {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}),
}  # fmt: skip


@pytest.mark.parametrize("family", STRETCHED)
@torch.no_grad()
def test_stretched_positions_grow_as_in_transformers(family: str, make: Make) -> None:
    """Keys keep the rotation of the step in which they were fed."""
    _, directory = long_model(make, STRETCHED[family][0], **STRETCHED[family][1])
    backend, theirs = load(directory), reload(directory)
    tokens, past, begin = ids(150), None, 0
    for size in (90, 1, 20, 1, 1, 37):
        part = tokens[begin : begin + size]
        out = theirs(torch.tensor([part]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        result = backend.feed([chunk(part, begin)])
        np.testing.assert_allclose(result, out.logits[0].numpy(), atol=1e-4, rtol=0)
        begin += size


def test_a_long_neighbour_does_not_stretch_a_short_sequence(make: Make) -> None:
    family, fields = STRETCHED["longrope"]
    _, directory = long_model(make, family, **fields)
    backend = load(directory)
    short, long = ids(40, 1), ids(130, 2)
    alone = at_once(backend, short)
    both = backend.feed([chunk(short, 0, [3], 0), chunk(long, 0, [5, 6, 7], 1)])
    np.testing.assert_array_equal(both[:40], alone)


# Batch invariance

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 96, "intermediate_size": 136, "head_dim": 24}),
    "gemma2": ("gemma2", {"sliding_window": 70}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [1]}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    result = {}
    for name, (family, fields) in FAMILIES.items():
        result[name] = tmp_path_factory.mktemp("checkpoints") / name
        save_random(result[name], family, **{"max_position_embeddings": 256, **fields})
    return result


SEQUENCES = [ids(150, 1), ids(70, 2), ids(33, 3), ids(1, 4), ids(20, 5)]


@pytest.mark.parametrize(
    ("name", "quantization"),
    [(name, quantization) for name in FAMILIES for quantization in ("none", "int8")]
    + [("llama", "bf16"), ("llama", "int4"), ("qwen3_moe", "int4")],
)
def test_no_bit_depends_on_the_rest_of_the_batch(
    name: str, quantization: Any, checkpoints: dict[str, Path]
) -> None:
    """Vary the other sequences, chunks, pages and threads, often enough to show a race."""
    alone = load(checkpoints[name], quantization)
    expected = [at_once(alone, tokens) for tokens in SEQUENCES]
    backends = [load(checkpoints[name], quantization, threads) for threads in (1, 2, 3)]

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(
        seed=st.integers(0, 2**32),
        which=st.lists(st.integers(0, len(SEQUENCES) - 1), min_size=1, max_size=6),
        sizes=st.lists(st.integers(1, 80), min_size=1, max_size=5),
        backend=st.sampled_from([0, 1, 1, 1, 1, 2]),
    )
    def check(seed: int, which: list[int], sizes: list[int], backend: int) -> None:
        rng = np.random.default_rng(seed)
        result = in_pieces(backends[backend], [SEQUENCES[number] for number in which], rng, sizes)
        for number, logits in zip(which, result, strict=True):
            np.testing.assert_array_equal(logits, expected[number])

    check()
    for seed in range(4):  # a generation with neighbours: many small steps
        result = in_pieces(backends[1], SEQUENCES, np.random.default_rng(seed), (1, 1, 2, 5, 11))
        for logits, alone in zip(result, expected, strict=True):
            np.testing.assert_array_equal(logits, alone)


def test_earlier_contents_of_a_page_have_no_effect(checkpoints: dict[str, Path]) -> None:
    for name in ("llama", "gemma2"):
        for quantization in ("none", "int8"):
            backend = load(checkpoints[name], quantization)  # type: ignore[arg-type]
            expected = at_once(backend, SEQUENCES[0])
            backend._pages[:] = 0xFF  # NaN in float32 and float16
            np.testing.assert_array_equal(at_once(backend, SEQUENCES[0]), expected)


# Rewinding, copying, sharing


def test_feeding_from_an_earlier_position_rewinds(checkpoints: dict[str, Path]) -> None:
    backend, tokens, other = load(checkpoints["gemma2"], threads=2), ids(150, 1), ids(100, 9)
    pages = [9, 2, 5]
    for keep in (149, 128, 100, 64, 63, 1, 0):
        at_once(backend, tokens, pages)
        fresh = tokens[:keep] + other[: 150 - keep]
        result = backend.feed([chunk(fresh[keep:], keep, pages)])
        np.testing.assert_array_equal(result, at_once(backend, fresh, [20, 21, 22])[keep:])


def test_pages_are_shared_and_copied(checkpoints: dict[str, Path]) -> None:
    """Three answers to one prompt share its full page and have copies of its last page."""
    backend, prompt = load(checkpoints["mixtral"], "int8", threads=2), ids(100, 1)
    ends = [ids(40, seed) for seed in (5, 6, 7)]
    at_once(backend, prompt, [7, 3])
    backend.copy_pages([(3, 11), (3, 12)])
    chunks = [
        chunk(end, 100, pages, number)
        for number, (end, pages) in enumerate(zip(ends, ([7, 3, 20], [7, 11, 21], [7, 12, 22]), strict=True))
    ]
    result = np.split(backend.feed(chunks), 3)
    for end, logits in zip(ends, result, strict=True):
        np.testing.assert_array_equal(logits, at_once(backend, prompt + end, [30, 31, 32])[100:])
    backend.release(0)


# Wanted rows and limits


def two_sequences(outputs: list[range]) -> list[Any]:
    pages = ([1, 2, 3], [4, 5])
    tokens = (SEQUENCES[0], SEQUENCES[1])
    return [chunk(tokens[n], 0, pages[n], n, outputs[n]) for n in (0, 1)]


@pytest.mark.parametrize(
    "outputs",
    [
        [range(150), range(70)],
        [range(0, 150, 2), range(0, 70, 3)],
        [range(0), range(69, 70)],
        [range(LOGIT_ROWS), range(0)],
        [range(LOGIT_ROWS), range(1)],
        [range(149, 150), range(0)],
    ],
)
def test_any_tokens_may_be_outputs(outputs: list[range], checkpoints: dict[str, Path]) -> None:
    backend = load(checkpoints["llama"], "int8", threads=2)
    whole = [at_once(backend, tokens) for tokens in SEQUENCES[:2]]
    expected = np.concatenate([rows[list(places)] for rows, places in zip(whole, outputs, strict=True)])
    first = backend.feed(two_sequences(outputs))
    np.testing.assert_array_equal(first, expected)
    backend.feed([chunk([7])])
    np.testing.assert_array_equal(first, expected)  # not overwritten by the next step
    count = len(expected)
    targets = [[place % 61, 60] if place % 4 else [] for place in range(count)]
    values, likeliest = backend.logprobs(two_sequences(outputs), targets)
    logs = torch.log_softmax(torch.from_numpy(expected).double(), -1).numpy()
    flat = [(place, token) for place, tokens in enumerate(targets) for token in tokens]
    np.testing.assert_allclose(values, [logs[place, token] for place, token in flat], atol=1e-5, rtol=0)
    assert likeliest.tolist() == [int(logs[place].argmax()) == token for place, token in flat]


def test_a_chunk_without_outputs_fills_the_pages(checkpoints: dict[str, Path]) -> None:
    backend, tokens = load(checkpoints["gpt_neox"], threads=2), SEQUENCES[0]
    assert backend.feed([chunk(tokens[:149], outputs=())]).shape == (0, 61)
    result = backend.feed([chunk(tokens[149:], 149)])
    np.testing.assert_array_equal(result[0], at_once(backend, tokens)[149])


def test_logprobs_of_logits_far_apart(make: Make) -> None:
    """The exponential of their differences is 0 in float32; their log-probabilities are finite."""
    theirs, directory = make("llama")
    with torch.no_grad():
        theirs.lm_head.weight *= 300
    theirs.save_pretrained(directory)
    backend, tokens = load(directory), ids(20)
    expected = torch.log_softmax(torch.from_numpy(at_once(backend, tokens)).double(), -1)
    assert expected.min() < -500
    values, _ = backend.logprobs([chunk(tokens)], [list(range(61))] * 20)
    np.testing.assert_allclose(values.reshape(20, 61), expected.numpy(), rtol=1e-5, atol=1e-4)


def filled(backend: CPUBackend, tokens: int, chunks: int) -> list[Any]:
    sizes = [len(part) for part in np.array_split(np.arange(tokens), chunks)]
    return [
        chunk(SEQUENCES[0][:size], 0, [3 * n, 3 * n + 1, 3 * n + 2], n, [size - 1])
        for n, size in enumerate(sizes)
    ]


def test_a_step_takes_its_largest_numbers_of_tokens_and_chunks(checkpoints: dict[str, Path]) -> None:
    for name in ("llama", "mixtral"):
        backend = load(checkpoints[name], "int8", threads=2)
        rows = at_once(backend, SEQUENCES[0])
        for tokens, chunks in (
            (backend.max_tokens, 4),
            (backend.max_tokens, MAX_CHUNKS),
            (MAX_CHUNKS, MAX_CHUNKS),
        ):
            calls = filled(backend, tokens, chunks)
            result = backend.feed(calls)
            np.testing.assert_array_equal(result, rows[[len(call.tokens) - 1 for call in calls]])


def test_more_tokens_or_chunks_are_refused(checkpoints: dict[str, Path]) -> None:
    """They must not overwrite other memory."""
    backend = load(checkpoints["llama"])
    for tokens, chunks in ((backend.max_tokens + 1, 4), (MAX_CHUNKS + 1, MAX_CHUNKS + 1)):
        with pytest.raises((ValueError, IndexError)):
            backend.feed(filled(backend, tokens, chunks))
    expected = at_once(load(checkpoints["llama"]), SEQUENCES[1])
    np.testing.assert_array_equal(at_once(backend, SEQUENCES[1]), expected)


# Weights in fewer bits


def int8_values(w: torch.Tensor) -> torch.Tensor:
    """Round each 32 weights of a row to 255 steps, whose size is a float16."""
    raw = encode(w.numpy(), "Q8_0")
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))


def rounded_activations(levels: int) -> Any:
    """Return a hook that rounds a module's input to whole multiples of a step for each 32 values."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        groups = inputs[0].unflatten(-1, (-1, 32))
        steps = groups.abs().amax(-1, keepdim=True) / levels
        return (((groups / steps).round() * steps).flatten(-2),)

    return hook


WHOLE_GROUPS = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


@torch.no_grad()
def test_int8_equals_torch_with_the_same_roundings(make: Make) -> None:
    """The model has one layer, so that a value rounded the other way changes only its own row."""
    theirs, directory = long_model(make, "llama", num_hidden_layers=1, **WHOLE_GROUPS)
    for parameter in theirs.parameters():
        if parameter.ndim == 2:  # rounding is to be seen, not to be magnified
            parameter *= 0.2
    theirs.save_pretrained(directory)
    exact = expected_logits(theirs, ids(100))
    result = at_once(load(directory, "int8", exact=True), ids(100))
    for parameter in theirs.parameters():
        if parameter.ndim == 2:
            parameter.copy_(int8_values(parameter))
    weights_only = expected_logits(theirs, ids(100))
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            wide = name.endswith(("q_proj", "k_proj", "v_proj", "lm_head"))
            module.register_forward_pre_hook(rounded_activations(127 * 255 if wide else 127))
    both = expected_logits(theirs, ids(100))
    size = exact.std()
    off = np.abs(result - both).max(-1) / size
    assert np.quantile(off, 0.7) < 1e-5 and off.max() < 0.1
    assert np.sqrt(np.square(result - weights_only).mean()) < 0.03 * size
    assert np.sqrt(np.square(result - exact).mean()) < 0.04 * size


MIXED = {
    "q_proj": "Q4_0", "k_proj": "Q8_0", "v_proj": "Q6_K", "o_proj": "Q4_K", "gate_proj": "Q5_0", "up_proj": "Q4_1",
    "down_proj": "Q5_K", "embed_tokens": "Q5_1", "lm_head": "Q6_K",
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_files_own_blocks_are_computed_with_whatever_their_types(
    family: str, uniform: bool, make: Make
) -> None:
    """Each weight has a type of its own: one below the other, or in alternation, with biases and experts."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    if family == "gpt2":
        sizes = {"n_embd": 256, "n_inner": 256, "n_head": 4}
    theirs, directory = make(family, **sizes)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:  # so that the rounding of activations sends no row to other experts
                parameter *= 0.3
    theirs.save_pretrained(directory)
    weights = Weights(directory)
    blocks: dict[str, Blocks | None] = {}

    def type_of(name: str) -> str:
        kind = "F16" if uniform and name.endswith("v_proj.weight") else MIXED.get(name.split(".")[-2], "F32")
        return "Q5_0" if uniform and kind in FORMATS else kind

    def blocks_of(name: str) -> Blocks | None:
        if name not in blocks:
            kind = type_of(name)
            blocks[name] = Blocks(kind, encode(weights(name), kind)) if kind in FORMATS else None
        return blocks[name]

    def values_of(name: str) -> Any:
        own = blocks_of(name) if name.endswith(".weight") and weights(name).ndim == 2 else None
        if own is None:
            return weights(name)
        return gguf.quants.dequantize(own.data, gguf.GGMLQuantizationType[own.type])

    logits = []
    for types, own in ((lambda name: "F32", lambda name: None), (type_of, blocks_of)):
        places, memory = pack(weights.config, types, values_of, own)
        backend = CPUBackend(weights.config, places, memory, quantization="none", threads=2)
        logits.append(at_once(backend, ids(60)))
    relative = np.sqrt(np.square(logits[1] - logits[0]).mean()) / logits[0].std()
    assert 0.0005 < relative < 0.05  # activations are rounded


@torch.no_grad()
def test_bf16_equals_torch_with_rounded_weights(make: Make) -> None:
    theirs, directory = long_model(make, "qwen3", **WHOLE_GROUPS)
    result = at_once(load(directory, "bf16"), ids(100))
    for parameter in theirs.parameters():
        if parameter.ndim == 2:
            parameter.copy_(parameter.bfloat16())
    expected = expected_logits(theirs, ids(100))
    assert np.abs(result - expected).max() < 0.02 * expected.std()  # keys and values are in float16
    theirs.bfloat16().save_pretrained(directory)  # norms too
    stored = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    backend = load(directory)  # "none" keeps what is stored, keys and values are float32
    np.testing.assert_allclose(
        at_once(backend, ids(100)), expected_logits(stored.eval(), ids(100)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("quantization", "error"), [("bf16", 0.01), ("int8", 0.05), ("int4", 0.45)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_the_error_of_fewer_bits_is_within_bounds(
    family: str, quantization: Any, error: float, make: Make
) -> None:
    theirs, directory = make(family)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter *= 0.3
    theirs.save_pretrained(directory)
    expected = expected_logits(theirs, ids(60))
    result = at_once(load(directory, quantization), ids(60))
    relative = np.sqrt(np.square(result - expected).mean()) / expected.std()
    assert error / 50 < relative < error
