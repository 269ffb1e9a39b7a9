"""The written-out passes against PyTorch's own gradients, and the networks that they do not support."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from tercet.data.batches import IGNORED
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.train.batch import Batch
from tercet.train.cpu import kernels
from tercet.train.cpu.attention import QUERIES
from tercet.train.cpu.compiling import FAST
from tercet.train.cpu.passes import Rows
from tercet.train.cpu.products import PairedProducts, PlainProducts
from tercet.train.cpu.step import Stepper
from tercet.train.cpu.support import supports
from tercet.train.gradients import Autograd, gradients_of

CONFIG = ModelConfig(
    family="qwen3", vocab_size=130, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_positions=300, qk_norm="head", tie_embeddings=True,
)  # fmt: skip


def model_of(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, compute_dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no gradient is near zero and no norm is one
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def packed(time: int = 270) -> Batch:
    """Return three rows of one, two and three documents, one of them a single token; some are not supervised."""
    assert time > 2 * QUERIES, "more than one range of queries"
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 130, (3, time), generator=generator)
    targets = torch.randint(0, 130, (3, time), generator=generator)
    targets[0, :20] = IGNORED
    segments = torch.zeros(3, time, dtype=torch.long)
    segments[1, 150:], segments[2, 131:132], segments[2, 132:] = 1, 1, 2
    positions = torch.arange(time).repeat(3, 1)
    positions[1, 150:] -= 150
    positions[2, 131:132] -= 131
    positions[2, 132:] -= 132
    return Batch(tokens, targets, positions, segments)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert result.keys() == dict(model.named_parameters()).keys()
    return result


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


VARIANTS = {
    "as built": CONFIG,
    "untied": replace(CONFIG, tie_embeddings=False),
    "without qk norm": replace(CONFIG, qk_norm="none"),
    "no groups": replace(CONFIG, num_kv_heads=4),
    "one key head, odd sizes": replace(CONFIG, num_kv_heads=1, intermediate_size=70, vocab_size=131),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_loss_and_gradients_are_those_of_autograd(name: str, threads: int) -> None:
    model, batch = model_of(VARIANTS[name]), packed()
    loss, tokens = Autograd(model).gradients([batch])
    expected = gradients(model)
    own_loss, own_tokens = Stepper(model, threads).gradients([batch])
    assert (tokens, own_tokens) == (3 * 270 - 20, 3 * 270 - 20)
    assert own_loss == pytest.approx(float(loss), rel=1e-6)
    for parameter, value in gradients(model).items():
        assert distance(value, expected[parameter]) < 2e-5, parameter


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", ["as built", "no groups", "one key head"])
def test_in_bfloat16_gradients_are_within_its_rounding(
    name: str, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**VARIANTS, "one key head": replace(CONFIG, num_kv_heads=1, intermediate_size=70)}[name]
    products = PairedProducts() if paired else PlainProducts(torch.bfloat16)
    monkeypatch.setattr("tercet.train.cpu.step.products_for", lambda *_: products)
    exact = model_of(config)
    batch = packed()
    Autograd(exact).gradients([batch])
    expected = gradients(exact)
    rough = model_of(config, torch.bfloat16)
    Autograd(rough).gradients([batch])
    theirs = gradients(rough)
    Stepper(rough, 2).gradients([batch])
    for parameter, value in gradients(rough).items():
        # No further from float32 than PyTorch's own gradients in bfloat16, but for chance.
        assert (
            distance(value, expected[parameter])
            < 1.5 * distance(theirs[parameter], expected[parameter]) + 1e-3
        )


def test_several_batches_of_unequal_size_are_weighted_by_token() -> None:
    model, long = model_of(), packed()
    short = Batch(long.tokens[:1, :40], long.targets[:1, 20:60])
    empty = Batch(long.tokens[:1, :9], torch.full((1, 9), IGNORED))
    loss, tokens = Autograd(model).gradients([long, short])
    expected = gradients(model)
    own_loss = Stepper(model, 2).gradients([long, short, empty])
    assert own_loss[1] == tokens and own_loss[0] == pytest.approx(float(loss), rel=1e-6)
    for parameter, value in gradients(model).items():
        assert distance(value, expected[parameter]) < 2e-5, parameter


def test_a_step_repeats_bit_for_bit() -> None:
    model, batch = model_of(dtype=torch.bfloat16), packed()
    stepper = Stepper(model, 2)
    first = stepper.gradients([batch])[0]
    before = gradients(model)
    for _ in range(3):
        assert stepper.gradients([batch])[0] == first
        assert all(torch.equal(value, before[name]) for name, value in gradients(model).items())


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_no_sum_depends_on_where_arrays_lie_in_memory(dtype: Any) -> None:
    # LLVM's name for the choice between two versions of a loop that it makes by the arrays' distance. With
    # it about one short run in a hundred ended in other bytes than the run before.
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return generator.random(shape, np.float32)

    def values(*shape: int) -> Any:
        return numbers(*shape) if dtype is np.float32 else np.zeros(shape, dtype)

    eps, sees = np.float32(1e-6), np.zeros((1, 6), np.int64)
    calls: dict[Any, tuple[Any, ...]] = {
        kernels.softmax: (values(2, 12, 6), sees, 2, 0, 0),
        kernels.cross_entropy: (values(4, 40), np.arange(4), eps, eps, numbers(4)),
        kernels.add_and_norm: (numbers(4, 32), values(4, 32), numbers(32), eps, numbers(4, 32), values(4, 32), numbers(4)),
        kernels.norm_backward: (
            numbers(4, 32), numbers(32), numbers(4), values(4, 32), numbers(4, 32), numbers(32), values(4, 32),
        ),
        kernels.heads_backward: (
            values(6, 64), numbers(16), numbers(16), True, numbers(6, 8), numbers(6, 8), np.arange(6)[None], eps,
            numbers(6, 3), values(1, 12, 16), numbers(1, 6, 16), numbers(1, 6, 16), values(6, 64), numbers(16),
            numbers(16),
        ),
    }  # fmt: skip
    for kernel, arguments in calls.items():
        options = {key: value for key, value in kernel.targetoptions.items() if key != "nopython"}
        fresh = njit(pipeline_class=kernel._compiler.pipeline_class, **options)(kernel.py_func)
        fresh(*arguments)
        assert "vector.memcheck" not in "".join(fresh.inspect_llvm().values()), kernel.__name__
    careless = njit(fastmath=FAST)(kernels.softmax.py_func)
    careless(*calls[kernels.softmax])
    assert "vector.memcheck" in "".join(careless.inspect_llvm().values()), "LLVM still uses this name"


def test_the_z_loss_has_the_gradient_of_the_squared_log_normaliser() -> None:
    model, batch = model_of(), packed()
    logits = model(batch.tokens, batch.positions, batch.segments)
    chosen = batch.targets != IGNORED
    rows = logits[chosen]
    loss = torch.nn.functional.cross_entropy(rows, batch.targets[chosen])
    (loss + 0.1 * rows.logsumexp(-1).square().mean()).backward()  # type: ignore[no-untyped-call]
    expected = gradients(model)
    for work in (Stepper(model, 1, z_weight=0.1), Autograd(model, z_weight=0.1)):
        own_loss, _ = work.gradients([batch])
        assert own_loss == pytest.approx(float(loss.detach()), rel=1e-6), (
            "the reported loss is the cross-entropy alone"
        )
        for parameter, value in gradients(model).items():
            assert distance(value, expected[parameter]) < 2e-5, parameter


def test_the_callers_thread_count_stays_the_same() -> None:
    before = torch.get_num_threads()
    Stepper(model_of(), 2).gradients([packed()])
    assert torch.get_num_threads() == before


def test_a_nan_weight_shows_in_the_loss_or_the_gradients() -> None:
    for name, _ in model_of().named_parameters():
        model = model_of(dtype=torch.bfloat16)
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[5] = float("nan")
        loss, _ = Stepper(model, 1).gradients([packed()])
        finite = all(bool(value.isfinite().all()) for value in gradients(model).values())
        assert not (np.isfinite(loss) and finite), name


def test_rows_know_where_each_document_begins() -> None:
    batch = packed()
    assert batch.positions is not None and batch.segments is not None
    tensors = (batch.tokens, batch.targets, batch.positions, batch.segments)
    rows = Rows.of(*(tensor.numpy() for tensor in tensors))
    assert rows.begins[0].max() == 0
    assert rows.begins[1, 149] == 0 and (rows.begins[1, 150:] == 150).all()
    assert rows.begins[2, 131] == 131 and (rows.begins[2, 132:] == 132).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"norm": "layer"},
        {"activation": "gelu"},
        {"positions": "learned"},
        {"logit_softcap": 30.0},
        {"windows": (64, None)},
    ],
    ids=str,
)
def test_other_networks_are_left_to_autograd(changes: dict[str, Any]) -> None:
    model = Transformer(replace(CONFIG, **changes))
    assert not supports(model)
    assert isinstance(gradients_of(model, 1), Autograd)


def test_frozen_or_double_weights_are_left_to_autograd() -> None:
    assert supports(model_of())
    assert not supports(model_of().double())
    frozen = model_of()
    frozen.model.norm.requires_grad_(False)
    assert not supports(frozen)
