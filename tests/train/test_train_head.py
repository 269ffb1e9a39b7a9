"""The head's loss in chunks, against PyTorch's cross-entropy and autograd."""

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
from tercet.train.head import Kernel, chunk_rows, head_losses

WIDTH, VOCABULARY, ROWS = 32, 300, 21


def example(cap: float | None) -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = replace(network(1, WIDTH, VOCABULARY, 16), logit_softcap=cap, tie_embeddings=False)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    targets[[3, 20]] = IGNORED
    return Transformer(config), torch.randn(ROWS, WIDTH, requires_grad=True), targets


@pytest.mark.parametrize("kernel", [head._in_place, head._fusible])
@pytest.mark.parametrize("chunks", [1, 6])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, chunks: int, cap: float | None, z_weight: float
) -> None:
    monkeypatch.setattr(head, "_in_place", kernel)
    model, hidden, targets = example(cap)
    weight = model.lm_head.weight
    logits = hidden.double() @ weight.double().T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    z = z_weight * logits.logsumexp(-1)[targets != IGNORED].square().sum()
    expected = torch.autograd.grad(0.25 * (entropy + z), (hidden, weight))
    if chunks == 6:
        monkeypatch.setattr(head, "LARGEST_LOGITS", VOCABULARY * 5)
    assert -(-ROWS // chunk_rows(VOCABULARY)) == chunks
    losses = head_losses(model, hidden, targets, scale=0.25, z_weight=z_weight)
    torch.testing.assert_close(losses.entropy.double(), entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.total.double(), 0.25 * (entropy + z), rtol=1e-5, atol=0)
    # The upstream gradient is usually 1; here it is 3.
    gradients = torch.autograd.grad(3 * losses.total, (hidden, weight))
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, 3 * reference, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_its_input_does() -> None:
    model, hidden, targets = example(None)
    model.lm_head.weight.requires_grad_(False)
    head_losses(model, hidden, targets).total.backward()
    assert model.lm_head.weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_without_autograd_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden, targets = example(None)
    requests = []
    kernel = head._in_place

    def recording(*arguments: Any) -> Any:
        requests.append(arguments[-1])
        return kernel(*arguments)

    monkeypatch.setattr(head, "_in_place", recording)
    with_gradient = head_losses(model, hidden, targets).total
    with torch.no_grad():
        assert head_losses(model, hidden, targets).total == with_gradient
    assert requests == [True, False]


def test_in_bfloat16_a_scale_is_not_rounded() -> None:
    model, hidden, targets = example(None)
    narrow = hidden.detach().bfloat16().requires_grad_()
    weight = model.lm_head.weight
    scale = 1 / 3.01  # bfloat16 has 0.332
    (gradient,) = torch.autograd.grad(head_losses(model, narrow, targets, scale=scale).total, weight)
    (reference,) = torch.autograd.grad(
        scale * F.cross_entropy((narrow @ weight.bfloat16().T).float(), targets, reduction="sum"), weight
    )
    # Rounding errors cancel in the sum of so many numbers, a wrong factor would not.
    assert gradient.square().sum().item() == pytest.approx(reference.square().sum().item(), rel=5e-4)


def test_no_supervised_token_gives_zero_loss() -> None:
    model, hidden, _ = example(None)
    losses = head_losses(model, hidden, torch.full((ROWS,), IGNORED))
    losses.total.backward()
    assert (losses.total.item(), losses.entropy.item()) == (0.0, 0.0)
    assert hidden.grad is not None and not hidden.grad.any()
