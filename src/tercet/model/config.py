"""Every architectural choice of a decoder-only transformer, as a named field.

Imports nothing heavy: a configuration is read, compared and written without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tercet.errors import UserError

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on.

    ``linear`` divides every frequency by ``factor`` (Chen et al. 2023, arXiv:2306.15595).
    ``dynamic`` raises the base with the length at hand (NTK-aware, as in transformers).
    ``llama3`` stretches low frequencies only, between two wavelengths (Llama 3.1).
    ``yarn`` interpolates by frequency and scales attention (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: RopeKind
    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 * ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek's variant of the attention factor
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one network. Names follow Hugging Face where it has one for the thing.

    Raises:
        UserError: two fields contradict each other.
    """

    family: str  # which family's config.json and tensor names this is saved as
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm over each head of queries and keys (Qwen3)
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), otherwise down(act(up(x)))
    activation: Activation = "silu"
    windows: tuple[int | None, ...] = ()  # sliding window of each layer, None for full; () is all full
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model configuration: {name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model configuration: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(
                f"model configuration: head_dim {self.head_dim} is odd; rotary positions pair dimensions"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise UserError(
                f"model configuration: {len(self.windows)} attention windows for {self.num_layers} layers"
            )

    def window(self, layer: int) -> int | None:
        """How many positions back (itself included) layer ``layer`` sees; None: all of them."""
        return self.windows[layer] if self.windows else None

    @property
    def matmul_parameters(self) -> int:
        """Weights that are multiplied for every token: all matrices but the embedding lookups."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size
