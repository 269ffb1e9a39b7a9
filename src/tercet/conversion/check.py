"""Compare an exported file with its checkpoint: every tensor, the predictions on a text, and the tokenizer.

A file can be complete, load without a complaint and talk nonsense: rows in another order, an offset lost, a
wrong number in the metadata. Such a file is further from its checkpoint than rounding explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tercet.conversion.gguf_network import GGUFNetwork, WithAdapter
from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.layerwise import EMBEDDING, HEAD, Matrices, head_logits, hidden_states
from tercet.model.tensor_names import network_tensors
from tercet.model.tokenizer import Tokenizer
from tercet.model.weights import Floats

TOKENS = 2_000

# Largest error of 64 rows of a tensor, relative to the rows: the root of the mean square. docs/export.md says
# how these limits and those of the predictions were chosen.
TENSOR_LIMITS = {
    "F32": 1e-6, "BF16": 0.004, "F16": 0.002, "Q8_0": 0.03, "Q6_K": 0.08, "Q5_K": 0.15, "Q5_1": 0.15,
    "Q5_0": 0.15, "Q4_K": 0.3, "Q4_1": 0.3, "Q4_0": 0.3,
}  # fmt: skip
# Mean Kullback-Leibler divergence from the checkpoint's predictions, in nats per token.
KL_LIMITS = {
    "f32": 1e-4, "f16": 0.001, "bf16": 0.01, "q8_0": 0.03, "q6_k": 0.06, "q5_k_m": 0.15, "q5_1": 0.2, "q5_0": 0.2,
    "q4_k_m": 0.4, "q4_1": 0.8, "q4_0": 0.8,
}  # fmt: skip
_GROUP = 64  # rows; an error in a few rows must not be lost in the mean of a large tensor
_SMALLEST = 1e-3  # of a tensor's values; rows smaller than it are compared as if they were so large

STRINGS = (
    "Hello, world!", "it's I'LL we'Re don't O'Neil", "12345 1,000.50 a1b22c333", "a  b   c", "  before, after   ",
    "line\n\n\nline\r\n\ttab", "Zoë's naïve café", "東京 ありがとう", "Привет, мир", "مرحبا", "🎉👍🏽",
    "x = foo_bar(baz)[0];", "\n\n1. one\n2. two", "https://example.org/a?b=c#d",
    "½ ² Ⅷ", "!!!???", "{\"key\": [1, 2.5, null]}", "",
)  # fmt: skip


class CheckFailed(UserError):
    """An exported file is further from its checkpoint than its type explains."""


@dataclass(frozen=True)
class Check:
    """What a check has measured.

    Attributes:
        tokens: number of tokens that were compared.
        text: the text that they are from.
        kl: mean Kullback-Leibler divergence of the file's predictions from the checkpoint's, nats per token.
        kl_limit: the largest that the type explains.
        top_token: the share of tokens after which both have the same likeliest token.
        worst_tensor: the tensor with the largest error relative to its type's limit, by the network's name.
        worst_error: that error: the root mean square over 64 rows, relative to their values.
        strings: number of texts that both tokenizers encode alike; 0: the file has no tokenizer.
    """

    tokens: int
    text: str
    kl: float
    kl_limit: float
    top_token: float
    worst_tensor: str
    worst_error: float
    strings: int


class _Compared:
    """A file's tensors, each compared with the checkpoint's when it is read."""

    def __init__(self, file: GGUFNetwork | WithAdapter, checkpoint: Matrices) -> None:
        self.config, self._file, self._checkpoint = file.config, file, checkpoint
        self.worst = ("", 0.0, 0.0)  # name, error, share of the limit

    def __call__(self, name: str) -> Floats:
        values = self._file(name)
        source = name
        if name == HEAD and self._checkpoint.config.tie_embeddings:
            source = EMBEDDING
        expected = self._checkpoint(source) * np.float32(_factor(name, self._checkpoint.config, self.config))
        is_norm = name.endswith("norm.weight")
        offset = self.config.norm_offset if is_norm else 0.0
        if self._checkpoint.config.norm_offset != self.config.norm_offset and is_norm:
            expected = expected + np.float32(self._checkpoint.config.norm_offset) - np.float32(offset)
        kind = self._file.type_of(name)
        limit, error = TENSOR_LIMITS.get(kind, 1.0), relative_error(values, expected, offset)
        if not error <= limit:
            raise CheckFailed(
                f"tensor {name} is {_percent(error)} off the checkpoint's; rounding to {kind} explains "
                f"{_percent(limit)} at most"
            )
        if error / limit > self.worst[2]:
            self.worst = (name, error, error / limit)
        return values


def _factor(name: str, checkpoint: ModelConfig, file: ModelConfig) -> float:
    """Return the factor on queries that makes up for a graph's other scale of the scores."""
    ours, theirs = (
        config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        for config in (checkpoint, file)
    )
    normed = ".q_norm." in name
    if ours == theirs or not (normed or (".q_proj." in name and checkpoint.qk_norm == "none")):
        return 1.0
    return ours / theirs


def relative_error(values: Floats, expected: Floats, offset: float = 0.0) -> float:
    """Return the largest root mean square of the difference over 64 rows, relative to that of the values.

    Args:
        values: a tensor.
        expected: the tensor that it should be.
        offset: added to a norm's weights where they are used; the error is relative to the sum.
    """
    if values.shape != expected.shape:
        return math.inf
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    others = expected.reshape(rows.shape)
    smallest = _SMALLEST**2 * float(np.mean(np.square(others + np.float32(offset), dtype=np.float64)))
    worst = 0.0
    for at in range(0, len(rows), _GROUP):
        difference = rows[at : at + _GROUP] - others[at : at + _GROUP]
        square = float(np.mean(np.square(difference, dtype=np.float64)))
        size = float(np.mean(np.square(others[at : at + _GROUP] + np.float32(offset), dtype=np.float64)))
        if square:
            worst = max(worst, math.sqrt(square / max(size, smallest)) if max(size, smallest) else math.inf)
        if math.isnan(square):
            return math.inf
    return worst


def check_predictions(
    file: GGUFNetwork | WithAdapter,
    checkpoint: Matrices,
    tokens: Tensor,
    text: str,
    limit: float,
    strings: int,
) -> Check:
    """Compare a file with its checkpoint.

    Args:
        file: the network in the file.
        checkpoint: the checkpoint's, with an adapter merged if the file has it.
        tokens: token ids [rows, length].
        text: says where they are from.
        limit: the largest divergence in nats per token.
        strings: how many texts `check_tokenizer` compared.

    Raises:
        CheckFailed: a tensor is missing or further off than its type explains, or the predictions are.
        UserError: the file can't be read.
    """
    ours, theirs = (_names(config) for config in (checkpoint.config, file.config))
    if missing := sorted(ours - theirs - {HEAD}):
        raise CheckFailed(f"the file has no tensor for {missing[0]}")
    compared = _Compared(file, checkpoint)
    states = hidden_states(compared, tokens).flatten(0, 1)
    expected = hidden_states(checkpoint, tokens).flatten(0, 1)
    divergence = same = 0.0
    with torch.no_grad():
        pairs = zip(head_logits(compared, states), head_logits(checkpoint, expected), strict=True)
        for logits, others in pairs:
            log_q, log_p = logits.log_softmax(-1), others.log_softmax(-1)
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((logits.argmax(-1) == others.argmax(-1)).sum())
    count = tokens.numel()
    name, error, _ = compared.worst
    check = Check(count, text, divergence / count, limit, same / count, name, error, strings)
    if not check.kl <= limit:
        raise CheckFailed(
            f"the file's predictions differ from the checkpoint's by {check.kl:.4f} nats a token, and the likeliest "
            f"token agrees after {_percent(check.top_token)} of {count} tokens; its type explains {limit:g} nats at most"
        )
    return check


def check_tokenizer(file: Tokenizer, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Compare the tokens of the file's tokenizer with those of the checkpoint's; return the number of texts.

    Raises:
        CheckFailed: a text gets other tokens.
    """
    count = 0
    for text in texts:
        ours, theirs = tokenizer.encode(text), file.encode(text)
        if ours != theirs:
            raise CheckFailed(
                f"the file's tokenizer encodes {text[:40]!r} as {theirs[:12]}, the model's as {ours[:12]}"
            )
        count += 1
    return count


def _names(config: ModelConfig) -> set[str]:
    return {part.name for part in network_tensors(config)}


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 10 else f"{share:.3g} times"
