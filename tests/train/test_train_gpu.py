"""Training on a GPU, compared with float32 on the CPU; skipped on machines without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tercet.compose import build
from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.pretrain.initialize import initialize
from tercet.pretrain.plan import network
from tercet.train import loss as loss_module
from tercet.train.batch import Batch
from tercet.train.compilation import compile_blocks
from tercet.train.gradients import Autograd
from tercet.train.loop import Recipe, train
from tercet.train.loss import losses_of
from tercet.train.optimizer import Muon, Rates
from tercet.train.schedule import Schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
BF16 = torch.bfloat16
SHARED = replace(network(2, 128, 512, 256), num_heads=4, num_kv_heads=2, head_dim=32)
WINDOWED = replace(SHARED, windows=(64, None))
CAPPED = replace(SHARED, attention_softcap=20.0, logit_softcap=10.0)
CONFIGS = {"shared": SHARED, "windowed": WINDOWED, "capped": CAPPED}


def make(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    model = Transformer(config, compute_dtype=dtype)
    initialize(model, 0)
    return model.to(device)


def packed(rows: int = 4, seed: int = 0, longest: int = 120, vocab: int = 512, time: int = 256) -> Batch:
    """Random documents of unequal lengths, each position supervised."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, time + 1), generator=generator)
    segments = torch.zeros(rows, time, dtype=torch.long)
    positions = torch.zeros(rows, time, dtype=torch.long)
    for row in range(rows):
        at = 0
        while at < time:
            segments[row, at:] += 1
            positions[row, at:] = torch.arange(time - at)
            at += int(torch.randint(3, longest, (), generator=generator))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, segments)


def gradients(model: Transformer, batch: Batch) -> torch.Tensor:
    """All gradients in one vector, float32, on the CPU."""
    Autograd(model).gradients([batch])
    return torch.cat([p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None])


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_in_float32_equal_those_of_the_cpu(name: str) -> None:
    batch = packed()
    assert (
        relative_error(gradients(make(CONFIGS[name], GPU), batch), gradients(make(CONFIGS[name]), batch))
        < 1e-4
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("plain", [False, True])
def test_attention_by_document_is_masked_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, plain: bool
) -> None:
    batch = packed()
    batch = Batch(batch.tokens, batch.targets) if plain else batch
    exact = gradients(make(CONFIGS[name]), batch)
    model = make(CONFIGS[name], GPU, BF16)
    by_document = gradients(model, batch)
    monkeypatch.setattr(loss_module, "attends_by_document", lambda _: False)  # PyTorch's own choice
    masked = gradients(model, batch)
    assert relative_error(by_document, exact) < 1.3 * relative_error(masked, exact) < 0.05
    assert (name == "capped") == torch.equal(by_document, masked)


def test_compiled_blocks_are_compiled_once_for_any_documents() -> None:
    model = make(SHARED, GPU, BF16)
    batches = [packed(seed=seed, longest=longest) for seed, longest in enumerate((120, 40, 200))]
    exact = [gradients(make(SHARED), batch) for batch in batches]
    plain = [gradients(model, batch) for batch in batches]
    compile_blocks(model)
    gradients(model, batches[0])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    for batch, uncompiled, reference in zip(batches, plain, exact, strict=True):
        assert relative_error(gradients(model, batch), reference) < 1.3 * relative_error(
            uncompiled, reference
        )
    # A row without document numbers is a document, too.
    gradients(model, Batch(batches[0].tokens, batches[0].targets))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("whole", [False, True])
def test_forward_and_backward_never_wait_for_the_gpu(whole: bool) -> None:
    model = make(SHARED, GPU, BF16)
    batch = packed()
    if not whole:
        batch.targets[:, ::2] = loss_module.IGNORED
    losses_of(model, batch).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_of(model, batch).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_muon_moves_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    moved = []
    start = [torch.randn(64, 32), torch.randn(32, 96), torch.randn(64, 32)]
    for device in ("cpu", GPU):
        parameters = [torch.nn.Parameter(matrix.clone().to(device)) for matrix in start]
        optimizer = Muon(parameters, 0.1, dtype=torch.float32, row_decay=0.95, weight_decay=0.1)
        for step in range(3):
            for number, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(10 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        moved.append(torch.cat([parameter.detach().cpu().flatten() for parameter in parameters]))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-4)


def run(
    directory: Path, steps: int, stop: int | None = None, compiled: bool = False
) -> dict[str, torch.Tensor]:
    """Weights after ``steps``; ``stop``: the step at which the run fails, before it is resumed."""
    model = make(replace(SHARED, max_positions=1024), GPU, BF16)
    if compiled:
        compile_blocks(model)

    def batches_at(step: int) -> list[Batch]:
        if step == stop:
            raise ZeroDivisionError
        return [packed(seed=step, time=1024, longest=1500)]

    rates = Rates("muon", 0.02, embedding=0.02, weight_decay=0.0)
    recipe = Recipe(Schedule.of(steps), 0.02, rates=rates, save_seconds=0.0)
    try:
        train(model, recipe, batches_at, directory, fingerprint="x", title="test")
    except ZeroDivisionError:
        torch._dynamo.reset()  # as in a new process
        return run(directory, steps, compiled=compiled)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def test_a_resumed_compiled_run_ends_alike_whatever_was_compiled_before(tmp_path: Path) -> None:
    torch._dynamo.reset()
    other = make(SHARED, GPU, BF16)
    compile_blocks(other)
    gradients(other, packed(rows=3))  # like calibration, in another shape
    whole = run(tmp_path / "whole", 8, compiled=True)
    resumed = run(tmp_path / "resumed", 8, 3, compiled=True)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 12)
    assert all(torch.equal(value, whole[name]) for name, value in run(tmp_path / "again", 12).items())
    assert all(torch.equal(value, whole[name]) for name, value in run(tmp_path / "resumed", 12, 5).items())


def test_a_model_built_on_a_gpu_generates_the_same_on_the_cpu(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = (
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "dog",
        "ran",
        "to",
        "red",
        "house",
        "under",
        "tree",
    )
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(0, len(words), (6000,), generator=generator)
    text.write_text(" ".join(words[index] + ("." if not index else "") for index in order.tolist()))
    built = build(text, tmp_path / "run", tokens=60_000, layers=2, width=64, vocab_size=320, context=64)
    assert built.bits_per_byte < 2.5
    prompt = Request((5, 6, 7), Sampling(max_tokens=20, temperature=0.0))
    texts = [
        load_engine(built.model, dtype="float32", device=device).generate([prompt])[0].text
        for device in ("cuda", "cpu")
    ]
    assert texts[0] == texts[1] and texts[0]
