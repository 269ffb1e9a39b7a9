"""How llama.cpp names and computes the families: architecture, tensors, what its graphs can't express.

Facts are llama.cpp's: the graphs in ``src/models`` and the keys of the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every family here is held against
llama.cpp's own logits in the tests; what a graph of llama.cpp lacks is refused, never approximated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tercet.errors import UserError
from tercet.model.config import Activation, ModelConfig, RopeScaling
from tercet.model.rope import rope_frequencies
from tercet.model.tensor_names import network_tensors
from tercet.model.weights import Floats, Weights


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs.

    interleaved: it turns dimensions 2i and 2i + 1 of a head together (the original Llama's layout),
        so rows of queries and keys are reordered; otherwise i and i + D/2, as in Hugging Face.
    joined: its tensor, to those that it holds one after another.
    own_head: the file must hold the head, even one that is the embedding.
    wide_heads: heads times their size may differ from the hidden size.
    qkv_bias, output_bias, mlp_bias: whether it has them: "no", "may" or "must".
    activations: those that it computes. Its ``gelu`` is the tanh form, whatever the checkpoint's.
    windows: it has sliding windows; without them the context ends where a window would begin to count.
    rope_factors: it reads a factor for each rotary frequency, so any fixed scaling can be written.
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
# Layers by which llama.cpp knows the 27B models, which scale attention by another size than the rest.
LAYERS_27B = {"gemma2": 46, "gemma3": 62}
NO_ROPE_STEP = 4  # of SmolLM3: fixed in llama.cpp


def architecture_of(config: ModelConfig) -> Architecture:
    """llama.cpp's graph for this configuration.

    Raises:
        UserError: it has none, or the graph lacks something that the configuration asks for.
    """
    found = ARCHITECTURES.get(config.family)
    if found is None:
        raise UserError(
            f"a {config.family} model can't be exported to GGUF; families that can: {', '.join(ARCHITECTURES)}"
        )
    if lacking := next(_lacking(found, config), None):
        raise UserError(f"llama.cpp's {found.name} has no {lacking}, so this model can't be exported to GGUF")
    return found


def _lacking(graph: Architecture, config: ModelConfig) -> Iterator[str]:
    """What the configuration asks for and the graph has not."""
    if config.activation not in graph.activations:
        yield f"activation {config.activation} (it has {', '.join(graph.activations)})"
    biases = (
        (graph.qkv_bias, config.attention_bias, "on queries, keys and values"),
        (graph.output_bias, config.output_bias, "on the attention's output"),
        (graph.mlp_bias, config.mlp_bias, "in the MLP"),
    )
    for allowed, there, where in biases:
        if there and allowed == "no":
            yield f"biases {where}"
        if not there and allowed == "must":
            yield f"variant without biases {where}"
    if not graph.wide_heads and config.num_heads * config.head_dim != config.hidden_size:
        yield (
            f"{config.num_heads} heads of {config.head_dim} dimensions beside a hidden size of {config.hidden_size}"
        )
    if config.num_experts and config.mlp_bias:
        yield "biases in the experts"
    if config.dense_layers:
        yield f"mixture with plain layers (here {list(config.dense_layers)})"
    if config.num_experts and not config.normalize_expert_weights:
        yield "mixture whose expert weights don't sum to 1 (norm_topk_prob is false)"
    if graph.name == "smollm3":
        step = tuple(layer for layer in range(config.num_layers) if (layer + 1) % NO_ROPE_STEP == 0)
        if config.nope_layers != step:
            yield f"layers without positions at {list(config.nope_layers)} (only every {NO_ROPE_STEP}th)"
    if graph.name == "gemma2":
        if config.attention_softcap is None or config.logit_softcap is None:
            yield "variant without soft caps"
        if not config.tie_embeddings:
            yield "head of its own"
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
    """One tensor of the file, made of ours.

    parts: our tensors, one after another along the first dimension, or each a slice of a new one.
    exact: stays float32 whatever the file's type: norms, biases, routers and learned positions.
    heads: of a matrix whose rows are reordered head by head for interleaved rotary positions; 0: not.
    scale, offset: every value becomes scale * (value + offset).
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    exact: bool = False
    heads: tuple[int, ...] = ()
    scale: float = 1.0
    offset: float = 0.0

    def read(self, weights: Weights) -> Iterator[Floats]:
        """The parts' values, one part at a time."""
        for number, name in enumerate(self.parts):
            values = weights(name)
            if self.heads and self.heads[number]:
                values = interleave(values, self.heads[number])
            if self.offset or self.scale != 1:
                values = np.float32(self.scale) * (values + np.float32(self.offset))
            yield np.ascontiguousarray(values, np.float32)


def interleave(rows: Floats, heads: int) -> Floats:
    """Rows of queries or keys [heads * D, ...] so that dimensions i and i + D/2 come to lie side by side."""
    rest = rows.shape[1:]
    pairs = rows.reshape(heads, 2, -1, *rest).swapaxes(1, 2)
    return pairs.reshape(-1, *rest)


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
    """Every tensor of the file that comes from weights, in the order of the network."""
    shapes = {part.name: part.shape for part in network_tensors(config)}
    found: dict[str, list[str]] = {}
    for ours in shapes:
        found.setdefault(_their_name(ours, graph), []).append(ours)
    made = [_target(name, parts, shapes, config, graph) for name, parts in found.items()]
    if config.tie_embeddings and graph.own_head:
        embedding = "model.embed_tokens.weight"
        made.append(Target("output.weight", shapes[embedding], (embedding,)))
    return made


def _their_name(ours: str, graph: Architecture) -> str:
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
    # A norm on queries would undo a factor on what goes into it.
    return "attn_q_norm.weight" if graph.name == "gemma3" else "attn_q.weight"


def query_scale(config: ModelConfig, graph: Architecture) -> float:
    """The factor on queries that makes llama.cpp's scale of the scores the configuration's own."""
    theirs = config.head_dim**-0.5
    if LAYERS_27B.get(graph.name) == config.num_layers:
        theirs = (config.hidden_size // config.num_heads) ** -0.5
    ratio = 1.0 if config.attention_scale is None else config.attention_scale / theirs
    return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-6) else ratio


# Positions


@dataclass(frozen=True)
class Rope:
    """Rotary positions as llama.cpp is told them.

    kind: ``rope.scaling.type``; None for none.
    attention_factor: on cos and sin, beyond what llama.cpp applies for ``kind`` by itself.
    tensors: float32 factors that frequencies are divided by, by the tensor's name.
    """

    kind: str | None = None
    factor: float | None = None
    original_context: int | None = None
    attention_factor: float = 1.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    tensors: dict[str, Floats] = field(default_factory=dict)


def rope_of(config: ModelConfig, graph: Architecture) -> Rope:
    """The scaling of rotary positions, for a configuration that `architecture_of` has let through."""
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
    """Up to how many tokens llama.cpp computes the same, and why that is less than the model's own."""
    length, notes = config.max_positions, list[str]()
    smallest = min((window for window in config.windows if window is not None), default=None)
    if smallest is not None and not graph.windows and smallest < length:
        length = smallest
        notes.append(
            f"llama.cpp's {graph.name} has no sliding windows, so the context is the window's {smallest} tokens "
            f"of {config.max_positions}"
        )
    scaling = config.rope_scaling
    if scaling is None:
        return length, notes
    if scaling.kind == "dynamic":  # which changes nothing up to the context the model was trained on
        length = min(length, scaling.original_max_positions)
        notes.append(
            f"llama.cpp has no dynamic rotary scaling, so beyond {length} tokens nothing is stretched"
        )
    if scaling.kind == "longrope" and scaling.original_max_positions < length:
        notes.append(
            f"llama.cpp chooses long or short rotary factors by its --ctx-size, not by the text: up to "
            f"{scaling.original_max_positions} they are the short ones"
        )
    return length, notes
