"""The network: one decoder-only transformer, read top to bottom in the order a token flows.

Module paths are those of Hugging Face's Llama (``model.layers.0.self_attn.q_proj``), so that
checkpoints and PEFT adapters need no renaming. Shapes: B sequences, T tokens, H hidden size,
N query heads, K key-value heads, D head dimension, V vocabulary.

Weights may be kept in float32 while the arithmetic runs in bfloat16 (``compute_dtype``): each
`Linear` casts its weight on use, which is simpler and faster here than autocast. Norms, rotary
tables and logits stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.model.config import ModelConfig
from tercet.model.rope import rope_frequencies

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
    """Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), in float32.

    ``offset`` plus the weight is the factor, which begins at one: Gemma stores what is added to 1.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with a bias (GPT-2, GPT-NeoX), in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
    return LayerNorm(config.hidden_size, config.norm_eps)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Bend values into (-cap, cap): cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap


class RotaryEmbedding:
    """cos and sin by position. No parameters, so not a module.

    In the half-rotated layout of Hugging Face checkpoints. ``local``: for layers with a base of their own.
    """

    def __init__(self, config: ModelConfig, local: bool = False) -> None:
        self.config, self.local = config, local
        self.by_length = not local and config.rope_scaling is not None and config.rope_scaling.by_length
        self._table: tuple[Tensor, Tensor] | None = None  # of every position, grown on demand

    def __call__(
        self, positions: Tensor, length: int, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, rotary] float32 for ``positions`` [B, T], all below ``length``.

        Where frequencies depend on the length at hand, it is that of the token's own row, or of its
        own segment [B, T], so that neither batching nor packing changes a result.
        """
        if self.by_length:
            return self._by_length(positions, segments)
        table = self._table
        if table is None or table[0].shape[0] < length or table[0].device != positions.device:
            rows = torch.arange(max(256, 1 << (length - 1).bit_length()), device=positions.device)
            frequencies, factor = rope_frequencies(self.config, length, self.local)
            table = self._table = _cos_and_sin(rows, torch.from_numpy(frequencies), factor)
        return table[0][positions], table[1][positions]

    def _by_length(self, positions: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        if segments is None:
            lengths = positions.amax(1, keepdim=True) + 1
        else:
            alike = segments[:, :, None] == segments[:, None, :]
            lengths = (positions[:, None, :] * alike).amax(2) + 1
        distinct, which = torch.unique(lengths, return_inverse=True)
        found = [rope_frequencies(self.config, length) for length in distinct.tolist()]
        frequencies = torch.stack([torch.from_numpy(frequency) for frequency, _ in found]).to(which.device)
        return _cos_and_sin(positions, frequencies[which], found[0][1])  # the factor is the same for all


def _cos_and_sin(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """For ``positions`` [...] and ``frequencies`` [..., rotary / 2]: [..., rotary] each."""
    angles = positions[..., None].float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) of the first R dimensions of ``x`` [B, heads, T, D] by its angle."""
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    half = dim // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * cos + swapped * sin
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)


class KVCache(Protocol):
    """Keeps keys and values of earlier tokens; a token's slot is its position.

    Rows may hold different numbers of tokens: what lies beyond a row's own position is never
    attended to, because a query at position p sees slots 0..p only, and slot p is written before
    it is read. So unequal prompts are padded on the right and nothing needs a padding mask.
    """

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, D] at ``positions`` [B, T]; return slots 0..length-1 of the layer, [B, K, length, D]."""
        ...


class Documents(NamedTuple):
    """In place of a mask: which documents the rows are made of.

    begins: int32 [D + 1], where each begins, of all rows laid end to end; the last is the number of tokens.
    window: tokens that a query sees at most, itself among them; None: all before it.
    """

    begins: Tensor
    window: int | None


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
        if isinstance(mask, Documents):
            out = document_attention(q, k, v, mask, config.attention_scale)
        elif config.attention_softcap is None:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and time > 1,
                scale=config.attention_scale,
                enable_gqa=config.num_heads != config.num_kv_heads,
            )
        else:
            out = capped_attention(q, k, v, mask, config.attention_scale, config.attention_softcap)
        return cast(Tensor, self.o_proj(out.transpose(1, 2).reshape(batch, time, -1)))


def attends_by_document(model: Transformer) -> bool:
    """Whether `document_attention` can run for ``model`` where it is and as it computes."""
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and model.config.attention_softcap is None
        and model.config.head_dim <= 256
        and model.config.head_dim % 8 == 0
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
    )


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None) -> Tensor:
    """Causal attention that doesn't compute what is masked: FlashAttention 2 (Dao 2023, arXiv:2307.08691) by PyTorch.

    A mask over pairs of tokens would be read for every head, and blocks between documents computed to be
    thrown away. q [B, N, T, D]; k, v [B, K, T, D] with N a multiple of K, 16 bits each. Returns [B, N, T, D].
    """
    batch, _, time, _ = q.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    begins, left = documents.begins, -1 if documents.window is None else documents.window - 1
    out = torch.ops.aten._flash_attention_forward(
        *flat, begins, begins, time, time, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip
    return cast(Tensor, out.view(batch, time, *out.shape[1:]).transpose(1, 2))


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float
) -> Tensor:
    """Attention with soft-capped scores, which PyTorch's own attention does not have.

    q [B, N, T, D]; k, v [B, K, S, D] with N a multiple of K; mask [B or 1, 1, T, S], True to see, or
    None for plain causal attention (T = S). Holds all scores [B, N, T, S] at once. Returns [B, N, T, D].
    """
    batch, heads, time, dim = q.shape
    groups = k.shape[1]
    if mask is None:
        mask = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()[None, None]
    grouped = q.view(batch, groups, heads // groups, time, dim) * (dim**-0.5 if scale is None else scale)
    scores = softcap(grouped @ k[:, :, None].transpose(3, 4), cap)
    weights = scores.float().masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(q.dtype)
    return (weights @ v[:, :, None]).view(batch, heads, time, dim)


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
        if self.gated:
            return cast(Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))
        return cast(Tensor, self.down_proj(self.activation(self.up_proj(x))))


class Mixture(nn.Module):
    """Experts, of which each token is sent to a few (Shazeer et al. 2017, arXiv:1701.06538; Mixtral).

    A router gives every expert a probability; the likeliest ``experts_per_token`` are computed and
    their outputs added with those weights. Gradients flow through the weights and the experts used.
    No auxiliary loss keeps the experts evenly used: tuning a mixture doesn't balance its router.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.chosen = config.experts_per_token
        self.normalize = config.normalize_expert_weights

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).float().softmax(-1).topk(self.chosen, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        # Places (token, choice) sorted by expert, so that each expert runs once, on all of its tokens.
        by_expert = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(flat, dtype=torch.float32)
        for expert, places in zip(self.experts, by_expert.split(counts), strict=True):
            if len(places):
                tokens = places // self.chosen
                out.index_add_(0, tokens, expert(flat[tokens]) * weights.flatten()[places, None])
        return out.to(x.dtype).view(x.shape)


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
        normed = self.input_layernorm(x) if self.pre_norm else x
        attended = self.self_attn(normed, rope, mask, positions, length, cache)
        if self.post_norm:
            attended = self.attention_output_norm(attended)
        middle = x + attended
        source = x if self.parallel else middle
        fed = self.mlp(self.post_attention_layernorm(source) if self.pre_norm else source)
        if self.post_norm:
            fed = self.mlp_output_norm(fed)
        return cast(Tensor, middle + fed)


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
        self.compiler: str | None = None  # the backend of PyTorch's that its blocks are compiled by
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config) if config.positions == "rope" else None
        self.local_rope = RotaryEmbedding(config, local=True) if config.local_rope_theta is not None else None
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
        """Final normalised hidden states [B, T, H] for ``tokens`` [B, T].

        positions: [B, T], each token's place in its own sequence; default 0..T-1 in every row.
        segments: [B, T] integers; tokens see only earlier tokens of the same segment. Packed
            documents get one number each, padding (on either side) a number of its own.
        cache: keys and values are stored at ``positions`` and all earlier slots of the row are seen.
            Not together with ``segments``.
        length: one more than the largest position, for a caller who knows it: to look waits for a GPU.
        document_begins: as in `Documents`: what ``segments`` say, where `attends_by_document`.
        """
        batch, time = tokens.shape
        plain = positions is None
        if positions is None:
            positions = torch.arange(time, device=tokens.device).expand(batch, time)
            length = time
        elif length is None:
            length = int(positions.max()) + 1
        x = self.model.embed_tokens(tokens).to(self.dtype)
        if self.config.embedding_scale is not None:
            # Rounded to the type of the activations first, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu").item()
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(positions).to(x.dtype)
        ropes: dict[bool, tuple[Tensor, Tensor]] = {}
        for local, embedding in ((False, self.rope), (True, self.local_rope)):
            if embedding is not None:
                cos, sin = embedding(positions, length, segments)
                ropes[local] = (cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))
        masks: dict[int | None, Tensor | Documents | None] = {}
        for layer, block in enumerate(self.model.layers):
            window = self.config.window(layer)
            if window not in masks and document_begins is not None:
                masks[window] = Documents(document_begins, window)
            elif window not in masks:
                masks[window] = self._mask(
                    positions, segments, window, length, cached=cache is not None, plain=plain
                )
            rope = ropes[self.config.has_local_rope(layer)] if self.config.has_rope(layer) else None
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
        logits = cast(Tensor, self.lm_head(hidden)).float()
        cap = self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Next-token logits [B, T, V] in float32; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, positions, segments, cache))
