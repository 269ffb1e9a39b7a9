"""Choose network, step and rates for a budget; every rule has its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tercet.model.config import ModelConfig
from tercet.train.optimizer import Kind, Rates

# Layers and width of the networks Tercet builds, smallest first. Depth grows with width at about
# 50 to 64 dimensions a layer, the usual ratio in scaling studies.
LADDER = (
    (3, 96),
    (4, 128),
    (4, 160),
    (4, 192),
    (5, 256),
    (6, 320),
    (8, 384),
    (8, 512),
    (12, 768),
    (16, 1024),
)

LARGEST_UNSHARED = 320  # the widest network whose query heads share no keys and values

# Tokens a matrix weight should see. Hoffmann et al. 2022 (arXiv:2203.15556) find about 20 for all
# parameters; with Muon at small scale a few are enough (docs/experiments.md).
TOKENS_PER_PARAMETER = 3

# Epochs that a budget in minutes is used for. Up to about four, repeated tokens teach nearly as much as new ones
# (Muennighoff et al. 2023, arXiv:2305.16264); with eight the small networks built here overfit a small text, and
# their held-out loss is higher than after four (docs/experiments.md).
MAX_EPOCHS = 4

# With more than FEW_EPOCHS, weights decay with a timescale of DECAY_EPOCHS: the best timescale is nearly constant
# when it is measured in epochs (Wang and Aitchison 2024, arXiv:2405.13698).
FEW_EPOCHS, DECAY_EPOCHS = 2.0, 2.0

# Tokens an optimizer step, for networks of fewer matrix weights than the first number.
STEP_TOKENS = ((2e6, 2048), (1e7, 4096), (1e8, 16_384), (math.inf, 65_536))

# Operations a second of two cores, forward and backward, at the smallest shapes. They give a first guess of the
# network's size only; the speed of the chosen shape is measured before the number of steps is set.
FIRST_GUESS_FLOPS = 1.6e11


@dataclass(frozen=True)
class Shape:
    """A network of the ladder and the batch it is trained with."""

    config: ModelConfig
    rows: int  # sequences an optimizer step
    context: int  # tokens a sequence

    @property
    def step_tokens(self) -> int:
        """Tokens an optimizer step."""
        return self.rows * self.context


def network(layers: int, width: int, vocab_size: int, context: int) -> ModelConfig:
    """Return a Qwen3-shaped network, which transformers, vLLM and llama.cpp all load.

    Heads have 64 dimensions where the width allows it: at width 128 two of them gave 1.663 bits per byte after
    2M tokens and four of 32 gave 1.667, and they are faster. In small networks each query head has keys and
    values of its own (1.657 against 1.667 where two share them); from width 384 on two share, which halves the
    cache (Ainslie et al. 2023, arXiv:2305.13245). The feed-forward layer is three times as wide as the model.
    The output head is not tied to the embedding: a head of its own gave 0.021 bits per byte after 1M tokens
    and 0.013 after 5.5M, and costs 4% of the time (docs/experiments.md).
    """
    head_dim = 64 if width % 64 == 0 else 32
    heads = width // head_dim
    shared = width > LARGEST_UNSHARED and heads % 2 == 0
    return ModelConfig(
        family="qwen3",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2 if shared else heads,
        head_dim=head_dim,
        max_positions=context,
        qk_norm="head",
        tie_embeddings=False,
        rope_theta=10_000.0,
    )


def vocabulary_for(parameters: float) -> int:
    """Return the vocabulary size for a number of matrix weights.

    Longer tokens gain more than the larger head costs: at 2M weights 4,096 gave 1.77 bits per byte and 2,048
    gave 1.84 in the same time. Larger networks use larger vocabularies (Tao et al. 2024, arXiv:2407.13623).
    """
    return 2048 if parameters < 3e5 else 4096 if parameters < 2e7 else 16_384


def context_for(
    *,
    seconds: float | None,
    tokens: int | None,
    flops: float | None,
    pace: float = FIRST_GUESS_FLOPS,
) -> int:
    """Return the context length: 256 for short runs, 512 for an hour on two cores, 1024 from a day on.

    A short run never learns to use distant tokens, and attention to them costs a quarter of the speed: at
    2M weights, in 75 s, contexts of 512, 256 and 128 gave 1.85, 1.77 and 1.78 bits per byte.

    Args:
        seconds: The budget in seconds.
        tokens: The budget in tokens.
        flops: The budget in operations.
        pace: Operations a second that the machine is expected to reach.
    """
    if flops is None:
        flops = pace * seconds if seconds is not None else 2 * (tokens or 0) ** 2
    return 256 if flops < 3e14 else 512 if flops < 1e16 else 1024


def shape_for(
    *,
    seconds: float | None = None,
    tokens: int | None = None,
    flops: float | None = None,
    context: int = 512,
    pace: float = FIRST_GUESS_FLOPS,
    max_tokens: float = math.inf,
) -> Shape:
    """Return the shape of `LADDER` whose number of matrix weights fits the budget best.

    With F operations a second, 6 operations a weight and token, and k tokens a weight, time t
    trains N = sqrt(F t / 6 k) weights.

    Args:
        seconds: The budget in seconds.
        tokens: The budget in tokens.
        flops: The budget in operations.
        context: Tokens a sequence.
        pace: Operations a second that the machine is expected to reach.
        max_tokens: Tokens to train on at most, for a budget in seconds.
    """
    if tokens is not None:
        target = tokens / TOKENS_PER_PARAMETER
    else:
        if flops is None:
            assert seconds is not None
            flops = pace * seconds
        target = min((flops / (6 * TOKENS_PER_PARAMETER)) ** 0.5, max_tokens / TOKENS_PER_PARAMETER)
    vocab = vocabulary_for(target)
    candidates = [network(layers, width, vocab, context) for layers, width in LADDER]
    config = min(candidates, key=lambda config: abs(math.log(config.matmul_parameters / target)))
    return Shape(config, rows=rows_for(config.matmul_parameters, context), context=context)


def rows_for(parameters: int, context: int) -> int:
    """Return the sequences a step, of ``context`` tokens: 2,048 tokens up to 2M matrix weights, 4,096 up to 10M.

    In short runs small batches are better: they give more updates from the same tokens. At 1.3M weights and
    2M tokens, steps of 1,024, 2,048 and 4,096 tokens gave 1.676, 1.667 and 1.684 bits per byte. Muon takes as
    long for a small step as for a large one, and longer for larger matrices: at 6M weights a quarter of a
    step of 2,048 tokens. Larger networks train longer, and the largest batch that costs no quality grows with
    the run (McCandlish et al. 2018, arXiv:1812.06162).
    """
    tokens = next(tokens for limit, tokens in STEP_TOKENS if parameters < limit)
    return max(1, tokens // context)


@dataclass(frozen=True)
class Rule:
    """A number of the run with its reason."""

    name: str
    value: float | str
    why: str


def rates_for(
    width: int,
    *,
    kind: Kind = "muon",
    learning_rate: float | None = None,
    steps: int = 0,
    epochs: float = 0.0,
) -> Rates:
    """Return the peak rates for training from scratch.

    Muon: 0.02 at every size, since its updates have the same spectral norm for every shape (Jordan et
    al. 2024); 0.04 did as well. Embeddings and norms: AdamW, with rates that fall with the root of the width
    (nanochat's rule); at width 192, 4e-3, 1e-2, 2e-2 and 4e-2 for the embedding gave 1.95, 1.92, 1.88 and
    1.85 bits per byte in the same time. A second moment over a hundred steps instead of twenty gave 1.710
    against 1.721, since most tokens occur in few of these small steps; a first moment over five steps instead
    of ten gave 1.710 against 1.718; Muon's momentum 0.9 instead of 0.95 gave 1.710 against 1.718; rows of
    equal norm (NorMuon) gave 1.646 against 1.652 (means of three seeds). AdamW for everything: 8e-3 at width
    192, falling with the width (Yang et al. 2022, arXiv:2203.03466).

    Muon's weight decay depends on ``steps`` and ``epochs``: 0.1 gave 0.034 and 0.056 bits per byte at four
    epochs of 1 and 2 MB, and cost 0.028 at one epoch of 16 MB, where it forgets ten times as much
    (docs/experiments.md).

    Args:
        width: Of the network.
        kind: The optimizer of the matrices.
        learning_rate: Replaces the rate of the matrices (AdamW: of everything).
        steps: Of the run.
        epochs: Of the run.
    """
    if kind == "adamw":
        return Rates("adamw", learning_rate or float(f"{min(8e-3, 8e-3 * 192 / width):.2g}"))
    small = (192 / width) ** 0.5
    rate = learning_rate or 0.02
    decay = epochs / (rate * DECAY_EPOCHS * steps) if epochs > FEW_EPOCHS else 0.0
    return Rates(
        "muon",
        rate,
        embedding=float(f"{0.04 * small:.2g}"),
        vectors=float(f"{0.01 * small:.2g}"),
        betas=(0.8, 0.99),
        weight_decay=float(f"{min(decay, 0.2):.2g}"),
        momentum=0.9,
    )


def rules_of(config: ModelConfig, rows: int, steps: int, rates: Rates) -> list[Rule]:
    """Return the numbers of a run with their reasons, as a plan prints and a report shows them."""
    weights = config.matmul_parameters
    tokens = rows * config.max_positions * steps
    rules = [
        Rule(
            "shape",
            f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads, "
            f"vocabulary {config.vocab_size:,}: {weights / 1e6:.2f}M matrix weights",
            f"{tokens / weights:.1f} tokens per weight; the target is {TOKENS_PER_PARAMETER}",
        ),
        Rule(
            "step",
            f"{rows} x {config.max_positions} tokens, {steps:,} steps",
            "small batches are better in short runs",
        ),
        Rule(
            "initial attention",
            "two heads of each layer attend to the last two tokens; the others are random"
            if config.num_heads > 1
            else "the head of each layer attends to the last token",
            "0.042 bits per byte lower after 1M tokens",
        ),
        Rule(
            "matrices",
            f"{rates.kind}, rate {rates.matrices:g}",
            "updates of the same spectral norm at every width",
        )
        if rates.kind == "muon"
        else Rule("matrices", f"AdamW, rate {rates.matrices:g}", "decreases with the width"),
    ]
    if rates.weight_decay:
        why = "the text is repeated for several epochs" if rates.kind == "muon" else "usual for AdamW"
        rules.append(Rule("weight decay", f"{rates.weight_decay:g}", why))
    if rates.kind == "muon":
        rules.append(
            Rule(
                "embedding and head; norms",
                f"AdamW, rates {rates.embedding:g}; {rates.vectors:g}",
                "decrease with the square root of the width",
            )
        )
    return rules
