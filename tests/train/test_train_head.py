"""The head's loss in pieces, against PyTorch's cross-entropy and autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer
from tercet.pretrain.plan import network
from tercet.train import head
from tercet.train.head import Kernel, head_losses, piece_rows

WIDTH, VOCABULARY, ROWS = 32, 300, 21


def example(cap: float | None) -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = replace(network(1, WIDTH, VOCABULARY, 16), logit_softcap=cap, tie_embeddings=False)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    targets[[3, 20]] = IGNORED
    return Transformer(config), torch.randn(ROWS, WIDTH, requires_grad=True), targets


@pytest.mark.parametrize("kernel", [head._in_place, head._fusible])
@pytest.mark.parametrize("pieces", [1, 6])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, pieces: int, cap: float | None, z_weight: float
) -> None:
    monkeypatch.setattr(head, "_in_place", kernel)
    model, hidden, targets = example(cap)
    weight = model.lm_head.weight
    logits = hidden.double() @ weight.double().T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    z = z_weight * logits.logsumexp(-1)[targets != IGNORED].square().sum()
    expected = torch.autograd.grad(0.25 * (entropy + z), (hidden, weight))
    if pieces == 6:
        monkeypatch.setattr(head, "LARGEST_LOGITS", VOCABULARY * 5)
    assert -(-ROWS // piece_rows(VOCABULARY)) == pieces
    found = head_losses(model, hidden, targets, scale=0.25, z_weight=z_weight)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.total.double(), 0.25 * (entropy + z), rtol=1e-5, atol=0)
    # As much again from upstream, which is usually 1.
    gradients = torch.autograd.grad(3 * found.total, (hidden, weight))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, 3 * other, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_what_it_reads_does() -> None:
    model, hidden, targets = example(None)
    model.lm_head.weight.requires_grad_(False)
    head_losses(model, hidden, targets).total.backward()
    assert model.lm_head.weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_where_no_gradient_is_wanted_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden, targets = example(None)
    wanted = []
    kernel = head._in_place

    def watched(*arguments: Any) -> Any:
        wanted.append(arguments[-1])
        return kernel(*arguments)

    monkeypatch.setattr(head, "_in_place", watched)
    with_gradient = head_losses(model, hidden, targets).total
    with torch.no_grad():
        assert head_losses(model, hidden, targets).total == with_gradient
    assert wanted == [True, False]


def test_in_bfloat16_a_scale_is_not_rounded() -> None:
    model, hidden, targets = example(None)
    narrow = hidden.detach().bfloat16().requires_grad_()
    weight = model.lm_head.weight
    scale = 1 / 3.01  # bfloat16 has 0.332
    (one,) = torch.autograd.grad(head_losses(model, narrow, targets, scale=scale).total, weight)
    (other,) = torch.autograd.grad(
        scale * F.cross_entropy((narrow @ weight.bfloat16().T).float(), targets, reduction="sum"), weight
    )
    # Rounding errors cancel in the sum of so many numbers, a wrong factor would not.
    assert one.square().sum().item() == pytest.approx(other.square().sum().item(), rel=5e-4)


def test_nothing_asked_is_no_loss() -> None:
    model, hidden, _ = example(None)
    found = head_losses(model, hidden, torch.full((ROWS,), IGNORED))
    found.total.backward()
    assert (found.total.item(), found.entropy.item()) == (0.0, 0.0)
    assert hidden.grad is not None and not hidden.grad.any()
