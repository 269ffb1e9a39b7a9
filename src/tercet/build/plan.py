"""From a budget to a shape: how large a network should be for the time there is."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.model.config import ModelConfig

# Layers and width of the networks Tercet builds, smallest first. Depth grows with width at about
# 50 to 64 dimensions a layer, the ratio that scaling studies keep returning to.
LADDER = ((3, 96), (4, 128), (4, 192), (5, 256), (6, 320), (8, 384), (8, 512), (12, 768), (16, 1024))

# Tokens a matrix weight should see. Hoffmann et al. 2022 (arXiv:2203.15556) find about 20 for all
# parameters; speed runs at small scale do better with 8 to 12 per matrix parameter.
TOKENS_PER_PARAMETER = 10

# What two cores reach in forward and backward at the smallest shapes, as a first guess of size only;
# the real speed of the chosen shape is measured before the number of steps is set.
FIRST_GUESS_FLOPS = 8e10


@dataclass(frozen=True)
class Shape:
    """A network of the ladder and the batch it is trained with."""

    config: ModelConfig
    rows: int  # sequences an optimizer step
    context: int  # tokens a sequence

    @property
    def step_tokens(self) -> int:
        return self.rows * self.context


def network(layers: int, width: int, vocab_size: int, context: int) -> ModelConfig:
    """A Qwen3-shaped network, which transformers, vLLM and llama.cpp all load.

    Heads of 32 dimensions up to width 320 (64 beyond), two query heads to a key-value head, and a
    feed-forward layer three times as wide as the model.
    """
    head_dim = 32 if width <= 320 else 64
    heads = width // head_dim
    return ModelConfig(
        family="qwen3",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=head_dim,
        max_positions=context,
        qk_norm="head",
        tie_embeddings=True,
        rope_theta=10_000.0,
    )


def vocabulary_for(parameters: float) -> int:
    """Vocabulary size: the head should stay a minor part of the multiplications."""
    return 2048 if parameters < 1.5e6 else 4096 if parameters < 2e7 else 16_384


def shape_for(*, seconds: float | None = None, tokens: int | None = None, context: int = 512) -> Shape:
    """The shape whose matrix parameters are best fed by the budget.

    With F operations a second, 6 operations a parameter and token, and k tokens a parameter, time t
    trains N = sqrt(F t / 6 k) parameters.
    """
    if tokens is not None:
        target = tokens / TOKENS_PER_PARAMETER
    else:
        assert seconds is not None
        target = (FIRST_GUESS_FLOPS * seconds / (6 * TOKENS_PER_PARAMETER)) ** 0.5
    vocab = vocabulary_for(target)
    candidates = [network(layers, width, vocab, context) for layers, width in LADDER]
    config = min(candidates, key=lambda config: abs(config.matmul_parameters / target - 1))
    return Shape(config, rows=rows_for(config.matmul_parameters), context=context)


def rows_for(parameters: int) -> int:
    """Sequences a step. Small batches win while steps are few: more updates from the same tokens."""
    return 4 if parameters < 1e7 else 16 if parameters < 1e8 else 64


def learning_rate_for(parameters: int) -> float:
    """Peak AdamW rate for training from scratch.

    At 0.6M matrix weights, after 400,000 tokens of builtin:python-docs, rates 4e-3, 8e-3 and 1.6e-2
    gave 3.07, 2.98 and 3.12 bits per byte; 6e-4 at 124M is GPT-3's. Between them a power law.
    """
    return float(f"{min(8e-3, 6e-3 * (1e6 / parameters) ** 0.45):.2g}")
