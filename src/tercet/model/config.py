"""The configuration of a decoder-only transformer: every architectural choice is a named field.

This module imports nothing heavy: a configuration is read, compared and written without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tercet.errors import UserError

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
QKNorm = Literal["none", "head", "projection"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on.

    ``linear`` divides every frequency by ``factor`` (Chen et al. 2023, arXiv:2306.15595).
    ``dynamic`` raises the base with the sequence's length (NTK-aware, as in transformers).
    ``llama3`` stretches low frequencies only, between two wavelengths (Llama 3.1).
    ``yarn`` interpolates by frequency and scales attention (Peng et al. 2023, arXiv:2309.00071).
    ``longrope`` divides each frequency by a factor of its own, from a list for sequences of up to
    ``original_max_positions`` or a list for longer ones (Ding et al. 2024, arXiv:2402.13753; Phi-3).
    """

    kind: RopeKind
    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    # The factor on cos and sin. None: 0.1 * ln(factor) + 1 for yarn, and for longrope
    # sqrt(1 + ln(factor) / ln(original_max_positions)).
    attention_factor: float | None = None
    mscale: float | None = None  # yarn, DeepSeek's variant of the attention factor
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: a factor for each pair of dimensions
    long_factor: tuple[float, ...] = ()  # longrope: likewise

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and shape of a network. Field names follow Hugging Face's where they exist.

    Raises:
        UserError: two fields contradict each other.
    """

    family: str  # the family whose config.json and tensor names this is saved with
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
    norm_offset: float = 0.0  # an RMSNorm multiplies by its weight plus this (Gemma: 1)
    pre_norm: bool = True  # norm before attention and before the MLP
    post_norm: bool = False  # norm on the output of each, before it is added to the residual
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x)) (GPT-NeoX)
    qk_norm: QKNorm = "none"  # RMSNorm over each head of queries and keys, or before the split into heads
    embedding_scale: float | None = None  # factor on embeddings, rounded to the activations' type (Gemma)
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # unscaled base of layers with a sliding window; None: `rope_theta`
    rotary_dim: int | None = None  # only the first dimensions of each head are rotated; None: all
    nope_layers: tuple[int, ...] = ()  # layers without rotary positions (SmolLM3)
    attention_scale: float | None = None  # factor on scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap) (Gemma 2)
    logit_softcap: float | None = None  # the same for logits
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), otherwise down(act(up(x)))
    activation: Activation = "silu"
    windows: tuple[int | None, ...] = ()  # sliding window of each layer, None for full; (): all full
    num_experts: int = 0  # MLPs in a mixture layer; 0: no mixture
    experts_per_token: int = 0
    moe_intermediate_size: int = 0  # of each expert
    normalize_expert_weights: bool = True  # the weights of a token's experts sum to 1
    dense_layers: tuple[int, ...] = ()  # layers of a mixture model with a plain MLP
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
                    f"model configuration: `{name}` is {getattr(self, name)}; it must be at least 1"
                )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model configuration: `num_heads` is {self.num_heads}; it must be a multiple of "
                f"`num_kv_heads`, {self.num_kv_heads}"
            )
        if self.positions == "rope" and (self.rotary % 2 or not 2 <= self.rotary <= self.head_dim):
            raise UserError(
                f"model configuration: {self.rotary} dimensions of each head are rotated; it must be an even "
                f"number from 2 to `head_dim`, {self.head_dim}, because rotary positions pair dimensions"
            )
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "dynamic" and self.rotary < 4:
            raise UserError(
                f"model configuration: {self.rotary} dimensions of each head are rotated; dynamic scaling needs "
                "at least 4"
            )
        if scaling is not None and scaling.kind == "longrope":
            if scaling.original_max_positions < 2:
                raise UserError(
                    f"model configuration: `original_max_positions` is {scaling.original_max_positions}; "
                    "longrope needs at least 2"
                )
            for name, factors in (("short", scaling.short_factor), ("long", scaling.long_factor)):
                if len(factors) != self.rotary // 2 or min(factors) <= 0:
                    raise UserError(
                        f"model configuration: `{name}_factor` of longrope has {len(factors)} numbers; it must "
                        f"have {self.rotary // 2}, all above 0"
                    )
        if self.windows and len(self.windows) != self.num_layers:
            raise UserError(
                f"model configuration: `windows` has {len(self.windows)} entries; it must have one for each of the "
                f"{self.num_layers} layers"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"model configuration: `experts_per_token` is {self.experts_per_token}; it must be from 1 to "
                f"`num_experts`, {self.num_experts}"
            )
        if self.num_experts and self.moe_intermediate_size < 1:
            raise UserError(
                f"model configuration: `moe_intermediate_size` is {self.moe_intermediate_size}; it must be at least 1"
            )
        for name, layers in (("nope_layers", self.nope_layers), ("dense_layers", self.dense_layers)):
            if any(not 0 <= layer < self.num_layers for layer in layers):
                raise UserError(
                    f"model configuration: `{name}` is {list(layers)}; layers are numbered from 0 to "
                    f"{self.num_layers - 1}"
                )

    @property
    def rotary(self) -> int:
        """Number of dimensions of each head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def window(self, layer: int) -> int | None:
        """Return how many positions layer ``layer`` sees, the token's own included; None: all earlier ones."""
        return self.windows[layer] if self.windows else None

    def has_rope(self, layer: int) -> bool:
        """Return whether layer ``layer`` rotates queries and keys by their positions."""
        return self.positions == "rope" and layer not in self.nope_layers

    def has_local_rope(self, layer: int) -> bool:
        """Return whether layer ``layer`` rotates them with the base of local layers, `local_rope_theta`."""
        return self.local_rope_theta is not None and self.window(layer) is not None

    def is_mixture(self, layer: int) -> bool:
        """Return whether layer ``layer`` has experts instead of a plain MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def matmul_parameters(self) -> int:
        """Number of weights multiplied for every token: all matrices except the embedding lookups.

        A mixture layer counts its router and as many experts as a token is sent to.
        """
        matrices = 3 if self.gated_mlp else 2
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        expert = self.hidden_size * self.moe_intermediate_size * matrices
        mixture = self.hidden_size * self.num_experts + self.experts_per_token * expert
        dense = self.hidden_size * self.intermediate_size * matrices
        mixtures = sum(self.is_mixture(layer) for layer in range(self.num_layers))
        mlps = mixtures * mixture + (self.num_layers - mixtures) * dense
        return self.num_layers * attention + mlps + self.vocab_size * self.hidden_size
