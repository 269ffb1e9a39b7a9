"""How llama.cpp names and computes the model families: graphs, tensors and rotary positions.

The facts are llama.cpp's: the graphs in ``src/models`` and the keys of the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The tests compare every family here with
llama.cpp's own logits. A feature that a graph of llama.cpp lacks is refused, never approximated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tercet.errors import UserError
from tercet.model.config import Activation, ModelConfig, RopeScaling
from tercet.model.gguf_values import Floats
from tercet.model.rope import rope_frequencies
from tercet.model.tensor_names import network_tensors


@dataclass(frozen=True)
class Architecture:
    """A graph of llama.cpp: what it computes for an architecture.

    Attributes:
        name: llama.cpp's name of the architecture.
        interleaved: the graph rotates dimensions 2i and 2i + 1 of a head together (the original Llama's
            layout), so rows of queries and keys are reordered; otherwise i and i + D/2, as in Hugging Face.
        joined: a tensor of the graph, to the tensors that it holds one after another.
        own_head: the file must hold the head, even if it is tied to the embedding.
        wide_heads: the number of heads times their size may differ from the hidden size.
        qkv_bias: whether queries, keys and values have biases: "no", "may" or "must".
        output_bias: the same for the attention's output.
        mlp_bias: the same for the MLP.
        activations: supported activations. ``gelu`` is always computed in its tanh form.
        windows: the graph has sliding windows; without them the context is limited to the smallest window.
        rope_factors: the graph reads a factor for each rotary frequency, so any fixed scaling can be written.
    """

    name: str
    interleaved: bool = False
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_head: bool = False
    wide_heads: bool = True
    qkv_bias: str = "no"
    output_bias: str = "no"
    mlp_bias: str = "no"
    activations: tuple[Activation, ...] = ("silu",)
    windows: bool = False
    rope_factors: bool = False


QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}
LLAMA = Architecture(
    "llama", interleaved=True, qkv_bias="may", output_bias="may", mlp_bias="may", rope_factors=True
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2", wide_heads=False, qkv_bias="must"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma2": Architecture("gemma2", activations=("gelu_tanh",), windows=True),
    "gemma3_text": Architecture("gemma3", activations=("gelu_tanh",), windows=True),
    "phi3": Architecture(
        "phi3", joined={**QKV, "ffn_up": ("ffn_gate", "ffn_up")}, wide_heads=False, rope_factors=True
    ),
    "olmo2": Architecture("olmo2", own_head=True, wide_heads=False),
    "smollm3": Architecture("smollm3", interleaved=True),
    "gpt2": Architecture(
        "gpt2",
        joined=QKV,
        wide_heads=False,
        qkv_bias="must",
        output_bias="must",
        mlp_bias="must",
        activations=("gelu_tanh", "gelu"),
    ),
    "gpt_neox": Architecture(
        "gptneox",
        joined=QKV,
        own_head=True,
        wide_heads=False,
        qkv_bias="must",
        output_bias="must",
        mlp_bias="must",
        activations=("gelu_tanh", "gelu"),
    ),
}
# llama.cpp recognises the 27B models by their number of layers and scales their attention by another size.
LAYERS_27B = {"gemma2": 46, "gemma3": 62}
NO_ROPE_STEP = 4  # of SmolLM3: fixed in llama.cpp


def architecture_of(config: ModelConfig) -> Architecture:
    """Return llama.cpp's graph for a configuration.

    Raises:
        UserError: there is no graph, or the graph lacks a feature that the configuration needs.
    """
    graph = ARCHITECTURES.get(config.family)
    if graph is None:
        raise UserError(
            f"a {config.family} model can't be exported to GGUF; the families that can are {', '.join(ARCHITECTURES)}"
        )
    if feature := next(_lacking(graph, config), None):
        raise UserError(
            f"llama.cpp's {graph.name} has no {feature}, so this model can't be exported to GGUF; use `format=hf`"
        )
    return graph


def _lacking(graph: Architecture, config: ModelConfig) -> Iterator[str]:
    """Yield the features that the configuration needs and the graph lacks."""
    if config.activation not in graph.activations:
        yield f"activation {config.activation} (it has {', '.join(graph.activations)})"
    biases = (
        (graph.qkv_bias, config.attention_bias, "on queries, keys and values"),
        (graph.output_bias, config.output_bias, "on the attention's output"),
        (graph.mlp_bias, config.mlp_bias, "in the MLP"),
    )
    for support, present, place in biases:
        if present and support == "no":
            yield f"biases {place}"
        if not present and support == "must":
            yield f"variant without biases {place}"
    if not graph.wide_heads and config.num_heads * config.head_dim != config.hidden_size:
        yield (
            f"variant with {config.num_heads} heads of {config.head_dim} dimensions "
            f"and a hidden size of {config.hidden_size}"
        )
    if config.num_experts and config.mlp_bias:
        yield "biases in the experts"
    if config.dense_layers:
        yield f"mixture of experts with plain layers (here {list(config.dense_layers)})"
    if config.num_experts and not config.normalize_expert_weights:
        yield "mixture of experts whose weights don't sum to 1 (norm_topk_prob is false)"
    if graph.name == "smollm3":
        step = tuple(layer for layer in range(config.num_layers) if (layer + 1) % NO_ROPE_STEP == 0)
        if config.nope_layers != step:
            yield f"variant without rotary positions in layers {list(config.nope_layers)} (only in every {NO_ROPE_STEP}th)"
    if graph.name == "gemma2":
        if config.attention_softcap is None or config.logit_softcap is None:
            yield "variant without soft caps"
        if not config.tie_embeddings:
            yield "separate head"
        if not any(config.windows):
            yield "variant without sliding windows"
    yield from _lacking_rope(graph, config)


def _lacking_rope(graph: Architecture, config: ModelConfig) -> Iterator[str]:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("linear", "dynamic"):
        return
    if scaling.kind == "yarn" and not graph.rope_factors:
        if not scaling.truncate:
            yield "yarn scaling with truncate false"
        if graph.windows:
            yield "yarn scaling"
    elif not graph.rope_factors:
        yield f"{scaling.kind} scaling of rotary positions"


# Tensors


@dataclass(frozen=True)
class Target:
    """A tensor of the file, made of the network's tensors.

    Attributes:
        name: llama.cpp's name of the tensor.
        shape: its shape.
        parts: the network's tensors, joined along the first dimension or stacked along a new one.
        exact: the tensor stays float32 whatever the file's type: norms, biases, routers, learned positions.
        heads: for each part the number of heads by which its rows are reordered for interleaved rotary
            positions; 0: not reordered.
        scale: every value becomes scale * (value + offset).
        offset: likewise.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    exact: bool = False
    heads: tuple[int, ...] = ()
    scale: float = 1.0
    offset: float = 0.0

    def read(self, weights: Callable[[str], Floats]) -> Iterator[Floats]:
        """Yield the values of each part; ``weights`` returns those of a tensor of the network."""
        for number, name in enumerate(self.parts):
            values = weights(name)
            if self.heads and self.heads[number]:
                values = interleave(values, self.heads[number])
            if self.offset or self.scale != 1:
                values = np.float32(self.scale) * (values + np.float32(self.offset))
            yield np.ascontiguousarray(values, np.float32)


def interleave(rows: Floats, heads: int) -> Floats:
    """Reorder rows of queries or keys [heads * D, ...] so that dimensions i and i + D/2 are adjacent."""
    rest = rows.shape[1:]
    pairs = rows.reshape(heads, 2, -1, *rest).swapaxes(1, 2)
    return pairs.reshape(-1, *rest)


def separate(rows: Any, heads: int) -> Any:
    """Return rows in the order before `interleave`; ``rows`` may be values or blocks."""
    rest = rows.shape[1:]
    return rows.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_output_norm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EXPERT = re.compile(r"mlp\.experts\.\d+\.(gate|up|down)_proj")


def targets(config: ModelConfig, graph: Architecture) -> list[Target]:
    """Return every tensor of the file that is made from weights, in the order of the network."""
    shapes = {part.name: part.shape for part in network_tensors(config)}
    parts_of: dict[str, list[str]] = {}
    for ours in shapes:
        parts_of.setdefault(_their_name(ours, graph), []).append(ours)
    tensors = [_target(name, parts, shapes, config, graph) for name, parts in parts_of.items()]
    if config.tie_embeddings and graph.own_head:
        embedding = "model.embed_tokens.weight"
        tensors.append(Target("output.weight", shapes[embedding], (embedding,)))
    return tensors


def _their_name(ours: str, graph: Architecture) -> str:
    """Return llama.cpp's name of the tensor that holds the network's tensor ``ours``."""
    module, _, kind = ours.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    inner = layer[2] if layer else module
    expert = _EXPERT.fullmatch(inner)
    theirs = f"ffn_{expert[1]}_exps" if expert else _NAMES[inner]
    theirs = next((joint for joint, parts in graph.joined.items() if theirs in parts), theirs)
    return f"blk.{layer[1]}.{theirs}.{kind}" if layer else f"{theirs}.{kind}"


def _target(
    name: str, parts: list[str], shapes: dict[str, tuple[int, ...]], config: ModelConfig, graph: Architecture
) -> Target:
    first = shapes[parts[0]]
    if "_exps." in name:
        shape: tuple[int, ...] = (len(parts), *first)
    else:
        shape = (sum(shapes[part][0] for part in parts), *first[1:])
    norm = "norm." in name
    heads = tuple(_heads(part, config) if graph.interleaved else 0 for part in parts)
    return Target(
        name,
        shape,
        tuple(parts),
        exact=len(shape) == 1 or "ffn_gate_inp" in name or name.startswith("position_embd"),
        heads=heads if any(heads) else (),
        scale=query_scale(config, graph) if name.endswith(_scaled(graph)) else 1.0,
        offset=config.norm_offset if norm else 0.0,
    )


def _heads(part: str, config: ModelConfig) -> int:
    if ".q_proj." in part:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in part else 0


def _scaled(graph: Architecture) -> str:
    # A norm on queries would cancel a factor on its input.
    return "attn_q_norm.weight" if graph.name == "gemma3" else "attn_q.weight"


def query_scale(config: ModelConfig, graph: Architecture) -> float:
    """Return the factor on queries that turns llama.cpp's scale of the scores into the configuration's."""
    theirs = config.head_dim**-0.5
    if LAYERS_27B.get(graph.name) == config.num_layers:
        theirs = (config.hidden_size // config.num_heads) ** -0.5
    ratio = 1.0 if config.attention_scale is None else config.attention_scale / theirs
    return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-6) else ratio


# Positions


@dataclass(frozen=True)
class Rope:
    """Scaling of rotary positions in the terms of GGUF.

    Attributes:
        kind: ``rope.scaling.type``; None for none.
        factor: ``rope.scaling.factor``.
        original_context: ``rope.scaling.original_context_length`` in tokens.
        attention_factor: factor on cos and sin in addition to llama.cpp's own for ``kind``.
        beta_fast: ``rope.scaling.yarn_beta_fast``.
        beta_slow: ``rope.scaling.yarn_beta_slow``.
        tensors: float32 divisors of the frequencies, by the tensor's name.
    """

    kind: str | None = None
    factor: float | None = None
    original_context: int | None = None
    attention_factor: float = 1.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    tensors: dict[str, Floats] = field(default_factory=dict)


def rope_of(config: ModelConfig, graph: Architecture) -> Rope:
    """Return the scaling of rotary positions for a configuration that `architecture_of` accepts."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return Rope()
    if scaling.kind == "linear":
        return Rope("linear", scaling.factor)
    frequencies, attention = rope_frequencies(config, 1)
    if scaling.kind == "longrope":
        tensors = {
            f"rope_factors_{name}.weight": np.array(factors, np.float32)
            for name, factors in (("long", scaling.long_factor), ("short", scaling.short_factor))
        }
        return Rope(
            "longrope",
            original_context=scaling.original_max_positions,
            attention_factor=attention,
            tensors=tensors,
        )
    if graph.rope_factors:
        plain, _ = rope_frequencies(_unscaled(config), 1)
        return Rope(attention_factor=attention, tensors={"rope_freqs.weight": plain / frequencies})
    return _yarn(scaling, attention)


def _yarn(scaling: RopeScaling, attention: float) -> Rope:
    own = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return Rope(
        "yarn",
        scaling.factor,
        scaling.original_max_positions,
        attention / own,
        scaling.beta_fast,
        scaling.beta_slow,
    )


def _unscaled(config: ModelConfig) -> ModelConfig:
    return replace(config, rope_scaling=None)


def context_length(config: ModelConfig, graph: Architecture) -> tuple[int, list[str]]:
    """Return the context up to which llama.cpp computes the same, in tokens, and notes on its limits."""
    length, notes = config.max_positions, list[str]()
    smallest = min((window for window in config.windows if window is not None), default=None)
    if smallest is not None and not graph.windows and smallest < length:
        length = smallest
        notes.append(
            f"llama.cpp's {graph.name} has no sliding windows, so the context is limited to the window, {smallest} "
            f"of {config.max_positions} tokens"
        )
    scaling = config.rope_scaling
    if scaling is None:
        return length, notes
    if scaling.kind == "dynamic":  # it has no effect up to the context that the model was trained with
        length = min(length, scaling.original_max_positions)
        notes.append(f"llama.cpp has no dynamic rotary scaling, so the context is limited to {length} tokens")
    if scaling.kind == "longrope" and scaling.original_max_positions < length:
        notes.append(
            f"llama.cpp chooses the long or short rotary factors by its configured context size, not by the text; "
            f"up to {scaling.original_max_positions} tokens it uses the short ones"
        )
    return length, notes
