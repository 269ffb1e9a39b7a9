"""From a budget to a run: how large a network, how large a step, which rates. Every rule with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tercet.model.config import ModelConfig
from tercet.train.optimizer import Kind, Rates

# Layers and width of the networks Tercet builds, smallest first. Depth grows with width at about
# 50 to 64 dimensions a layer, the ratio that scaling studies keep returning to.
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

# Passes over a text that a budget in minutes is used for. To about four, tokens that come again teach nearly as
# much as new ones (Muennighoff et al. 2023, arXiv:2305.16264); with eight the small networks built here know a
# small text by heart, and foresee others worse than after four (docs/experiments.md).
MOST_PASSES = 4

# Where a text is seen more often than so, weights decay: so that what they hold is of the last REMEMBERED passes,
# since it is in passes that the best timescale is much the same (Wang and Aitchison 2024, arXiv:2405.13698).
FEW_PASSES, REMEMBERED = 2.0, 2.0

# Tokens an optimizer step, for networks of fewer matrix weights than this.
STEP_TOKENS = ((2e6, 2048), (1e7, 4096), (1e8, 16_384), (math.inf, 65_536))

# What two cores reach in forward and backward at the smallest shapes, as a first guess of size only;
# the real speed of the chosen shape is measured before the number of steps is set.
FIRST_GUESS_FLOPS = 1.6e11


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

    Heads of 64 dimensions where the width allows it: at width 128 two of them gave 1.663 bits per byte after
    2M tokens and four of 32 gave 1.667, and they are faster. Small networks give each query head keys and
    values of its own (1.657 against 1.667 where two share them); from width 384 on two share, which halves the
    cache (Ainslie et al. 2023, arXiv:2305.13245). The feed-forward layer is three times as wide as the model.
    The head is not the embedding: that gave 0.021 bits per byte after 1M tokens and 0.013 after 5.5M, and costs
    4% of the time (docs/experiments.md).
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
    """Vocabulary size. Longer tokens make more of a step's time than the head they need costs.

    At 2M weights 4,096 gave 1.77 bits per byte and 2,048 gave 1.84 in the same time; larger networks
    take more (Tao et al. 2024, arXiv:2407.13623).
    """
    return 2048 if parameters < 3e5 else 4096 if parameters < 2e7 else 16_384


def context_for(
    *,
    seconds: float | None,
    tokens: int | None,
    flops: float | None,
    pace: float = FIRST_GUESS_FLOPS,
) -> int:
    """Tokens the model reads at once: 256 for short runs, 512 for an hour of two cores, 1024 beyond a day's.

    A short run never learns to use what is far away, and attention to it costs a quarter of the speed: at
    2M weights, in 75 s, contexts of 512, 256 and 128 gave 1.85, 1.77 and 1.78 bits per byte.

    pace: operations a second that the machine is expected to do.
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
    most_tokens: float = math.inf,
) -> Shape:
    """The shape whose matrix parameters are best fed by the budget.

    With F operations a second, 6 operations a parameter and token, and k tokens a parameter, time t
    trains N = sqrt(F t / 6 k) parameters.

    most_tokens: that there are to train on, for a budget in seconds.
    """
    if tokens is not None:
        target = tokens / TOKENS_PER_PARAMETER
    else:
        if flops is None:
            assert seconds is not None
            flops = pace * seconds
        target = min((flops / (6 * TOKENS_PER_PARAMETER)) ** 0.5, most_tokens / TOKENS_PER_PARAMETER)
    vocab = vocabulary_for(target)
    candidates = [network(layers, width, vocab, context) for layers, width in LADDER]
    config = min(candidates, key=lambda config: abs(math.log(config.matmul_parameters / target)))
    return Shape(config, rows=rows_for(config.matmul_parameters, context), context=context)


def rows_for(parameters: int, context: int) -> int:
    """Sequences a step, of ``context`` tokens: 2,048 tokens up to 2M matrix weights, 4,096 up to 10M.

    Small batches win while steps are few: more updates from the same tokens. At 1.3M weights and 2M tokens
    steps of 1,024, 2,048 and 4,096 tokens gave 1.676, 1.667 and 1.684 bits per byte. Muon takes as long for
    a small step as for a large one, and the larger the matrices the more: at 6M weights a quarter of a step
    of 2,048 tokens. Larger networks train longer, and the batch that costs nothing grows with the run
    (McCandlish et al. 2018, arXiv:1812.06162).
    """
    tokens = next(tokens for most, tokens in STEP_TOKENS if parameters < most)
    return max(1, tokens // context)


@dataclass(frozen=True)
class Rule:
    """A number of the run, and why it is what it is."""

    name: str
    value: float | str
    why: str


def rates_for(
    width: int,
    *,
    kind: Kind = "muon",
    learning_rate: float | None = None,
    steps: int = 0,
    passes: float = 0.0,
) -> Rates:
    """Peak rates for training from scratch at ``width``; ``learning_rate`` replaces that of the matrices.

    steps, passes: of the run and over the text, for Muon's weight decay: 0.1 gave 0.034 and 0.056 bits per byte
    at four passes over 1 and 2 MB, and cost 0.028 at one over 16 MB, where it forgets ten times as much
    (docs/experiments.md).

    Muon: 0.02 at every size, since its updates have the same spectral norm whatever the shape (Jordan et
    al. 2024); 0.04 did as well. Embeddings and norms: AdamW, falling with the root of the width
    (nanochat's rule); at width 192, 4e-3, 1e-2, 2e-2 and 4e-2 for the embedding gave 1.95, 1.92, 1.88 and
    1.85 bits per byte in the same time. A second moment over a hundred steps instead of twenty gave 1.710
    against 1.721, since most tokens are in few of so small steps; a first moment over five steps instead of
    ten 1.710 against 1.718; Muon's momentum 0.9 instead of 0.95 1.710 against 1.718; rows made even (NorMuon)
    1.646 against 1.652 (means of three seeds). AdamW for everything: 8e-3 at width 192, falling
    with the width (Yang et al. 2022, arXiv:2203.03466).
    """
    if kind == "adamw":
        return Rates("adamw", learning_rate or float(f"{min(8e-3, 8e-3 * 192 / width):.2g}"))
    small = (192 / width) ** 0.5
    rate = learning_rate or 0.02
    decay = passes / (rate * REMEMBERED * steps) if passes > FEW_PASSES else 0.0
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
    """The numbers of a run, each with the reason for it, to be printed and reported."""
    weights = config.matmul_parameters
    tokens = rows * config.max_positions * steps
    found = [
        Rule(
            "shape",
            f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads, "
            f"vocabulary {config.vocab_size:,}: {weights / 1e6:.2f}M matrix weights",
            f"{tokens / weights:.1f} tokens a weight; {TOKENS_PER_PARAMETER} are aimed at",
        ),
        Rule(
            "step",
            f"{rows} x {config.max_positions} tokens, {steps:,} steps",
            "small batches while steps are few",
        ),
        Rule(
            "first attention",
            "two heads of each layer to the last two tokens, the others at random"
            if config.num_heads > 1
            else "the head of each layer to the last token",
            "0.042 bits per byte lower after 1M tokens",
        ),
        Rule("matrices", f"{rates.kind}, rate {rates.matrices:g}", "equal spectral norm at every width")
        if rates.kind == "muon"
        else Rule("matrices", f"AdamW, rate {rates.matrices:g}", "falls with the width"),
    ]
    if rates.weight_decay:
        why = "the text is seen again and again" if rates.kind == "muon" else "usual for AdamW"
        found.append(Rule("weight decay", f"{rates.weight_decay:g}", why))
    if rates.kind == "muon":
        found.append(
            Rule(
                "embedding and head; norms",
                f"AdamW, rates {rates.embedding:g}; {rates.vectors:g}",
                "fall with the root of the width",
            )
        )
    return found
