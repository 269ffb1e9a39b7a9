"""The network: one decoder-only transformer.

The whole comes first, then its parts in the order that a token reaches them: block, norms, attention,
feed-forward. Rotary positions are in `tercet.model.rotary`; masks, the key/value cache's interface and
the arithmetic of attention in `tercet.model.attention`.

Module paths are those of Hugging Face's Llama (``model.layers.0.self_attn.q_proj``), so that
checkpoints and PEFT adapters need no renaming. Shapes: B sequences, T tokens, H hidden size,
N query heads, K key-value heads, D head dimension, V vocabulary.

Weights may be kept in float32 while the arithmetic runs in bfloat16 (``compute_dtype``): each
`Linear` casts its weight on use, which is simpler and faster here than autocast. Norms, rotary
tables and logits stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.model.attention import Documents, KVCache, attend, softcap, visible_keys
from tercet.model.config import ModelConfig
from tercet.model.rotary import RotaryEmbedding, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Transformer(nn.Module):
    """The whole network: tokens in, logits out.

    ``compute_dtype`` is the type of activations between layers; None: the type of the weights.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.compiler: str | None = None  # the PyTorch backend that compiles the blocks; None: not compiled
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config) if config.positions == "rope" else None
        self.local_rope = RotaryEmbedding(config, local=True) if config.local_rope_theta is not None else None
        self.tie()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return next-token logits [B, T, V] in float32; the arguments are those of `hidden`."""
        return self.logits(self.hidden(tokens, positions, segments, cache))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        length: int | None = None,
        document_begins: Tensor | None = None,
    ) -> Tensor:
        """Return final normalised hidden states [B, T, H] for ``tokens`` [B, T].

        Args:
            tokens: token ids [B, T].
            positions: [B, T], each token's place in its own sequence; default 0..T-1 in every row.
            segments: [B, T] integers; tokens see only earlier tokens of the same segment. Packed
                documents get one number each, padding (on either side) a number of its own.
            cache: keys and values are stored at ``positions`` and all earlier slots of the row are
                seen. It cannot be combined with ``segments``.
            length: one more than the largest position, if the caller knows it: reading it off
                ``positions`` waits for a GPU.
            document_begins: the boundaries in ``segments`` as in `Documents`, if `attends_by_document`.
        """
        batch, time = tokens.shape
        plain = positions is None
        if positions is None:
            positions = torch.arange(time, device=tokens.device).expand(batch, time)
            length = time
        elif length is None:
            length = int(positions.max()) + 1
        x = self._embed(tokens, positions)
        ropes = self._rotations(positions, length, segments, x.dtype)
        masks: dict[int | None, Tensor | Documents | None] = {}
        for layer, block in enumerate(self.model.layers):
            window = self.config.window(layer)
            if window not in masks and document_begins is not None:
                masks[window] = Documents(document_begins, window)
            elif window not in masks:
                masks[window] = visible_keys(
                    positions, segments, window, length, cached=cache is not None, plain=plain
                )
            rope = ropes[self.config.has_local_rope(layer)] if self.config.has_rope(layer) else None
            x = block(x, rope, masks[window], positions, length, cache)
        return cast(Tensor, self.model.norm(x))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the first block's input [B, T, H]."""
        x = self.model.embed_tokens(tokens).to(self.dtype)
        if self.config.embedding_scale is not None:
            # Rounded to the type of the activations first, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu").item()
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(positions).to(x.dtype)
        return cast(Tensor, x)

    def _rotations(
        self, positions: Tensor, length: int, segments: Tensor | None, dtype: torch.dtype
    ) -> dict[bool, tuple[Tensor, Tensor]]:
        """Return cos and sin [B, 1, T, rotary] in ``dtype``, for global (False) and local layers (True)."""
        ropes: dict[bool, tuple[Tensor, Tensor]] = {}
        for local, embedding in ((False, self.rope), (True, self.local_rope)):
            if embedding is not None:
                cos, sin = embedding(positions, length, segments)
                ropes[local] = (cos[:, None].to(dtype), sin[:, None].to(dtype))
        return ropes

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits [..., V] in float32 for hidden states [..., H]."""
        logits = cast(Tensor, self.lm_head(hidden)).float()
        cap = self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    def tie(self) -> None:
        """Make the head share the embedding's weights if configured. Call this after replacing weights."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations between layers."""
        return self.compute_dtype or self.model.embed_tokens.weight.dtype


def attends_by_document(model: Transformer) -> bool:
    """Return whether `document_attention` supports the model's device, type and configuration."""
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and model.config.attention_softcap is None
        and model.config.head_dim <= 256
        and model.config.head_dim % 8 == 0
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
    )


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm: all layers but the head (``model.`` in checkpoints)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input; norms before them, after them or both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if config.pre_norm:
            self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        if config.post_norm:
            self.attention_output_norm = make_norm(config)
        if config.pre_norm:
            self.post_attention_layernorm = make_norm(config)  # before the MLP; Llama's name
        self.mlp = Mixture(config) if config.is_mixture(layer) else MLP(config, config.intermediate_size)
        if config.post_norm:
            self.mlp_output_norm = make_norm(config)
        self.pre_norm, self.post_norm = config.pre_norm, config.post_norm
        self.parallel = config.parallel_residual

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | Documents | None,
        positions: Tensor,
        length: int,
        cache: KVCache | None,
    ) -> Tensor:
        """Return hidden states [B, T, H] for ``x`` [B, T, H]; the other arguments as in `Attention.forward`."""
        normed = self.input_layernorm(x) if self.pre_norm else x
        attended = self.self_attn(normed, rope, mask, positions, length, cache)
        if self.post_norm:
            attended = self.attention_output_norm(attended)
        middle = x + attended
        source = x if self.parallel else middle
        output = self.mlp(self.post_attention_layernorm(source) if self.pre_norm else source)
        if self.post_norm:
            output = self.mlp_output_norm(output)
        return cast(Tensor, middle + output)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), in float32.

    The factor is ``offset`` plus the weight, and 1 at the start: Gemma (``offset`` 1) stores the difference.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x`` [..., size]."""
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with a bias (GPT-2, GPT-NeoX), in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x`` [..., size]."""
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the normalisation that ``config.norm`` names, over the hidden size."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
    return LayerNorm(config.hidden_size, config.norm_eps)


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
        if config.qk_norm != "none":
            whole = config.qk_norm == "projection"
            sizes = (query, key) if whole else (config.head_dim, config.head_dim)
            self.q_norm = RMSNorm(sizes[0], config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(sizes[1], config.norm_eps, config.norm_offset)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | Documents | None,
        positions: Tensor,
        length: int,
        cache: KVCache | None,
    ) -> Tensor:
        """Return attention's output [B, T, H] for ``x`` [B, T, H].

        Args:
            x: hidden states [B, T, H].
            rope: cos and sin [B, 1, T, rotary]; None in layers without rotary positions.
            mask: the keys that each query sees, as `attend` takes them.
            positions: [B, T], the slots of ``cache`` to write to.
            length: how many slots of ``cache`` are read.
            cache: None where keys and values are those of ``x`` alone.
        """
        batch, time, _ = x.shape
        config = self.config
        q, k = self.q_proj(x), self.k_proj(x)
        if config.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(batch, time, -1, config.head_dim), k.view(batch, time, -1, config.head_dim)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = self.v_proj(x).view(batch, time, -1, config.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions, length)
        out = attend(q, k, v, mask, config)
        return cast(Tensor, self.o_proj(out.transpose(1, 2).reshape(batch, time, -1)))


class MLP(nn.Module):
    """Feed-forward layer, gated (SwiGLU, Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        if config.gated_mlp:
            self.gate_proj = Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., H] for ``x`` [..., H]."""
        if self.gated:
            return cast(Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))
        return cast(Tensor, self.down_proj(self.activation(self.up_proj(x))))


class Mixture(nn.Module):
    """A mixture of experts: each token is sent to a few (Shazeer et al. 2017, arXiv:1701.06538; Mixtral).

    A router gives every expert a probability; the likeliest ``experts_per_token`` are computed and
    their outputs are added with those weights. Gradients flow through the weights and the experts used.
    No auxiliary loss keeps the experts evenly used: tuning a mixture doesn't balance its router.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.experts_per_token = config.experts_per_token
        self.normalize = config.normalize_expert_weights

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., H] for ``x`` [..., H]."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(flat).float().softmax(-1).topk(self.experts_per_token, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        # Pairs (token, expert) sorted by expert, so that each expert runs once, on all of its tokens.
        by_expert = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(flat, dtype=torch.float32)
        for expert, pairs in zip(self.experts, by_expert.split(counts), strict=True):
            if len(pairs):
                tokens = pairs // self.experts_per_token
                out.index_add_(0, tokens, expert(flat[tokens]) * weights.flatten()[pairs, None])
        return out.to(x.dtype).view(x.shape)


class Linear(nn.Linear):
    """A linear layer whose weight takes the type of its input: float32 weights, bfloat16 arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the type of ``x`` [..., in]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)
