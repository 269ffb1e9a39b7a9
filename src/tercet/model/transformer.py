"""The network: one decoder-only transformer, read top to bottom in the order a token flows.

Module paths are those of Hugging Face's Llama (``model.layers.0.self_attn.q_proj``), so that
checkpoints and PEFT adapters need no renaming. Shapes: B sequences, T tokens, H hidden size,
N query heads, K key-value heads, D head dimension, V vocabulary.

Weights may be kept in float32 while the arithmetic runs in bfloat16 (``compute_dtype``): each
`Linear` casts its weight on use, which is simpler and faster here than autocast. Norms, rotary
tables and logits stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.model.config import ModelConfig, RopeScaling

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Linear):
    """A linear layer whose weight takes the type of its input: float32 weights, bfloat16 arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with a bias (GPT-2), in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps)


def rope_frequencies(config: ModelConfig, length: int) -> tuple[Tensor, float]:
    """Angle per position for each of D/2 pairs, and the factor on cos and sin. ``length``: tokens at hand."""
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain, 1.0
    original = scaling.original_max_positions
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        longest = max(length, original)
        base = theta * (scaling.factor * longest / original - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents, 1.0
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / plain
        low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
        smooth = (original / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - smooth) * plain / scaling.factor + smooth * plain
        stretched = torch.where(wavelength > low, plain / scaling.factor, plain)
        return torch.where((wavelength <= low) & (wavelength >= high), between, stretched), 1.0
    return _yarn_frequencies(scaling, plain, dim, theta)


def _yarn_frequencies(scaling: RopeScaling, plain: Tensor, dim: int, theta: float) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        # The pair that turns `rotations` times over the original context.
        return (
            dim * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # never zero; negative, all of it extrapolated, for tiny contexts
    ramp = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    frequencies = plain / scaling.factor * ramp + plain * (1 - ramp)

    def magnitude(scale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return frequencies, magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return frequencies, magnitude(1.0)


class RotaryEmbedding:
    """Tables of cos and sin by position, grown on demand. No parameters, so not a module.

    Su et al. 2021 (arXiv:2104.09864), in the half-rotated layout of Hugging Face checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, D] float32 for ``positions`` [B, T], all below ``length``."""
        scaling = self.config.rope_scaling
        dynamic = scaling is not None and scaling.kind == "dynamic"
        table = self._table
        if table is None or table[0].shape[0] < length or table[0].device != positions.device or dynamic:
            rows = length if dynamic else max(256, 1 << (length - 1).bit_length())
            frequencies, factor = rope_frequencies(self.config, length)
            angles = torch.outer(torch.arange(rows).float(), frequencies)
            angles = torch.cat((angles, angles), dim=-1).to(positions.device)
            table = self._table = (angles.cos() * factor, angles.sin() * factor)
        return table[0][positions], table[1][positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of ``x`` [B, heads, T, D] by its position's angle."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class KVCache:
    """Keys and values of every layer, [B, K, capacity, D]; a token's slot is its position.

    Rows may hold different numbers of tokens: what lies beyond a row's own position is never
    attended to, because a query at position p sees slots 0..p only, and slot p is written before
    it is read. So unequal prompts are padded on the right and nothing needs a padding mask.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, D] at ``positions`` [B, T]; return slots 0..length-1 of the layer."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)
        return self.keys[layer][:, :, :length], self.values[layer][:, :, :length]


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key, bias=config.attention_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        positions: Tensor,
        length: int,
        cache: KVCache | None,
    ) -> Tensor:
        batch, time, _ = x.shape
        dim = self.config.head_dim
        q = self.q_proj(x).view(batch, time, -1, dim)
        k = self.k_proj(x).view(batch, time, -1, dim)
        v = self.v_proj(x).view(batch, time, -1, dim).transpose(1, 2)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions, length)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and time > 1,
            enable_gqa=self.config.num_heads != self.config.num_kv_heads,
        )
        return cast(Tensor, self.o_proj(out.transpose(1, 2).reshape(batch, time, -1)))


class MLP(nn.Module):
    """Feed-forward layer, gated (SwiGLU, Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.gated_mlp:
            self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return cast(Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))
        return cast(Tensor, self.down_proj(self.activation(self.up_proj(x))))


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalised input and added to it (pre-norm)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        positions: Tensor,
        length: int,
        cache: KVCache | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, positions, length, cache)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm: everything but the head (``model.`` in checkpoints)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)


class Transformer(nn.Module):
    """Tokens in, logits out.

    ``compute_dtype`` is the type activations have between layers; None: that of the weights.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config) if config.positions == "rope" else None
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding, where the configuration says so. Call after replacing weights."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type activations have between layers."""
        return self.compute_dtype or self.model.embed_tokens.weight.dtype

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.config, batch, capacity, self.dtype, self.device)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final normalised hidden states [B, T, H] for ``tokens`` [B, T].

        positions: [B, T], each token's place in its own sequence; default 0..T-1 in every row.
        segments: [B, T] integers; tokens see only earlier tokens of the same segment. Packed
            documents get one number each, padding (on either side) a number of its own.
        cache: keys and values are stored at ``positions`` and all earlier slots of the row are seen.
            Not together with ``segments``.
        """
        batch, time = tokens.shape
        plain = positions is None
        if positions is None:
            positions = torch.arange(time, device=tokens.device).expand(batch, time)
        length = time if plain else int(positions.max()) + 1
        x = self.model.embed_tokens(tokens).to(self.dtype)
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(positions).to(x.dtype)
        rope = None
        if self.rope is not None:
            cos, sin = self.rope(positions, length)
            rope = (cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))
        masks: dict[int | None, Tensor | None] = {}
        for layer, block in enumerate(self.model.layers):
            window = self.config.window(layer)
            if window not in masks:
                masks[window] = self._mask(
                    positions, segments, window, length, cached=cache is not None, plain=plain
                )
            x = block(x, rope, masks[window], positions, length, cache)
        return cast(Tensor, self.model.norm(x))

    def _mask(
        self,
        positions: Tensor,
        segments: Tensor | None,
        window: int | None,
        length: int,
        *,
        cached: bool,
        plain: bool,
    ) -> Tensor | None:
        """Which keys each query sees, [B or 1, 1, T, keys], True to see; None for plain causal attention."""
        time = positions.shape[1]
        if window is not None and length <= window:
            window = None  # nothing is further away than the window
        if cached:
            if plain and window is None and time == length:
                return None
            query, key = positions[:, :, None], torch.arange(length, device=positions.device)[None, None, :]
            seen = key <= query
        else:
            if segments is None and window is None:
                return None
            # Order in the row decides what is earlier: positions restart with each packed document.
            place = torch.arange(time, device=positions.device)
            query, key = place[None, :, None], place[None, None, :]
            seen = key <= query
            if segments is not None:
                seen = seen & (segments[:, :, None] == segments[:, None, :])
        if window is not None:
            seen = seen & (query - key < window)
        return seen[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] in float32 for hidden states [..., H]."""
        return cast(Tensor, self.lm_head(hidden)).float()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Next-token logits [B, T, V] in float32; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, positions, segments, cache))
