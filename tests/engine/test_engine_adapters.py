"""Adapters chosen by request: on one engine and one base, each request gets the output of its own adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import FakeBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import CASES, logits_of, make_adapter
from safetensors.torch import load_file, save_file

from tercet.engine.backend import Chunk
from tercet.engine.engine import Engine
from tercet.engine.grammar import Grammar
from tercet.engine.load import load_engine, load_transformers_engine
from tercet.engine.request import Completion, Request, Sampling
from tercet.engine.torch_backend import TorchBackend
from tercet.errors import UserError
from tercet.model.loading import load_model
from tercet.model.tokenizer import Tokenizer
from tiny_checkpoints import Make

HEADER = tuple(range(20, 20 + 150))  # two pages and more


@pytest.fixture
def base(make: Make, byte_level: Tokenizer) -> Path:
    """A llama of 300 tokens that takes 256 of them."""
    _, directory = make("llama", vocab_size=300, max_position_embeddings=256)
    byte_level.save(directory)
    return directory


@pytest.fixture
def both(base: Path, tmp_path: Path) -> dict[str, Path]:
    """Two adapters of different layers and ranks."""
    make_adapter(base, tmp_path / "one")
    make_adapter(base, tmp_path / "other", seed=4, r=2, target_modules=["v_proj", "down_proj"])
    return {"one": tmp_path / "one", "other": tmp_path / "other"}


def on_cpu(base: Path, adapters: dict[str, Path] | None = None, **options: Any) -> Engine:
    return load_engine(base, device="cpu", adapters=adapters, **({"quantize": "none"} | options))


def on_torch(base: Path, adapters: dict[str, Path]) -> Engine:
    engine = Engine(TorchBackend(load_model(base)), Tokenizer.load(base), [])
    for name, directory in adapters.items():
        engine.add_adapter(name, directory)
    return engine


def greedy(tokens: tuple[int, ...], adapter: str | None, count: int = 8) -> Request:
    return Request(
        tokens, Sampling(temperature=0, max_tokens=count, logprobs=2, ignore_eos=True), adapter=adapter
    )


def close(completion: Completion, reference: Completion, exact: bool = False) -> None:
    assert completion.tokens == reference.tokens
    logprobs, expected = (
        [token.logprob for token in side.logprobs or []] for side in (completion, reference)
    )
    assert logprobs == (expected if exact else pytest.approx(expected, abs=1e-4))


# PyTorch


@pytest.mark.parametrize("case", CASES)
def test_torch_gives_the_logits_of_peft(make: Make, tmp_path: Path, case: str) -> None:
    family, fields, lora = CASES[case]
    base_model, base = make(family, **fields)
    models = [base_model]
    backend = TorchBackend(load_model(base), page_size=4)
    for number, name in enumerate(("one", "other")):
        models.append(make_adapter(base, tmp_path / name, number, **lora))
        assert backend.add_adapter(tmp_path / name) == number + 1
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 61, length).tolist() for length in (14, 14, 9, 12, 14)]
    adapters, cut = [1, 0, 2, 1, 2], 6
    for start, end in ((0, cut), (cut, cut + 1), (cut + 1, 20)):
        chunks = [
            Chunk(n, row[start:end], start, range(4 * n, 4 * n + 4), range(len(row[start:end])), adapter)
            for n, (row, adapter) in enumerate(zip(rows, adapters, strict=True))
        ]
        expected = [
            logits_of(models[adapter], row)[start:end] for row, adapter in zip(rows, adapters, strict=True)
        ]
        np.testing.assert_allclose(backend.feed(chunks), np.concatenate(expected), atol=1e-4, rtol=0)


def test_bfloat16_on_torch_is_near(make: Make, tmp_path: Path) -> None:
    _, base = make("llama")
    model = make_adapter(base, tmp_path / "adapter")
    backend = TorchBackend(load_model(base, torch.bfloat16))
    backend.add_adapter(tmp_path / "adapter")
    logits = backend.feed([Chunk(0, [5, 6, 7], 0, [0], range(3), 1)])
    expected = logits_of(model, [5, 6, 7])
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


# Requests


@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_requests_get_what_the_merged_adapter_gives(
    base: Path, both: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests run at once, with a common header, for which each adapter has its own keys and values."""
    engine = on_cpu(base, both) if kind == "kernels" else on_torch(base, both)
    requests = [
        greedy((*HEADER, number), name) for number in (5, 6) for name in ("one", None, "other", "one")
    ]
    merged = {name: on_cpu(directory) for name, directory in both.items()} | {None: on_cpu(base)}
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        [alone] = merged[request.adapter].generate([greedy(request.tokens, None)])  # type: ignore[index]
        close(completion, alone)
    written = {
        name: engine.generate([greedy((*HEADER, 5), name)])[0].tokens for name in ("one", "other", None)
    }
    assert len({tuple(tokens) for tokens in written.values()}) == 3, (
        "the adapters differ, so the test can fail"
    )


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_neighbours_with_other_adapters_change_no_bit(
    base: Path, both: dict[str, Path], quantize: str
) -> None:
    engine = on_cpu(base, both, quantize=quantize, threads=2)
    requests = [greedy((*HEADER[: 9 * n], n + 5), name) for n in range(5) for name in ("one", None, "other")]
    alone = [
        on_cpu(base, both, quantize=quantize, threads=1).generate([request])[0] for request in requests[:6]
    ]
    for completion, expected in zip(engine.generate(requests), alone, strict=False):
        close(completion, expected, exact=True)
    plain = on_cpu(base, quantize=quantize).generate([requests[1]])[0]
    close(engine.generate([requests[1]])[0], plain, exact=True)


def test_a_cached_prefix_is_reused_by_the_same_adapter_only(base: Path, both: dict[str, Path]) -> None:
    engine = on_cpu(base, both)
    fed: list[int] = []
    feed = engine.backend.feed
    engine.backend.feed = lambda chunks: (
        fed.append(sum(len(chunk.tokens) for chunk in chunks)) or feed(chunks)
    )  # type: ignore[method-assign, func-returns-value]
    for name, missing in (("one", 151), ("one", 23), ("other", 151), (None, 151), ("other", 23), (None, 23)):
        fed.clear()
        engine.generate([greedy((*HEADER, 5), name, 1)])
        assert fed == [missing]


def test_scores_choices_vectors_and_log_probabilities_are_the_merged_adapters(
    base: Path, both: dict[str, Path]
) -> None:
    engine = on_cpu(base, both)
    pairs = [("The quick brown", " fox"), ("Once upon", " a time")]
    tokens = [list(HEADER), [5, 6, 7]]
    texts, choices = ["The quick", "The other"], [[" dog", " fox jumps"], [" one"]]
    for name in ("one", "other", None, "one"):
        merged = on_cpu(base if name is None else both[name])
        scores, expected = engine.score(pairs, adapter=name), merged.score(pairs)
        for score, expected_score in zip(scores, expected, strict=True):
            assert score.token_logprobs == pytest.approx(expected_score.token_logprobs, abs=1e-4)
        for entry, expected_entry in zip(
            engine.choose(texts, choices, adapter=name), merged.choose(texts, choices), strict=True
        ):
            assert entry == pytest.approx(expected_entry, abs=1e-4)
        np.testing.assert_allclose(engine.embed(tokens, adapter=name), merged.embed(tokens), atol=1e-4)
        for row, other_row in zip(
            engine.prompt_logprobs(tokens, 1, adapter=name), merged.prompt_logprobs(tokens, 1), strict=True
        ):
            assert [entry.logprob for entry in row[1:] if entry] == pytest.approx(
                [entry.logprob for entry in other_row[1:] if entry], abs=1e-4
            )


names = st.sampled_from([None, "one", "other"])
requests = st.builds(
    lambda long, tail, seed, adapter: Request(
        (*range(10, 19 if long else 11), *tail),
        Sampling(max_tokens=6, seed=seed, temperature=1.0, ignore_eos=True),
        adapter=adapter,
    ),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple),
    st.integers(0, 3),
    names,
)


@settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(requests, min_size=1, max_size=7),
    st.sampled_from([9, 20, 200]),
    st.sampled_from([1, 3, 20, 64]),
    st.sampled_from([None, "ngram"]),
    names,
)
def test_a_request_gets_the_same_alone_and_in_any_mixture_of_adapters(
    byte_level: Tokenizer,
    tmp_path: Path,
    requests: list[Request],
    pages: int,
    max_tokens: int,
    speculation: Any,
    scored: str | None,
) -> None:
    """The backend asserts that no slot that is read was computed with another adapter."""

    def engine_with(**shape: int) -> Engine:
        engine = Engine(FakeBackend(byte_level.vocab_size, **shape), byte_level, [], speculation=speculation)
        engine.add_adapter("one", tmp_path)
        engine.add_adapter("other", tmp_path)
        return engine

    expected = [engine_with(num_pages=200).generate([request])[0].tokens for request in requests]
    engine = engine_with(num_pages=pages, max_tokens=max_tokens)
    handles = [engine.submit(request) for request in requests]
    deltas = engine.step() + engine.step()
    prompts, labels = ["The quick", "The quick brown"], [[" dog", " fox"], ["s"]]
    chosen = engine.choose(prompts, labels, adapter=scored)
    assert chosen == [
        pytest.approx(row, abs=1e-5)
        for row in engine_with(num_pages=200).choose(prompts, labels, adapter=scored)
    ]
    while engine.has_work:
        deltas += engine.step()
    ended = {delta.index: delta.completion.tokens for delta in deltas if delta.completion}
    assert [ended[handle] for handle in handles] == expected


# Tokenizers and stop tokens


def test_an_adapter_brings_its_stop_tokens_and_chat_template(
    base: Path, both: dict[str, Path], byte_level: Tokenizer
) -> None:
    engine = on_cpu(base, both)
    [free] = engine.generate([greedy((5, 6, 7), "one")])
    stop = free.tokens[2]
    assert stop not in free.tokens[:2]
    (both["one"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    byte_level.with_template("{{ messages }}").save(both["one"])
    engine = on_cpu(base, both)
    request = Request((5, 6, 7), Sampling(temperature=0, max_tokens=8), adapter="one")
    [ended] = engine.generate([request])
    assert (ended.tokens, ended.finish_reason) == (free.tokens[:3], "stop")
    assert engine.stop_ids_of("one") == {stop, byte_level.eos_id} == on_cpu(both["one"]).stop_ids
    assert engine.stop_ids_of("other") == engine.stop_ids_of(None) == engine.stop_ids
    assert engine.tokenizer_of("one").chat_template == "{{ messages }}"
    assert engine.tokenizer_of("other").chat_template is engine.tokenizer_of(None).chat_template is None


def test_a_grammar_ends_with_the_adapters_stop_tokens(base: Path, both: dict[str, Path]) -> None:
    (both["one"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [77]}))
    engine = on_cpu(base, both)
    for name in ("one", "other", None):
        requests = [
            Request((5, 6), Sampling(max_tokens=60, seed=seed), Grammar.regex("[a-c]{1,50}"), adapter=name)
            for seed in range(12)
        ]
        done = engine.generate(requests)
        assert all(completion.text and set(completion.text) <= set("abc") for completion in done)
        ends = {completion.tokens[-1] for completion in done} & {77, *engine.stop_ids}
        assert ends and ends <= engine.stop_ids_of(name) and (77 in ends) == (name == "one")


# Refusals


def test_names_are_checked(base: Path, both: dict[str, Path]) -> None:
    engine = on_cpu(base, both)
    with pytest.raises(UserError, match="there is an adapter 'one' already"):
        engine.add_adapter("one", both["other"])
    for call in (
        lambda: engine.generate([greedy((5,), "two")]),
        lambda: engine.submit(greedy((5,), "two")),
        lambda: engine.score([("a", "b")], adapter="two"),
        lambda: engine.choose(["a"], [["b"]], adapter="two"),
        lambda: engine.embed([[5]], adapter="two"),
        lambda: engine.prompt_logprobs([[5]], adapter="two"),
    ):
        with pytest.raises(UserError, match="no adapter 'two' beside this model; there are: one, other"):
            call()
    with pytest.raises(UserError, match="there are: none"):
        on_cpu(base).generate([greedy((5,), "one")])


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embeddings and the head can't be adapted"),
        ({"target_modules": ["nothing"]}, "matches no layer"),
        ({"r": 5}, "require [5, 32]"),
        ({"bias": "all"}, "bias"),
    ],
)
@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_adapters_that_change_more_than_linear_layers_or_do_not_fit_are_refused(
    base: Path, both: dict[str, Path], fields: dict[str, Any], part: str, kind: str
) -> None:
    engine = on_cpu(base) if kind == "kernels" else on_torch(base, {})
    change_config(both["one"], **fields)
    with pytest.raises(UserError) as caught:
        engine.add_adapter("one", both["one"])
    assert part in str(caught.value) and str(both["one"]) in str(caught.value)
    engine.add_adapter("one", both["other"])  # nothing of the refused adapter remains
    assert engine.generate([greedy((5, 6), "one")])[0].tokens


def test_an_adapter_of_another_base_is_refused(make: Make, base: Path, tmp_path: Path) -> None:
    _, wide = make("qwen3", vocab_size=300, hidden_size=48)
    make_adapter(wide, tmp_path / "wide")
    engine = on_cpu(base)
    with pytest.raises(UserError, match="check that this is the base that the adapter was trained on"):
        engine.add_adapter("wide", tmp_path / "wide")
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        engine.add_adapter("base", base)


def test_missing_weights_are_reported(base: Path, both: dict[str, Path]) -> None:
    path = both["one"] / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(UserError, match="is missing"):
        on_cpu(base, both)
    path.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        on_cpu(base, both)


def test_a_tokenizer_with_other_tokens_is_refused(
    base: Path, both: dict[str, Path], sentencepiece: Tokenizer
) -> None:
    sentencepiece.save(both["one"])
    with pytest.raises(UserError, match="its tokenizer differs from the base's"):
        on_cpu(base, both)


def test_an_adapter_as_model_takes_no_further_adapters(base: Path, both: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="is an adapter, merged into its base"):
        on_cpu(both["one"], {"other": both["other"]})


def test_models_of_transformers_take_no_adapters(base: Path, both: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="merge it first"):
        load_transformers_engine(base).add_adapter("one", both["one"])


def test_the_weights_are_shared(base: Path, both: dict[str, Path], tmp_path: Path) -> None:
    """The base's packed weights are neither copied nor changed."""
    engine = on_cpu(base, quantize="int8")
    memory = engine.backend._memory  # type: ignore[attr-defined]
    before = memory.copy()
    for name, directory in both.items():
        engine.add_adapter(name, shutil.copytree(directory, tmp_path / f"copy-{name}"))
        shutil.rmtree(tmp_path / f"copy-{name}")
    engine.generate([greedy((5, 6), name) for name in both])
    assert engine.backend._memory is memory  # type: ignore[attr-defined]
    np.testing.assert_array_equal(memory, before)
