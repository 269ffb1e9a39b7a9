"""Names and shapes of the network's weights, and how the families' checkpoints name and join them.

This is the list of tensors for all that reads or writes weights. It needs neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from tercet.model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A tensor of the network: its name in ``Transformer.state_dict()`` and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRule:
    """A tensor of a checkpoint: parts of the network, joined along the first dimension, perhaps transposed.

    Attributes:
        name: the checkpoint's name of the tensor.
        parts: the network's tensors in it.
        transpose: the joined tensor is stored transposed.
        groups: the rows form that many groups of equal size, each with a share of every part
            (GPT-NeoX: query, key and value of head 0, then of head 1, ...). 1: part after part.
    """

    name: str
    parts: tuple[Part, ...]
    transpose: bool = False
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on disk."""
        _, *rest = self.parts[0].shape
        joined = (sum(self.heights), *rest)
        return tuple(reversed(joined)) if self.transpose else joined

    @property
    def heights(self) -> list[int]:
        """Number of rows of each part."""
        return [part.shape[0] for part in self.parts]


def split_rows(whole: Any, heights: Sequence[int], groups: int = 1) -> list[Any]:
    """Return the parts of a joined numpy array or torch tensor [sum(heights), ...], as views if possible."""
    rest = whole.shape[1:]
    grouped = whole.reshape(groups, -1, *rest)
    ends = list(accumulate(height // groups for height in heights))
    bounds = zip([0, *ends], ends, heights, strict=False)
    return [grouped[:, begin:end].reshape(height, *rest) for begin, end, height in bounds]


def network_tensors(config: ModelConfig) -> list[Part]:
    """Return every tensor of a `Transformer` with this configuration, except a head tied to the embedding."""
    hidden, tensors = config.hidden_size, list[Part]()
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        tensors.append(Part(f"{name}.weight", (rows, columns)))
        if bias:
            tensors.append(Part(f"{name}.bias", (rows,)))

    def norm(name: str) -> None:
        tensors.extend(Part(f"{name}.{kind}", (hidden,)) for kind in norm_tensors)

    def mlp(name: str, inner: int) -> None:
        if config.gated_mlp:
            linear(f"{name}.gate_proj", inner, hidden, config.mlp_bias)
        linear(f"{name}.up_proj", inner, hidden, config.mlp_bias)
        linear(f"{name}.down_proj", hidden, inner, config.mlp_bias)

    norm_tensors = ("weight", "bias") if config.norm == "layer" else ("weight",)
    linear("model.embed_tokens", config.vocab_size, hidden)
    if config.positions == "learned":
        linear("model.embed_positions", config.max_positions, hidden)
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        before = ("input_layernorm", "post_attention_layernorm") if config.pre_norm else ()
        after = ("attention_output_norm", "mlp_output_norm") if config.post_norm else ()
        for name in (*before, *after):
            norm(f"{at}.{name}")
        linear(f"{at}.self_attn.q_proj", query, hidden, config.attention_bias)
        linear(f"{at}.self_attn.k_proj", key, hidden, config.attention_bias)
        linear(f"{at}.self_attn.v_proj", key, hidden, config.attention_bias)
        linear(f"{at}.self_attn.o_proj", hidden, query, config.output_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "projection"
            tensors.append(Part(f"{at}.self_attn.q_norm.weight", (query if whole else config.head_dim,)))
            tensors.append(Part(f"{at}.self_attn.k_norm.weight", (key if whole else config.head_dim,)))
        if config.is_mixture(layer):
            linear(f"{at}.mlp.gate", config.num_experts, hidden)
            for expert in range(config.num_experts):
                mlp(f"{at}.mlp.experts.{expert}", config.moe_intermediate_size)
        else:
            mlp(f"{at}.mlp", config.intermediate_size)
    norm("model.norm")
    if not config.tie_embeddings:
        linear("lm_head", config.vocab_size, hidden)
    return tensors


@dataclass(frozen=True)
class Names:
    """A family's names of the network's tensors.

    Attributes:
        renamed: network's name to family's, for whole pieces of a dotted name, wherever they occur.
        joined: family's module to the network's modules (below the same, renamed parent) that it holds
            as one tensor.
        by_head: joined tensors alternate head by head instead of part by part.
        transposed: matrices of the layers are stored as [in, out].
    """

    renamed: dict[str, str] = field(default_factory=dict)
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    transposed: bool = False

    def rename(self, name: str) -> str:
        """Return the family's name of the network's tensor or module ``name``."""
        if not self.renamed:
            return name
        ours = "|".join(re.escape(piece) for piece in sorted(self.renamed, key=len, reverse=True))
        return re.sub(rf"(?<![^.])({ours})(?![^.])", lambda match: self.renamed[match[1]], name)

    def rules(self, config: ModelConfig) -> list[TensorRule]:
        """Return every tensor of a checkpoint with this configuration."""
        parts = {part.name: part for part in network_tensors(config)}
        rules, done = list[TensorRule](), set[str]()
        for name, part in parts.items():
            if name in done:
                continue
            members, theirs = [part], self.rename(name)
            module, _, kind = name.rpartition(".")
            for joint, ours in self.joined.items():
                if module.endswith(f".{ours[0]}"):
                    parent = module.removesuffix(ours[0])
                    members = [parts[f"{parent}{member}.{kind}"] for member in ours]
                    theirs = f"{self.rename(parent)}{joint}.{kind}"
            done.update(member.name for member in members)
            transpose = self.transposed and ".layers." in name and len(part.shape) == 2
            groups = config.num_heads if self.by_head and len(members) > 1 else 1
            rules.append(TensorRule(theirs, tuple(members), transpose, groups))
        return rules


# The families

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LLAMA_NAMES = Names()  # the network uses Llama's names
OLMO2_NAMES = Names(
    {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
)
GEMMA_NAMES = Names(
    {
        "attention_output_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    }
)
PHI3_NAMES = Names(joined={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")})
MIXTRAL_NAMES = Names({"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
GPT2_NAMES = Names(
    {
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
        "model.norm": "transformer.ln_f",
    },
    joined={"attn.c_attn": QKV},
    transposed=True,
)
GPT_NEOX_NAMES = Names(
    {
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.layers": "gpt_neox.layers",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
    joined={"attention.query_key_value": QKV},
    by_head=True,
)
