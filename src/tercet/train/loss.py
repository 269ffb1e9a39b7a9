"""Cross-entropy over the supervised tokens of a batch."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tercet.data.batches import IGNORED
from tercet.model.transformer import Transformer, attends_by_document
from tercet.train.batch import Batch, moved
from tercet.train.head import Losses, head_losses

# cuBLAS chooses its algorithms by the size of its workspace, which is fixed at the first product. Always use
# the same size (8 buffers of 4096 KiB), so that a resumed run makes the same choices.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# On a GPU, from this share of supervised tokens on, compute the logits of all tokens: the other logits cost
# less than selecting the supervised tokens.
NEARLY_ALL = 0.9


def loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """Return the cross-entropy in nats, summed over the supervised tokens of ``batch``.

    A sum, not a mean: dividing by the token count of the whole optimizer step, not of each micro-batch,
    makes the gradient independent of how the step was split.
    """
    return losses_of(model, batch).total


def losses_of(model: Transformer, batch: Batch, scale: float = 1.0, z_weight: float = 0.0) -> Losses:
    """Return the losses of ``batch``, summed over its supervised tokens.

    Args:
        model: The network.
        batch: Rows on the CPU: sizes are read from them there, without waiting for a GPU.
        scale: Factor of the total; see `head_losses`.
        z_weight: Weight of the z-loss; see `head_losses`.
    """
    device = model.device
    length = None if batch.positions is None else int(batch.positions.max()) + 1
    begins = batch.document_begins if attends_by_document(model) else None
    # The head is the most expensive matrix of a small model, and unsupervised tokens need no logits. But rows
    # that are supervised almost everywhere keep one shape, for the compiler.
    supervised = (batch.targets != IGNORED).flatten().nonzero()[:, 0]
    share = len(supervised) / batch.targets.numel()
    select = share < (1 if device.type == "cpu" else NEARLY_ALL)
    if begins is not None:
        begins = moved(begins, device)
        if model.compiler is not None:  # one program for any number of documents
            torch._dynamo.maybe_mark_dynamic(begins, 0)
    batch = batch.to(device)
    hidden = model.hidden(
        batch.tokens, batch.positions, batch.segments, length=length, document_begins=begins
    ).flatten(0, 1)
    targets = batch.targets.flatten()
    if select:
        supervised = moved(supervised, device)
        hidden, targets = hidden[supervised], targets[supervised]
    return head_losses(model, hidden, targets, scale=scale, z_weight=z_weight, compiler=model.compiler)
