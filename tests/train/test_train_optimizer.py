"""Muon against its definition by singular values, AdamW's groups, and the state of a resumed run."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from tercet.train.cpu.muon import orthogonal
from tercet.train.optimizer import POLAR, Muon, Optimizer, Rates, orthogonalized


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_orthogonalised_matrix_is_near_the_polar_factor(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 1e-3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar = left @ right
    result = orthogonalized(matrix, dtype=dtype).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.25
    assert float((result - polar).norm() / polar.norm()) < 0.21, "the error of the polynomials"


def test_each_polynomial_is_as_near_to_one_as_can_be_on_what_is_left() -> None:
    """Compare the coefficients with the solution of a linear program, an independent derivation."""
    low, high = 0.003, 1.0
    for coefficients in POLAR:
        x = np.concatenate([np.geomspace(low, high, 1500), np.linspace(low, high, 1500)])
        powers, ones = np.stack([x, x**3, x**5], axis=1), np.ones((len(x), 1))
        solved = linprog(
            [0, 0, 0, 1],
            A_ub=np.block([[powers, -ones], [-powers, -ones]]),
            b_ub=np.concatenate([ones[:, 0], -ones[:, 0]]),
            bounds=[(None, None)] * 3 + [(0, None)],
        )
        error = float(np.abs(1 - powers @ np.array(coefficients)).max())
        assert error == pytest.approx(solved.x[3], rel=1e-3)
        low, high = 1 - error, 1 + error
    assert error < 0.2


def test_singular_values_that_differ_a_hundredfold_become_alike() -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(40, 40))[0] for _ in range(2))
    matrix = left @ torch.diag(torch.logspace(0, -2, 40)) @ right
    values = torch.linalg.svdvals(orthogonalized(matrix, dtype=torch.float32))
    assert values.min() > 0.5 and values.max() < 1.25


def test_a_zero_gradient_is_no_update() -> None:
    assert torch.equal(orthogonalized(torch.zeros(8, 16)), torch.zeros(8, 16, dtype=torch.bfloat16))


def test_two_steps_of_muon_by_hand() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(12, 6))
    start, gradients = parameter.detach().clone(), [torch.randn(12, 6) for _ in range(2)]
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32)
    momentum, expected = torch.zeros(12, 6), start.clone()
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = 0.9 * momentum + 0.1 * gradient
        left, _, right = torch.linalg.svd(ahead, full_matrices=False)
        # A matrix of 12 by 6 moves the root of 12 / 6 times as far.
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * left @ right
    assert float((parameter.detach() - expected).norm() / (expected - start).norm()) < 0.1


def test_two_steps_with_rows_made_even_by_hand() -> None:
    """NorMuon as in its paper, except that the update keeps the length of the orthogonal matrix."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(12, 6))
    expected, gradients = parameter.detach().clone(), [torch.randn(12, 6) for _ in range(2)]
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, row_decay=0.8, dtype=torch.float32)
    momentum, square = torch.zeros(12, 6), torch.zeros(12, 1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalized(0.9 * momentum + 0.1 * gradient, dtype=torch.float32)
        square = 0.8 * square + 0.2 * direction.square().mean(dim=1, keepdim=True)
        even = direction / square.sqrt()
        expected = expected - 0.1 * 2**0.5 * even * direction.norm() / even.norm()
    assert torch.allclose(parameter.detach(), expected, atol=1e-5)


def test_a_row_without_a_gradient_stays_and_others_move() -> None:
    parameter = nn.Parameter(torch.ones(4, 8))
    optimizer = Muon([parameter], lr=0.1, row_decay=0.95, dtype=torch.float32)
    for gradient in (torch.zeros(4, 8), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))):
        gradient[2] = 0
        parameter.grad = gradient
        optimizer.step()
        assert parameter.isfinite().all() and torch.equal(parameter[2], torch.ones(8))
    assert not torch.equal(parameter[1], torch.ones(8))


def named() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (20, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 16),
        "model.norm.weight": (8,),
        "lm_head.weight": (20, 8),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


RATES = Rates("muon", 0.02, embedding=0.03, head=0.004, vectors=0.01, weight_decay=0.0)


def step(parameters: dict[str, nn.Parameter], optimizer: Optimizer, seed: int, rate: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(rate)


def test_each_group_moves_at_its_own_rate() -> None:
    parameters = named()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    step(parameters, Optimizer(parameters, RATES), 0, rate=0.5)
    moved = {name: (p.detach() - before[name]).abs() for name, p in parameters.items()}
    # The first step of Adam moves every weight by the rate.
    for name, rate in (
        ("model.embed_tokens.weight", 0.03),
        ("lm_head.weight", 0.004),
        ("model.norm.weight", 0.01),
    ):
        assert torch.allclose(moved[name], torch.full_like(moved[name], 0.5 * rate), rtol=1e-3), name
    update = moved["model.layers.0.mlp.up_proj.weight"]
    # An orthogonal matrix of 16 by 8 has eight singular values of 1; a tall one moves the root of 2 as far.
    assert float(update.norm()) == pytest.approx(0.01 * 2**0.5 * 8**0.5, rel=0.2)
    assert update.max() < 0.01


def test_a_restored_state_continues_exactly() -> None:
    original, resumed = named(), named()
    first, second = Optimizer(original, RATES), Optimizer(resumed, RATES)
    for seed in range(3):
        step(original, first, seed)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(original[name])
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for seed in range(3, 6):
        step(original, first, seed)
        step(resumed, second, seed)
    assert all(torch.equal(original[name], resumed[name]) for name in original)


def test_more_threads_give_the_same_update() -> None:
    single, double = named(), named()
    step(single, Optimizer(single, RATES), 0)
    step(double, Optimizer(double, RATES, threads=2), 0)
    assert all(torch.equal(single[name], double[name]) for name in single)


def test_adamw_is_torchs_own() -> None:
    mine, theirs = named(), named()
    optimizer = Optimizer(mine, Rates("adamw", 0.01, weight_decay=0.1))
    matrices = [p for n, p in theirs.items() if p.dim() == 2 and "embed" not in n]
    undecayed = [p for n, p in theirs.items() if p.dim() == 1 or "embed" in n]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95),
    )  # fmt: skip
    for seed in range(3):
        step(mine, optimizer, seed)
        for name, parameter in theirs.items():
            parameter.grad = None if mine[name].grad is None else mine[name].grad.clone()  # type: ignore[union-attr]
        reference.step()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-6), name


@pytest.mark.parametrize("shape", [(48, 48), (66, 200), (200, 66), (2, 64), (130, 34)])
@pytest.mark.parametrize("row_decay", [0.0, 0.95])
def test_the_written_out_step_is_the_same(
    shape: tuple[int, int], row_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the step of `train.cpu.muon` with the step by PyTorch's operations, which the tests above check."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) * 10.0**power for power in (-6, 0, 3)]
    moved, states = [], []
    for by_pairs in (False, True):
        parameter = nn.Parameter(start.clone())
        muon = Muon([parameter], 0.02, 0.9, 0.1, row_decay=row_decay, dtype=torch.bfloat16)
        monkeypatch.setattr(muon, "_by_pairs", lambda _, chosen=by_pairs: chosen)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            muon.step()
        moved.append(parameter.detach() - start)
        states.append(muon.state[parameter])
    assert float((moved[1] - moved[0]).norm() / moved[0].norm()) < 0.02, (
        "equal except for rounding to bfloat16"
    )
    assert states[0].keys() == states[1].keys(), "each can resume from the other's state"
    for name, value in states[0].items():
        assert states[1][name].shape == value.shape
        torch.testing.assert_close(states[1][name], value, rtol=0.1, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize("shape", [(64, 64), (66, 200), (200, 66), (150, 260), (260, 150)])
def test_written_out_polynomials_act_on_singular_values(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.02, 1, min(shape), dtype=torch.float64)
    matrix = ((left * values) @ right).bfloat16()
    result = orthogonal(matrix.view(torch.uint16).numpy().copy(), np.array(POLAR[:2], np.float32))
    for a, b, c in POLAR[:2]:
        values = a * values + b * values**3 + c * values**5
    expected = (left * values) @ right
    error = (torch.from_numpy(result).view(torch.bfloat16).double() - expected).norm()
    assert float(error / expected.norm()) < 0.03, (
        "equal except for rounding errors, which the first polynomial multiplies by eight"
    )
